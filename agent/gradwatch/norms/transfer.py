"""The one way by which numbers leave a device: copied into pinned memory together, and stamped once they are there.

All numbers of a step are packed into a buffer on their device and copied to the host in one piece. A stamp is copied
behind them on the same stream, so that the host learns of their arrival by looking at its own memory: no event is
queried, which would break the capture of a graph anywhere in the process, and no thread but the training's ever calls
the device.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.norms.streams import StreamLog, current_stream
from gradwatch.norms.tensor_spec import BufferKey, local_part

Scalar = float | Tensor
"""A number, or a tensor of one element."""

_CAPACITY: Final = 32
"""Numbers that a new buffer takes at least."""
_KEPT: Final = (torch.float32, torch.float64)
"""Dtypes in which a number is copied; all others become float32."""


def copy_scalar(scalar: Tensor) -> Tensor:
    """Return a detached copy of a number on its device, in float32 or float64; later changes do not reach it."""
    part = local_part(scalar.detach())
    with torch.no_grad():
        return part.clone() if part.dtype in _KEPT else part.float()


def copy_and_check(scalar: Tensor) -> tuple[Scalar, bool]:
    """Return a number that later changes do not reach, and ``is_finite`` of it.

    On the CPU it is read now: a float costs less than a copy. Elsewhere it is a copy on its device.
    """
    if type(scalar) is Tensor and scalar.is_cpu and scalar.dim() == 0 and scalar.is_floating_point():
        try:
            number = cast("float", scalar.tolist())  # no operator of torch runs
        except RuntimeError:  # within a transform it holds no number
            return copy_scalar(scalar), True
        return number, math.isfinite(number)
    read = _read(scalar)
    return (copy_scalar(scalar), True) if read is None else (read, math.isfinite(read))


def _read(scalar: Tensor) -> float | None:
    """Return a number that is on the CPU, without an operator of torch; None for all others."""
    if type(scalar) is not Tensor:
        scalar = local_part(scalar.detach())
    if not scalar.is_cpu:
        return None
    try:
        value: Any = scalar.tolist()
        while isinstance(value, list):
            value = value[0]
    except RuntimeError:  # a subclass that holds no number, as a fake tensor
        return None
    return float(value.real)


def sum_scalars(scalars: Iterable[Scalar]) -> list[Scalar]:
    """Return the sums of the scalars: one of the floats, and one of the tensors of each device and dtype."""
    floats: list[float] = []
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for scalar in scalars:
        if isinstance(scalar, Tensor):
            by_kind.setdefault((scalar.device, scalar.dtype), []).append(scalar.reshape(()))
        else:
            floats.append(scalar)
    with torch.no_grad():
        sums: list[Scalar] = [torch.stack(same).sum() for same in by_kind.values()]
    return [*sums, sum(floats)] if floats else sums


def is_finite(scalar: Tensor) -> bool:
    """Return False for NaN or Inf on the CPU; True for all others, as a device would have to be waited for."""
    number = _read(scalar)
    return number is None or math.isfinite(number)


def read_now(number: Tensor) -> NDArray[np.float64]:
    """Return a tensor as an array of one dimension; waits where it is on a device, on which no parameter lies."""
    array: NDArray[np.float64] = number.detach().reshape(-1).to("cpu", torch.float64).numpy()
    return array


class Stamps:
    """The source of stamps: a one on each stream that has sent numbers, so that no stream has to wait for another."""

    def __init__(self) -> None:
        self._ones: dict[tuple[torch.device, int], Tensor] = {}

    def copy_to(self, host: Tensor, device: torch.device) -> None:
        """Queue a copy of the stamp on the current stream of a device; ``host`` is pinned, of shape (1,)."""
        stream = current_stream(device)
        place = device, 0 if stream is None else stream.stream_id
        one = self._ones.get(place)
        if one is None:
            one = self._ones[place] = torch.ones(1, device=device)
        host.copy_(one, non_blocking=True)


class Transfer:
    """Buffers for the numbers of one step: on each device, and where that is not the CPU, pinned on the host as well.

    Args:
        stamps: shared by all transfers of an agent.
        streams: those on which the training's numbers are launched.
    """

    def __init__(self, stamps: Stamps, streams: StreamLog) -> None:
        self.device: dict[BufferKey, Tensor] = {}
        self.host_arrays: dict[BufferKey, NDArray[Any]] = {}
        self.is_lost = False
        """Whether the device could not be called: the numbers will never arrive."""
        self._host: dict[BufferKey, Tensor] = {}
        self._used: dict[BufferKey, int] = {}
        """Number of elements of each buffer that this step uses."""
        self._numbers: dict[int, tuple[Tensor, BufferKey, int]] = {}
        """Id of a number -> the number, which is kept alive, its buffer and its place there."""
        self._source = stamps
        self._streams = streams
        self._outgrown: list[Tensor] = []
        """Buffers of this step that were replaced: what copies them may be queued yet."""
        self._stamps: dict[torch.device, tuple[Tensor, NDArray[Any]]] = {}
        """Device -> the pinned stamp of the last copies from there, 0 until they have arrived; and as an array."""
        self._awaited: list[NDArray[Any]] = []
        """The stamps of this step."""

    def send(self, numbers: Iterable[Tensor] = ()) -> None:
        """Start to copy to the host what was written to the buffers, and some more numbers, without waiting.

        Args:
            numbers: tensors on any device, of any shape; those on the CPU stay where they are.
        """
        by_key: dict[BufferKey, list[Tensor]] = {}
        for number in numbers:
            if number.device.type != "cpu" and id(number) not in self._numbers:
                dtype = number.dtype if number.dtype in _KEPT else torch.float32
                key = BufferKey(number.device, dtype)
                self._numbers[id(number)] = number, key, 0
                by_key.setdefault(key, []).append(number)
        keys = [key for key in dict.fromkeys((*self._used, *by_key)) if key.device.type != "cpu"]
        with torch.no_grad():
            for device in dict.fromkeys(key.device for key in keys):
                with self._streams.after_all(device):
                    for key in keys:
                        if key.device == device:
                            self._copy(key, by_key.get(key, ()))
                    self._stamp(device)

    def _copy(self, key: BufferKey, numbers: Sequence[Tensor]) -> None:
        """Pack numbers behind what the buffer holds, and copy all of it to the host."""
        start = self._used.get(key, 0)
        if numbers:
            count = sum(number.numel() for number in numbers)
            self._grow({key: count})
            parts = [number.detach().reshape(-1) for number in numbers]
            torch.cat(parts, out=self.device[key][start : start + count])
            for number in numbers:
                self._numbers[id(number)] = number, key, start
                start += number.numel()
            self._used[key] = start
        self._host[key][:start].copy_(self.device[key][:start], non_blocking=True)

    def _stamp(self, device: torch.device) -> None:
        """Queue the stamp behind the copies from a device."""
        known = self._stamps.get(device)
        if known is None:
            host = _pinned(1, torch.float32)
            known = self._stamps[device] = host, host.numpy()
        host, array = known
        array[0] = 0.0
        self._awaited.append(array)
        self._source.copy_to(host, device)

    @property
    def is_on_device(self) -> bool:
        """Return whether anything of this step came from a device."""
        return bool(self._awaited)

    def arrived(self) -> bool:
        """Return whether everything is on the host, without a call to the device."""
        return not self.is_lost and all(stamp[0] == 1.0 for stamp in self._awaited)

    def read(self, number: Tensor) -> NDArray[np.float64]:
        """Return a number that has arrived, or is on the CPU, in one dimension."""
        if id(number) not in self._numbers:
            return read_now(number)
        _, key, start = self._numbers[id(number)]
        return self.host_arrays[key][start : start + number.numel()].astype(np.float64)

    def reset(self) -> None:
        """Free all space, for the next step; everything has arrived."""
        self._used.clear()
        self._awaited.clear()
        self._numbers.clear()
        self._outgrown.clear()

    @property
    def bytes(self) -> int:
        """Return the size of the buffers on the devices."""
        return sum(tensor.nbytes for tensor in self.device.values())

    def _replaced(self) -> None:
        """A buffer was replaced by a larger one."""

    def _grow(self, sizes: dict[BufferKey, int]) -> None:
        """Enlarge the buffers where ``sizes`` more elements do not fit."""
        for key, size in sizes.items():
            used = self._used.get(key, 0)
            old = self.device.get(key)
            if old is not None and old.numel() >= used + size:
                continue
            capacity = max(used + size, 2 * old.numel() if old is not None else _CAPACITY)
            with torch.inference_mode(False):  # buffers that are made in inference mode are read-only outside of it
                # Not filled: a fill on this stream could come after what another stream writes.
                grown = torch.empty(capacity, dtype=key.dtype, device=key.device)
                self._host[key] = grown if key.device.type == "cpu" else _pinned(capacity, key.dtype)
            if old is not None:
                self._replaced()
                if used:
                    self._streams.join_streams(key.device)
                    grown[:used].copy_(old[:used])
                    self._outgrown.append(old)
            self.device[key] = grown
            self.host_arrays[key] = self._host[key].numpy()


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the CPU from which a copy to a device waits for nothing.

    A captured graph reads it again at each replay: keep it as long as what it is copied to.
    """
    return host if device.type == "cpu" else host.pin_memory()


def _pinned(elements: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=True)
