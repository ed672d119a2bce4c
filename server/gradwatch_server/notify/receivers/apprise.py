"""Receiver for all services that Apprise supports; needs the optional extra ``pip install 'gradwatch[apprise]'``."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from gradwatch_server.notify.http_client import DeliveryResult, timed_out
from gradwatch_server.notify.receivers.base import Notification, Receiver, Transport, parameter_lines, title


class AppriseService(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="apprise"):
    """Sends a text with Apprise, which opens its own connections: ``allow_networks`` does not restrict them."""

    most_at_once: ClassVar[int] = 2

    urls: list[str]
    """Apprise URLs, such as ``ntfy://topic``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("apprise") is None:
            raise ValueError(f"receiver {self.name!r} needs Apprise: pip install 'gradwatch[apprise]'")
        for number, url in enumerate(self.urls, 1):
            if not _apprise([url]):
                raise ValueError(f"receiver {self.name!r}: number {number} of urls is no address that Apprise knows")
        if not self.urls:
            raise ValueError(f"receiver {self.name!r}: urls is empty: name at least one address")

    def transport(self, timeout_seconds: float, at_once: int) -> Transport:
        """Return a new transport over Apprise."""
        return _AppriseTransport(self, timeout_seconds, at_once)


def _apprise(urls: list[str]) -> Any:
    """Return an ``apprise.Apprise`` with those of the URLs that Apprise understands."""
    import apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)  # its lines carry URLs with their secrets
    made = apprise.Apprise()
    for url in urls:
        made.add(url)
    return made


class _AppriseTransport:
    def __init__(self, receiver: AppriseService, timeout_seconds: float, at_once: int) -> None:
        self._apprise = _apprise(receiver.urls)
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="gradwatch-apprise")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Start nothing more, and do not wait for a thread that hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, notification: Notification, now: float) -> DeliveryResult:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                loop = asyncio.get_running_loop()
                sent = await loop.run_in_executor(self._threads, self._notify, notification)
        except TimeoutError:
            return timed_out(self._timeout_seconds)
        return DeliveryResult(200) if sent else DeliveryResult(None, "Apprise could not deliver it")

    def _notify(self, notification: Notification) -> bool:
        data = notification.data
        lines = [data["summary"], *parameter_lines(data), data["cause"], data["remedy"], data["url"]]
        return bool(self._apprise.notify(title=title(data), body="\n".join(filter(None, lines)), body_format="text"))
