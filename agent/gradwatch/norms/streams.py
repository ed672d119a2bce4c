"""Streams of accelerators: which are in use, which captures a graph, and one that comes after all that were used."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def current_stream(device: torch.device) -> torch.Stream | None:
    """Return the current stream of a device; None on the CPU, and on a device whose streams torch does not tell."""
    if device.type == "cpu":
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return None
    return torch.accelerator.current_stream(device)


def is_capturing(stream: torch.Stream) -> bool:
    """Return whether a stream, the current one of its device, captures a graph; nothing must wait on it then."""
    if hasattr(stream, "is_capturing") and stream.is_capturing():
        return True
    ask = getattr(torch.get_device_module(stream.device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def captures(device: torch.device) -> bool:
    """Return whether the current stream of a device captures a graph."""
    stream = current_stream(device)
    return stream is not None and is_capturing(stream)


def stream_ids(devices: Iterable[torch.device]) -> tuple[int, ...]:
    """Return what tells the current streams of some devices from others; memory is shared only within them."""
    streams = (current_stream(device) for device in devices)
    return tuple(0 if stream is None else stream.stream_id for stream in streams)


class StreamLog:
    """The streams that one training has used since its last step was sent to the host."""

    def __init__(self) -> None:
        self.used: dict[torch.device, dict[int, torch.Stream]] = {}
        """Device -> stream id -> stream; no device where everything is on the CPU."""
        self._own: dict[torch.device, torch.Stream] = {}

    def add_devices(self, devices: Iterable[torch.device]) -> None:
        """Note the streams of these devices from now on."""
        for device in devices:
            if device.type not in ("cpu", "meta"):
                self.used.setdefault(device, {})

    def enter(self) -> bool:
        """Note the current streams; return False if one of them captures a graph, so that nothing may be launched."""
        for device, used in self.used.items():
            stream = current_stream(device)
            if stream is None:
                continue
            if is_capturing(stream):
                return False
            used[stream.stream_id] = stream
        return True

    def join_streams(self, device: torch.device) -> None:
        """Let the current stream of a device wait for all others that were used; the host does not wait."""
        current = current_stream(device)
        if current is None:
            return
        for stream in self.used.get(device, {}).values():
            if stream.stream_id != current.stream_id:
                current.wait_stream(stream)

    @contextmanager
    def after_all(self, device: torch.device) -> Iterator[None]:
        """Launch what follows behind all that was launched on the streams that were used; nobody waits.

        Where there was more than one, this is done on a stream of the agent's own: the training's streams stay
        independent of each other.
        """
        current = current_stream(device)
        used = self.used.setdefault(device, {})
        if current is None or used.keys() <= {current.stream_id}:
            yield
            used.clear()
            return
        own = self._own.get(device)
        if own is None:
            own = self._own[device] = torch.Stream(device)
        for stream in (current, *used.values()):
            own.wait_stream(stream)
        used.clear()
        index = torch.accelerator.current_device_index()
        torch.accelerator.set_stream(own)
        try:
            yield
        finally:
            torch.accelerator.set_stream(current)
            torch.accelerator.set_device_index(index)
