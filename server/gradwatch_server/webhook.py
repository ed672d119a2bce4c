"""One webhook, signed by Standard Webhooks 1.0.0 and posted once."""

import base64
import hashlib
import hmac
from dataclasses import dataclass

import httpx

from gradwatch_server.settings import Receiver, signing_key

TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Answer:
    """What came of one attempt."""

    status: int | None
    """HTTP status; none: there was no answer."""
    error: str = ""
    retry_after_seconds: float | None = None

    @property
    def delivered(self) -> bool:
        """True where the receiver took it."""
        return self.status is not None and 200 <= self.status < 300


def headers(receiver: Receiver, delivery_id: str, body: bytes, now: int) -> dict[str, str]:
    """Return the headers of a delivery: its id is the same in every attempt, the timestamp is the attempt's."""
    fields = {
        "content-type": "application/json",
        "user-agent": "gradwatch",
        "webhook-id": delivery_id,
        "webhook-timestamp": str(now),
    }
    if receiver.secret is not None:
        signed = f"{delivery_id}.{now}.".encode() + body
        digest = hmac.new(signing_key(receiver.secret), signed, hashlib.sha256).digest()
        fields["webhook-signature"] = "v1," + base64.b64encode(digest).decode()
    return fields


async def post(client: httpx.AsyncClient, receiver: Receiver, delivery_id: str, payload: str, now: float) -> Answer:
    """Post one delivery; redirects are not followed and no more than the status is read of the answer."""
    body = payload.encode()
    try:
        async with client.stream(
            "POST", receiver.url, content=body, headers=headers(receiver, delivery_id, body, int(now))
        ) as response:
            error = "" if response.is_success else f"HTTP {response.status_code} {response.reason_phrase}"
            return Answer(response.status_code, error, _seconds(response.headers.get("retry-after")))
    except httpx.HTTPError as error:
        return Answer(None, f"{type(error).__name__}: {error}"[:500])


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
