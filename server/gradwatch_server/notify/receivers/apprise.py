"""Everything else that Apprise knows: an optional extra, ``pip install 'gradwatch[apprise]'``."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from gradwatch_server.notify.delivery_result import Answer
from gradwatch_server.notify.receivers.base import Message, Receiver, Way
from gradwatch_server.notify.receivers.chat import blamed, headline


class AppriseService(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="apprise"):
    """Hands a text to Apprise, which connects by itself: ``allow_networks`` has no say over it."""

    most_at_once: ClassVar[int] = 2

    urls: list[str]
    """Addresses as Apprise writes them, such as ``ntfy://topic``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("apprise") is None:
            raise ValueError(f"receiver {self.name!r} needs Apprise: pip install 'gradwatch[apprise]'")
        for number, url in enumerate(self.urls, 1):
            if not _service([url]):
                raise ValueError(f"receiver {self.name!r}: number {number} of urls is no address that Apprise knows")
        if not self.urls:
            raise ValueError(f"receiver {self.name!r}: urls is empty: name at least one address")

    def way(self, timeout_seconds: float, at_once: int) -> Way:
        """Return the way to it."""
        return _AppriseWay(self, timeout_seconds, at_once)


def _service(urls: list[str]) -> Any:
    """Return Apprise with those of the addresses that it knows."""
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # its lines carry addresses with their secrets
    service = apprise.Apprise()
    for url in urls:
        service.add(url)
    return service


class _AppriseWay:
    def __init__(self, receiver: AppriseService, timeout_seconds: float, at_once: int) -> None:
        self._service = _service(receiver.urls)
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="gradwatch-apprise")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take nothing more; what hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, message: Message, now: float) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                loop = asyncio.get_running_loop()
                taken = await loop.run_in_executor(self._threads, self._notify, message)
        except TimeoutError:
            return Answer(None, f"no answer within {self._timeout_seconds:g} s (delivery.timeout_seconds)")
        return Answer(200) if taken else Answer(None, "Apprise could not deliver it")

    def _notify(self, message: Message) -> bool:
        data = message.data
        lines = [data["summary"], *blamed(data), data["cause"], data["remedy"], data["url"]]
        return bool(self._service.notify(title=headline(data), body="\n".join(line for line in lines if line)))
