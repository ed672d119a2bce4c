"""Receiver for e-mail, sent by SMTP."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from email.charset import BASE64, Charset
from email.header import Header
from email.message import EmailMessage
from email.policy import Policy
from email.utils import format_datetime
from typing import Any, ClassVar, Literal, Self, cast

import aiosmtplib

from gradwatch_server.notify.http_client import AddressGuard, DeliveryResult, timed_out
from gradwatch_server.notify.receivers.base import Notification, Receiver, Transport, parameter_lines, title

_MOST_ERROR_CHARACTERS = 500
_BASE64 = Charset("utf-8")
_BASE64.header_encoding = BASE64

log = logging.getLogger(__name__)


class Email(Receiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="email"):
    """Sends a plain-text mail through an SMTP server."""

    most_at_once: ClassVar[int] = 2

    host: str
    """Host name of the SMTP server."""
    port: int = 587
    """Port of the SMTP server."""
    security: Literal["starttls", "tls", "none"] = "starttls"
    """How the connection is encrypted; ``starttls`` and ``tls`` check the certificate of the server."""
    sender: str
    """The From address."""
    to: list[str]
    """The To addresses."""
    username: str | None = None
    """User name of the login; without it there is no login."""
    password: str | None = None
    """Password of the login."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.to:
            raise ValueError(f"receiver {self.name!r}: to is empty: name at least one address")
        for address in (self.sender, *self.to):
            if not address.isprintable():
                raise ValueError(f"receiver {self.name!r}: {address!r} has a character that no header may have")
        if (self.username is None) != (self.password is None):
            raise ValueError(f"receiver {self.name!r}: username and password go together: give both or neither")

    def transport(self, timeout_seconds: float, at_once: int) -> Transport:
        """Return a new transport over SMTP."""
        return SmtpTransport(self, AddressGuard(self.allow_networks), timeout_seconds)

    def mail(self, notification: Notification, now: float) -> EmailMessage:
        """Return the mail for a notification; the mails of one alert form one thread."""
        data = notification.data
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = self.sender, ", ".join(self.to), _Subject(title(data))
        mail["Date"] = format_datetime(datetime.fromtimestamp(now, UTC))
        mail["Message-ID"] = f"<{notification.id}@gradwatch>"
        mail["References"] = f"<{data['id']}@gradwatch>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n\n".join(_paragraphs(data)) + "\n")
        return mail


class _Subject(str):
    """A subject that is always written in encoded words.

    A header of the standard library decodes the encoded words that it is given, and versions of Python before 2024
    write a line break that comes out of one as it is. With ``name`` and ``fold`` this is a header object (see
    ``email.policy``), whose text is not parsed.
    """

    name = "Subject"

    def fold(self, *, policy: Policy) -> str:
        """Return the header's lines."""
        words = Header(self, _BASE64, header_name=self.name).encode(linesep=policy.linesep)
        return f"{self.name}: {words}{policy.linesep}"


def _paragraphs(data: dict[str, Any]) -> list[str]:
    paragraphs = [data["summary"], "\n".join(parameter_lines(data))]
    if data["state"] == "firing":
        paragraphs += ["Cause: " + data["cause"], "Remedy: " + data["remedy"]]
    else:
        paragraphs.append(data["resolution"] or "")
    return [paragraph for paragraph in [*paragraphs, data["url"]] if paragraph]


class SmtpTransport:
    """Sends each mail over a connection of its own, to an address that the guard allows."""

    def __init__(self, receiver: Email, guard: AddressGuard, timeout_seconds: float) -> None:
        self._receiver = receiver
        self._guard = guard
        self._timeout_seconds = timeout_seconds
        self._tls = ssl.create_default_context()

    async def __aenter__(self) -> Self:
        """Return the transport; it connects when it sends."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Do nothing: no connection outlives its mail."""

    async def send(self, notification: Notification, now: float) -> DeliveryResult:
        """Send the mail once; a reply of 5xx is final, except to a login."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                refused = await self._send(self._receiver.mail(notification, now))
        except aiosmtplib.SMTPResponseException as error:
            final = error.code >= 500 and not isinstance(error, aiosmtplib.SMTPAuthenticationError)
            text = f"SMTP {error.code} {error.message}"
            return DeliveryResult(422 if final else None, text[:_MOST_ERROR_CHARACTERS])
        except aiosmtplib.SMTPRecipientsRefused as error:
            final = all(each.code >= 500 for each in error.recipients)
            return DeliveryResult(422 if final else None, f"SMTP: all recipients refused: {len(error.recipients)}")
        except aiosmtplib.SMTPException as error:
            return _failed(error.__cause__ or error)  # the cause says more: which certificate is wrong, and why
        except TimeoutError:
            return timed_out(self._timeout_seconds)
        except OSError as error:
            return _failed(error)
        if refused:  # the other recipients have the mail: sent again, they would have it twice
            name = self._receiver.name
            log.warning("receiver %s: the mail server takes nothing for %s", name, ", ".join(refused))
        return DeliveryResult(250)

    async def _send(self, mail: EmailMessage) -> list[str]:
        """Send a mail over a new connection; return the recipients that the server refused."""
        to = self._receiver
        # 1. Connect to a checked address. The host's name goes along for the certificate to be checked against it.
        addresses = await self._guard.resolve(to.host, to.port)
        own_name = await asyncio.to_thread(socket.getfqdn)
        sock = await _connect(addresses, to.port, self._timeout_seconds / len(addresses))
        smtp = aiosmtplib.SMTP(
            sock=sock,
            hostname=to.host,
            local_hostname=_ehlo_name(own_name, sock),
            username=to.username,
            password=to.password,
            tls_context=self._tls,
            use_tls=to.security == "tls",
            start_tls=to.security == "starttls",
            timeout=None,  # the whole attempt has one limit
        )
        try:
            await smtp.connect()
            # 2. Once this returns, the server has the mail. What goes wrong afterwards is not an error.
            refused, _ = await smtp.send_message(mail)
            with suppress(aiosmtplib.SMTPException):
                await smtp.quit()
        finally:
            # 3. Where the attempt is cut off, drop what is still buffered: a mail that is tried again must not arrive.
            if smtp.transport is not None:
                cast("asyncio.WriteTransport", smtp.transport).abort()
        return list(refused)


async def _connect(addresses: Sequence[str], port: int, timeout_seconds: float) -> socket.socket:
    """Connect to the first of the addresses that accepts the connection; each has ``timeout_seconds``."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return await _connect_to(address, port, timeout_seconds)
    return await _connect_to(addresses[-1], port, timeout_seconds)


async def _connect_to(address: str, port: int, timeout_seconds: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ExitStack() as cleanup:
        sock = cleanup.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        async with asyncio.timeout(timeout_seconds):
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
        cleanup.pop_all()
        return sock


def _ehlo_name(own_name: str, sock: socket.socket) -> str:
    """Return this machine's name for EHLO: its domain name, or else an address literal (RFC 5321, section 4.1.3)."""
    address = str(sock.getsockname()[0])
    return own_name if "." in own_name else f"[{'IPv6:' if ':' in address else ''}{address}]"


def _failed(error: BaseException) -> DeliveryResult:
    return DeliveryResult(None, f"{type(error).__name__}: {error}"[:_MOST_ERROR_CHARACTERS])
