"""What every receiver has, and the shape of a way to it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import urlsplit

import msgspec

from gradwatch_server.notify.address_guard import Guard, parse_networks
from gradwatch_server.notify.delivery_result import Answer
from gradwatch_server.notify.http_client import Letter, Postman


@dataclass(frozen=True)
class Message:
    """One transition on its way to one receiver."""

    id: str
    """The same in every attempt."""
    payload: str
    """The JSON of docs/alert.schema.json."""
    created_at: float
    """When the transition was written, by the server's clock, Unix seconds."""

    @property
    def data(self) -> dict[str, Any]:
        """What the payload says of the alert."""
        data: dict[str, Any] = msgspec.json.decode(self.payload)["data"]
        return data


class Way(Protocol):
    """An open way to a receiver; an asynchronous context manager."""

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(self, *_: object) -> None:
        """Close it."""

    async def send(self, message: Message, now: float) -> Answer:
        """Try once; never raises for what the receiver or the network does."""


class Receiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Where transitions of alerts are delivered."""

    most_at_once: ClassVar[int] = 1_000
    """Deliveries that its way can carry at once; ``delivery.at_once`` may allow fewer."""

    name: str
    """How routes, the API and the log call it."""
    allow_networks: list[str] = []
    """Private networks that this receiver may be in, such as ``10.0.0.0/8``; public addresses need none."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a receiver has an empty name: give each its own")
        try:
            parse_networks(self.allow_networks)
        except ValueError as error:
            raise ValueError(f"receiver {self.name!r}: allow_networks: {error}") from None

    def way(self, timeout_seconds: float, at_once: int) -> Way:
        """Return the way to it."""
        raise NotImplementedError


class WebReceiver(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver that takes an HTTP POST."""

    url: str
    """Its http or https address; it is never logged or shown."""
    headers: dict[str, str] = {}
    """Further request headers, such as ``Authorization``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and self.url.isascii()
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(f"receiver {self.name!r}: url is not an http or https address in ASCII")
        shown = f"{parts.scheme}://{parts.hostname}"
        for name, value in self.headers.items():
            if not (name + value).isascii() or not (name + value).isprintable():
                raise ValueError(f"receiver {self.name!r}: header {name!r} has a character that no header may have")
        if parts.username or parts.password:
            raise ValueError(f"receiver {self.name!r}: url {shown} has a password in it: put it into headers instead")

    def letter(self, message: Message, now: float) -> Letter:
        """Return what is posted for a transition."""
        raise NotImplementedError

    def way(self, timeout_seconds: float, at_once: int) -> Way:
        """Return the way to it."""
        return _WebWay(self, Postman(Guard(self.allow_networks), timeout_seconds, at_once))

    def json_letter(self, content: object, url: str | None = None) -> Letter:
        """Return a letter with a JSON body."""
        fields = {"content-type": "application/json", **self.headers}
        return Letter(url or self.url, msgspec.json.encode(content), fields)


class _WebWay:
    def __init__(self, receiver: WebReceiver, postman: Postman) -> None:
        self._receiver = receiver
        self._postman = postman

    async def __aenter__(self) -> Self:
        await self._postman.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._postman.__aexit__()

    async def send(self, message: Message, now: float) -> Answer:
        return await self._postman.post(self._receiver.letter(message, now))
