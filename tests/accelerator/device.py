"""The simulated accelerator as torch's device type ``sim``, and as tests set it.

Two devices, each with any number of streams; each stream is a thread with a queue, in which operators run on the CPU
after the host has gone on. Memory that was not written yet, or was let go of, holds NaN. What a GPU's driver does to an
agent is simulated: the lag, full queues, capture of graphs, failure. Its speed and its kernels are not.
"""

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import torch

from tests.accelerator.build import load

DEVICES: Final = 2


@dataclass(frozen=True)
class Settings:
    """How a device behaves."""

    latency_seconds: float = 0.0
    """From the launch of an operator to its start."""
    cost_seconds: float = 0.0
    """What each operator takes."""
    capacity: int = 0
    """Operators that its queues hold; the launch of a further one waits. 0: any number."""
    held: bool = False
    """Whether it stands still."""
    alternates: bool = False
    """Whether its streams take turns, operator by operator."""
    failed: bool = False
    """Whether every call raises, and nothing that was launched is ever done."""


class Accelerator:
    """The simulated devices of this process."""

    def __init__(self) -> None:
        self._module: Any = load()
        self._settings = [Settings()] * DEVICES
        torch._C._rename_privateuse1_backend("sim")
        torch._register_device_module("sim", _DeviceModule(self._module))
        atexit.register(self._module.stop)

    def change(self, device: int = 0, **changes: Any) -> None:
        """Change the settings of a device."""
        new = self._settings[device] = replace(self._settings[device], **changes)
        speed = new.latency_seconds, new.cost_seconds, new.capacity
        self._module.set(device, *speed, new.held, new.alternates, new.failed)

    def reset(self) -> None:
        """Let both devices run without a lag, wait until they have done everything, and forget all records."""
        for device in range(DEVICES):
            self.change(device, **vars(Settings()))
            torch.accelerator.synchronize(device)
        self._module.set_float64(True)
        self._module.set_device(0)
        self._module.forget()

    def sleep(self, seconds: float) -> None:
        """Have the current stream do nothing for a while, once it has come to this."""
        self._module.sleep(seconds)

    def forbid_float64(self) -> None:
        """Have tensors of float64 raise TypeError, as MPS does."""
        self._module.set_float64(False)

    def forget(self) -> None:
        """Forget all records of waits, launches and touches."""
        self._module.forget()

    def waits(self, thread: int | None = None) -> list[str]:
        """Return the calls that waited for a device, of one thread or all, with their Python stacks."""
        return [f"{what}\n{stack}" for ident, what, stack in self._module.waits() if thread in (None, ident)]

    def waits_of_agent(self) -> list[str]:
        """Return the calls that waited for a device from within the agent's code."""
        return [wait for wait in self.waits() if "/agent/gradwatch/" in wait]

    def launches(self) -> int:
        """Return the number of operators that this thread has launched."""
        count: int = self._module.launches(threading.get_ident())
        return count

    def touched(self, thread: int) -> set[int]:
        """Return the devices that a thread has called."""
        return {device for ident, device in self._module.touches() if ident == thread}

    @contextmanager
    def capture(self) -> Iterator[Any]:
        """Capture what is launched on the current stream; the graph has ``replay``."""
        torch.accelerator.current_stream()
        graph = self._module.capture()
        try:
            yield graph
        finally:
            graph.end()


class _DeviceModule:
    """What torch asks of ``torch.sim``."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_in_bad_fork = lambda: False

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return DEVICES

    def current_device(self) -> int:
        index: int = self._module.current_device()
        return index

    def set_device(self, device: int) -> None:
        self._module.set_device(device)

    def is_current_stream_capturing(self) -> bool:
        capturing: bool = self._module.is_capturing()
        return capturing

    def synchronize(self, device: int | None = None) -> None:
        torch.accelerator.synchronize(device)

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: random numbers are the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@cache
def accelerator_of_process() -> Accelerator:
    """Return the accelerator of this process, loaded at the first call: torch knows it from then on."""
    return Accelerator()
