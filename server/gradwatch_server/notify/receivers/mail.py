"""Receiver for e-mail, sent by SMTP."""

import asyncio
import logging
import smtplib
import socket
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import Any, ClassVar, Literal, Self

from gradwatch_server.notify.address_guard import AddressGuard
from gradwatch_server.notify.http_client import DeliveryResult, timed_out
from gradwatch_server.notify.receivers.base import Notification, Receiver, Transport, parameter_lines, title

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
        if (self.username is None) != (self.password is None):
            raise ValueError(f"receiver {self.name!r}: username and password go together: give both or neither")

    def transport(self, timeout_seconds: float, at_once: int) -> Transport:
        """Return a new transport over SMTP."""
        return SmtpTransport(self, AddressGuard(self.allow_networks), timeout_seconds, at_once)

    def mail(self, notification: Notification, now: float) -> EmailMessage:
        """Return the mail for a notification; the mails of one alert form one thread."""
        data = notification.data
        mail = EmailMessage()
        mail["From"], mail["To"], mail["Subject"] = self.sender, ", ".join(self.to), _one_line(title(data))
        mail["Date"] = format_datetime(datetime.fromtimestamp(now, UTC))
        mail["Message-ID"] = f"<{notification.id}@gradwatch>"
        mail["References"] = f"<{data['id']}@gradwatch>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n\n".join(_paragraphs(data)) + "\n")
        return mail


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _paragraphs(data: dict[str, Any]) -> list[str]:
    paragraphs = [data["summary"], "\n".join(parameter_lines(data))]
    if data["state"] == "firing":
        paragraphs += ["Cause: " + data["cause"], "Remedy: " + data["remedy"]]
    else:
        paragraphs.append(data["resolution"] or "")
    return [paragraph for paragraph in [*paragraphs, data["url"]] if paragraph]


class _Dialogue:
    """One connection to a mail server, which the event loop can end while a thread speaks over it.

    A thread cannot be cancelled: one that went on after its time would have the mail sent that is then tried again.
    """

    def __init__(self) -> None:
        self._line: socket.socket | None = None
        self._ended = False
        self._lock = threading.Lock()

    def opened(self, connection: socket.socket) -> None:
        """Take note of the connection; raises TimeoutError where the dialogue has been ended before it was there."""
        with self._lock:
            if self._ended:
                connection.close()
                raise TimeoutError
            self._line = connection.dup()  # TLS takes the connection itself over

    def end(self) -> None:
        """Cut the connection: whoever still reads or writes gets an error, a mail that is not whole is not taken."""
        with self._lock:
            self._ended = True
            if self._line is not None:
                with suppress(OSError):  # it is closed already
                    self._line.shutdown(socket.SHUT_RDWR)
                self._line.close()
                self._line = None


class _Smtp(smtplib.SMTP):
    """Speaks over a connection to a checked address, while certificates are checked for the host's name."""

    def __init__(
        self,
        to: Email,
        addresses: Sequence[str],
        timeout_seconds: float,
        dialogue: _Dialogue,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._addresses = addresses
        self._dialogue = dialogue
        self._tls = tls
        super().__init__(to.host, to.port, timeout=timeout_seconds)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = self._connect(port, timeout / len(self._addresses))
        connection.settimeout(timeout)
        self._dialogue.opened(connection)
        return connection if self._tls is None else self._tls.wrap_socket(connection, server_hostname=host)

    def _connect(self, port: int, timeout: float) -> socket.socket:
        """Connect to the first of the checked addresses that takes the connection."""
        for address in self._addresses[:-1]:
            with suppress(OSError):
                return socket.create_connection((address, port), timeout)
        return socket.create_connection((self._addresses[-1], port), timeout)


class SmtpTransport:
    """Sends mails in threads, each over a connection of its own to an address that the guard allows."""

    def __init__(self, receiver: Email, guard: AddressGuard, timeout_seconds: float, at_once: int) -> None:
        self._receiver = receiver
        self._guard = guard
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="gradwatch-mail")

    async def __aenter__(self) -> Self:
        """Return the transport."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take nothing more; what hangs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def send(self, notification: Notification, now: float) -> DeliveryResult:
        """Send the mail once."""
        dialogue = _Dialogue()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                addresses = await self._guard.resolve(self._receiver.host, self._receiver.port)
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._threads, self._send, dialogue, addresses, notification, now)
        except smtplib.SMTPResponseException as error:
            said = error.smtp_error if isinstance(error.smtp_error, str) else error.smtp_error.decode(errors="replace")
            permanent = error.smtp_code >= 500 and not isinstance(error, smtplib.SMTPAuthenticationError)
            return DeliveryResult(422 if permanent else None, f"SMTP {error.smtp_code} {said}"[:500])
        except smtplib.SMTPRecipientsRefused as error:
            permanent = all(code >= 500 for code, _ in error.recipients.values())
            return DeliveryResult(422 if permanent else None, f"SMTP: all recipients refused: {len(error.recipients)}")
        except TimeoutError:
            return timed_out(self._timeout_seconds)
        except (OSError, smtplib.SMTPException) as error:
            return DeliveryResult(None, f"{type(error).__name__}: {error}"[:500])
        finally:
            dialogue.end()
        return DeliveryResult(250)

    def _send(self, dialogue: _Dialogue, addresses: Sequence[str], notification: Notification, now: float) -> None:
        to = self._receiver
        context = None if to.security == "none" else ssl.create_default_context()
        over_tls = context if to.security == "tls" else None
        with _Smtp(to, addresses, self._timeout_seconds, dialogue, over_tls) as smtp:
            if to.security == "starttls":
                smtp.starttls(context=context)
            if to.username is not None and to.password is not None:
                smtp.login(to.username, to.password)
            refused = smtp.send_message(to.mail(notification, now))
        if refused:  # others have it: sent again, they would have it twice
            log.warning("receiver %s: the mail server takes nothing for %s", to.name, ", ".join(refused))
