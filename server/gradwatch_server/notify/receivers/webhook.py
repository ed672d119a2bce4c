"""Receiver for webhooks, signed according to Standard Webhooks 1.0.0."""

import base64
import binascii
import hashlib
import hmac

from gradwatch_server.notify.http_client import HttpRequest
from gradwatch_server.notify.receivers.base import Notification, WebReceiver


class Webhook(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="webhook"):
    """Posts the payload of docs/alerts.md, signed according to Standard Webhooks 1.0.0."""

    secret: str | None = None
    """``whsec_`` and 24 to 64 random bytes in base64; without it the webhook is not signed."""
    previous_secret: str | None = None
    """The previous secret: while the secret is rotated, both sign."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for secret in (self.secret, self.previous_secret):
            if secret is not None:
                signing_key(secret)
        if self.previous_secret is not None and self.secret is None:
            raise ValueError(f"receiver {self.name!r}: previous_secret without secret: give the new one as secret")

    def request(self, notification: Notification, now: float) -> HttpRequest:
        """Return the signed request; every attempt has the same id, and the time of the attempt as its timestamp."""
        body, timestamp = notification.payload.encode(), str(int(now))
        fields = {
            "content-type": "application/json",
            **self.headers,
            "webhook-id": notification.id,
            "webhook-timestamp": timestamp,
        }
        secrets = [secret for secret in (self.secret, self.previous_secret) if secret is not None]
        if secrets:
            signed = f"{notification.id}.{timestamp}.".encode() + body
            fields["webhook-signature"] = " ".join(_signature(secret, signed) for secret in secrets)
        return HttpRequest(self.url, body, fields)


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
