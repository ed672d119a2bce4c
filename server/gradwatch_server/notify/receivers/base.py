"""Base of every receiver: its settings, the notification it is sent, and the transport that sends it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self
from urllib.parse import urlsplit

import msgspec

from gradwatch_server.diagnosis.rules import stalled
from gradwatch_server.notify.http_client import AddressGuard, DeliveryResult, HttpClient, HttpRequest, parse_networks
from gradwatch_server.plain_text import visible_document
from gradwatch_server.store.runs import RUN_ENDED

_MOST_PARAMETERS = 5


@dataclass(frozen=True)
class Notification:
    """One transition of an alert, to be sent to one receiver."""

    id: str
    """The id of the delivery; every attempt has the same."""
    payload: str
    """A JSON document of docs/alert.schema.json."""
    created_at: float
    """When the transition was written, by the server's clock, Unix seconds."""

    @property
    def data(self) -> dict[str, Any]:
        """Return the payload's object ``data``, which describes the alert, with texts that are safe to show."""
        data: dict[str, Any] = visible_document(msgspec.json.decode(self.payload)["data"])
        return data


class Transport(Protocol):
    """Sends notifications to one receiver; an asynchronous context manager that owns the connections."""

    async def __aenter__(self) -> Self:
        """Return the transport."""

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""

    async def send(self, notification: Notification, now: float) -> DeliveryResult:
        """Attempt to send once; never raises for an error of the receiver or the network."""


class Receiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Settings of a receiver that every type has."""

    most_at_once: ClassVar[int] = 1_000
    """Most deliveries that its transport can send at the same time; ``delivery.at_once`` may allow fewer."""

    name: str
    """Name of the receiver in routes, in the API and in the log."""
    allow_networks: list[str] = []
    """Private networks in which this receiver may be, such as ``10.0.0.0/8``; public addresses are always allowed."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a receiver has an empty name: give each its own")
        try:
            parse_networks(self.allow_networks)
        except ValueError as error:
            raise ValueError(f"receiver {self.name!r}: allow_networks: {error}") from None

    def transport(self, timeout_seconds: float, at_once: int) -> Transport:
        """Return a new transport.

        Args:
            timeout_seconds: longest time that one attempt may take.
            at_once: most attempts at the same time.
        """
        raise NotImplementedError


class WebReceiver(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A receiver that takes an HTTP POST."""

    url: str
    """Its http or https URL, which is never logged or shown."""
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

    def request(self, notification: Notification, now: float) -> HttpRequest | None:
        """Return the request that sends a notification at ``now``, Unix seconds; None: it has nothing to say of it."""
        raise NotImplementedError

    def transport(self, timeout_seconds: float, at_once: int) -> Transport:
        """Return a new transport over HTTP."""
        return _HttpTransport(self, HttpClient(AddressGuard(self.allow_networks), timeout_seconds, at_once))

    def json_request(self, content: object, url: str | None = None) -> HttpRequest:
        """Return a request with a JSON body, to the receiver's URL unless another one is given."""
        fields = {"content-type": "application/json", **self.headers}
        return HttpRequest(url or self.url, msgspec.json.encode(content), fields)


class _HttpTransport:
    def __init__(self, receiver: WebReceiver, client: HttpClient) -> None:
        self._receiver = receiver
        self._client = client

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.__aexit__()

    async def send(self, notification: Notification, now: float) -> DeliveryResult:
        request = self._receiver.request(notification, now)
        if request is None:
            return DeliveryResult(204, text="nothing to send")
        return await self._client.post(request)


def ended_with_run(data: dict[str, Any]) -> bool:
    """Return whether an alert was resolved only because its run ended: nothing got better."""
    over = data["state"] == "resolved" and (data["resolution"] or "").startswith(RUN_ENDED)
    return over and data["rule"] != stalled.RULE.name  # a run that has ended is no longer silent


def title(data: dict[str, Any]) -> str:
    """Return one line that says which alert fires or is resolved, such as "CRITICAL: nonfinite in vision / resnet"."""
    run = data["run"]
    state = "RESOLVED" if data["state"] == "resolved" else data["severity"].upper()
    if ended_with_run(data):
        state = "ENDED WITH THE ALERT ON"
    return f"{state}: {data['rule']} in {run['project']} / {run['name']}"


def worst_parameters(data: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Return the alert's first five parameters, the worst ones, and the number of further parameters."""
    worst = data["parameters"][:_MOST_PARAMETERS]
    return worst, data["parameters_left_out"] + len(data["parameters"]) - len(worst)


def parameter_lines(data: dict[str, Any]) -> list[str]:
    """Return one line for each of the worst parameters, with its value, and one that counts the others."""
    worst, left_out = worst_parameters(data)
    lines = [f"{parameter['name']}: {_rounded(parameter['value'])}" for parameter in worst]
    return [*lines, f"and {left_out} more"] if left_out else lines


def _rounded(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"
