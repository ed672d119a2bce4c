"""Everything else that Apprise knows: an optional extra, ``pip install 'gradwatch[apprise]'``."""

import asyncio
from importlib.util import find_spec
from typing import Self

from gradwatch_server.answer import Answer
from gradwatch_server.receivers.base import Message, Receiver, Way
from gradwatch_server.receivers.chat import blamed, headline


class AppriseService(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="apprise"):
    """Hands a text to Apprise, which connects by itself: ``allow_networks`` has no say over it."""

    urls: list[str]
    """Addresses as Apprise writes them, such as ``ntfy://topic``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("apprise") is None:
            raise ValueError(f"receiver {self.name!r} needs Apprise: pip install 'gradwatch[apprise]'")

    def way(self, timeout_seconds: float, at_once: int) -> Way:
        """Return the way to it."""
        return _AppriseWay(self, timeout_seconds)


class _AppriseWay:
    def __init__(self, receiver: AppriseService, timeout_seconds: float) -> None:
        self._receiver = receiver
        self._timeout_seconds = timeout_seconds

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Apprise keeps nothing open."""

    async def send(self, message: Message, now: float) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                taken = await asyncio.to_thread(self._notify, message)
        except TimeoutError:
            return Answer(None, f"no answer within {self._timeout_seconds:g} s (delivery.timeout_seconds)")
        return Answer(200) if taken else Answer(None, "Apprise could not deliver it")

    def _notify(self, message: Message) -> bool:
        import apprise

        service = apprise.Apprise()
        for url in self._receiver.urls:
            service.add(url)
        data = message.data
        lines = [data["summary"], *blamed(data), data["cause"], data["remedy"], data["url"]]
        return bool(service.notify(title=headline(data), body="\n".join(line for line in lines if line)))
