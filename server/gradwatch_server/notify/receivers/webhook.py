"""A webhook, signed by Standard Webhooks 1.0.0."""

import base64
import binascii
import hashlib
import hmac

from gradwatch_server.notify.http_client import Letter
from gradwatch_server.notify.receivers.base import Message, WebReceiver


class Webhook(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="webhook"):
    """Posts the payload of docs/alerts.md, signed by Standard Webhooks 1.0.0."""

    secret: str | None = None
    """``whsec_`` and 24 to 64 random bytes in base64; absent: the webhook is not signed."""
    previous_secret: str | None = None
    """The secret before this one: while it is rotated, both sign."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for secret in (self.secret, self.previous_secret):
            if secret is not None:
                signing_key(secret)
        if self.previous_secret is not None and self.secret is None:
            raise ValueError(f"receiver {self.name!r}: previous_secret without secret: give the new one as secret")

    def letter(self, message: Message, now: float) -> Letter:
        """Return the signed body: its id is the same in every attempt, the timestamp is the attempt's."""
        body, timestamp = message.payload.encode(), str(int(now))
        fields = {
            "content-type": "application/json",
            **self.headers,
            "webhook-id": message.id,
            "webhook-timestamp": timestamp,
        }
        secrets = [secret for secret in (self.secret, self.previous_secret) if secret is not None]
        if secrets:
            signed = f"{message.id}.{timestamp}.".encode() + body
            fields["webhook-signature"] = " ".join(_signature(secret, signed) for secret in secrets)
        return Letter(self.url, body, fields)


def _signature(secret: str, signed: bytes) -> str:
    digest = hmac.new(signing_key(secret), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def signing_key(secret: str) -> bytes:
    """Return the key bytes of a Standard Webhooks secret.

    Raises:
        ValueError: the secret is not ``whsec_`` followed by base64 of 24 to 64 bytes.
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError(
            "a webhook secret is 'whsec_' followed by 24 to 64 bytes in base64: "
            "make one with: echo whsec_$(openssl rand -base64 32)"
        )
    return key
