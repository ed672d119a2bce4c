"""Every kind of receiver, over real sockets: what arrives is what that kind reads."""

import asyncio
import email
import email.policy
import json
import shutil
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import trustme
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from standardwebhooks import Webhook

from gradwatch import wire
from gradwatch_server.cli.receivers import _test_payload
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.notify.http_client import AddressGuard, DeliveryResult
from gradwatch_server.notify.receivers import Email, Notification
from gradwatch_server.notify.receivers.mail import SmtpTransport
from gradwatch_server.settings import Configuration
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, free_port, run_apart, sample, wait_for
from tests.server.hook import settled

NAN = float("nan")
LOOPBACK = 'allow_networks = ["127.0.0.0/8"]'
OLD, NEW = ("whsec_" + secret * 11 + "=" for secret in ("b2xk", "bmV3"))


@contextmanager
def configured(folder: Path, text: str) -> Iterator[GradwatchServer]:
    """Run a server with this configuration."""
    config = folder / "gradwatch.toml"
    config.write_text(text)
    with GradwatchServer(folder / "gradwatch.db", "--config", str(config)) as server:
        yield server


def until(seen: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Ask again and again until there is something to see."""
    deadline = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < deadline, "it has not been seen in time"
        threading.Event().wait(0.05)
    return found


def fall_ill(server: GradwatchServer, project: str = "vision", name: str = "res<net>") -> str:
    """Register a run and send it a sample that is not finite."""
    run = server.register(["first.weight"], project=project, name=name)
    server.store(run, wire.Batch(id="ill", samples=[sample(1, 1.0), sample(2, NAN)]))
    return run


def get_well(server: GradwatchServer, run: str) -> None:
    """Send the run samples that are well."""
    server.store(run, wire.Batch(id="well", samples=[sample(step, 1.0) for step in range(3, 12)]))


def test_each_kind_of_web_receiver_gets_its_own_form(tmp_path: Path) -> None:
    with WebhookReceiver() as slack, WebhookReceiver() as teams, WebhookReceiver() as pager, WebhookReceiver() as old:
        config = "\n".join(
            f'[[receivers]]\nname = "{kind}"\ntype = "{kind}"\nurl = "{url}"\n{LOOPBACK}\n{more}'
            for kind, url, more in (
                ("slack", slack.url, ""),
                ("teams", teams.url, ""),
                ("pagerduty", pager.url, 'routing_key = "key"'),
                ("alertmanager-webhook", old.url, ""),
            )
        )
        with configured(tmp_path, config) as server:
            run = fall_ill(server)
            get_well(server, run)
            said = [json.loads(body) for _, body in slack.wait(2)]
            assert said[0]["text"] == "CRITICAL: nonfinite in vision / res&lt;net&gt;"
            assert "first.weight: NaN" in said[0]["blocks"][0]["text"]["text"]
            assert said[1]["text"].startswith("RESOLVED")
            card = json.loads(teams.wait(2)[0][1])["attachments"][0]
            assert card["contentType"] == "application/vnd.microsoft.card.adaptive"
            assert card["content"]["actions"][0]["url"].startswith(server.url)
            events = [json.loads(body) for _, body in pager.wait(2)]
            assert [event["event_action"] for event in events] == ["trigger", "resolve"]
            assert events[0]["dedup_key"] == events[1]["dedup_key"]
            assert (events[0]["routing_key"], events[0]["payload"]["severity"]) == ("key", "critical")
            assert _read_as_alertmanager(old.wait(2)[0][1]) == ("firing", "gradwatch_nonfinite", run)
            assert _read_as_alertmanager(old.wait(2)[1][1]) == ("resolved", "gradwatch_nonfinite", run)


def test_a_run_that_ends_with_an_alert_on_is_not_resolved_for_people(tmp_path: Path) -> None:
    """Chat says so, and the pager's incident stays open."""
    with WebhookReceiver() as slack, WebhookReceiver() as teams, WebhookReceiver() as pager:
        config = "\n".join(
            f'[[receivers]]\nname = "{kind}"\ntype = "{kind}"\nurl = "{url}"\n{LOOPBACK}\n{more}'
            for kind, url, more in (
                ("slack", slack.url, ""),
                ("teams", teams.url, ""),
                ("pagerduty", pager.url, 'routing_key = "key"'),
            )
        )
        with configured(tmp_path, config) as server:
            run = fall_ill(server, name="resnet")
            server.store(run, wire.Batch(id="end", end=wire.End(at=5.0, status="failed")))
            text = json.loads(slack.wait(2)[1][1])
            assert text["text"] == "ENDED WITH THE ALERT ON: nonfinite in vision / resnet"
            assert "the run has ended: failed" in text["blocks"][0]["text"]["text"]
            card = json.loads(teams.wait(2)[1][1])["attachments"][0]["content"]
            assert card["body"][0]["color"] == "Attention"
            settled(server)
            assert [json.loads(body)["event_action"] for _, body in pager.wait(1)] == ["trigger"]


def _read_as_alertmanager(body: bytes) -> tuple[str, str, str]:
    """Read as a receiver written for Alertmanager does: by its documented fields, every one of them required."""
    message = json.loads(body)
    assert message["version"] == "4"
    assert set(message) == {
        *("version", "groupKey", "truncatedAlerts", "status", "receiver", "groupLabels", "commonLabels"),
        *("commonAnnotations", "externalURL", "alerts"),
    }
    (alert,) = message["alerts"]
    assert set(alert) == {
        *("status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"),
    }
    assert alert["status"] == message["status"]
    return message["status"], alert["labels"]["alertname"], alert["labels"]["run"]


def test_while_a_secret_is_rotated_both_sign(tmp_path: Path) -> None:
    with WebhookReceiver() as receiver:
        config = f'[[receivers]]\nname = "hook"\ntype = "webhook"\nurl = "{receiver.url}"\n{LOOPBACK}\n'
        with configured(tmp_path, config + f'secret = "{NEW}"\nprevious_secret = "{OLD}"') as server:
            fall_ill(server)
            headers, body = receiver.wait(1)[0]
            for secret in (OLD, NEW):
                assert Webhook(secret).verify(body, headers)["type"] == "alert.firing"


def test_routes_choose_by_project_rule_and_severity(tmp_path: Path) -> None:
    with WebhookReceiver() as vision, WebhookReceiver() as others:
        receivers = "".join(
            f'[[receivers]]\nname = "{name}"\ntype = "webhook"\nurl = "{url}"\n{LOOPBACK}\n'
            for name, url in (("vision", vision.url), ("others", others.url))
        )
        routes = (
            '[[routes]]\nreceivers = ["vision"]\nprojects = ["vis*"]\nrules = ["nonfinite"]\n'
            'severities = ["critical"]\n'
            '[[routes]]\nreceivers = ["others"]\nprojects = ["audio"]\n'
        )
        with configured(tmp_path, receivers + routes) as server:
            seen = {project: fall_ill(server, project) for project in ("vision", "audio", "text")}
            get_well(server, seen["vision"])
            assert {json.loads(body)["data"]["run"]["id"] for _, body in vision.wait(2)} == {seen["vision"]}
            assert {json.loads(body)["data"]["run"]["id"] for _, body in others.wait(1)} == {seen["audio"]}
            assert len(server.get("/api/v1/alerts")) == 3


class Mails:
    """What an SMTP server has been given."""

    def __init__(self) -> None:
        self.taken: list[EmailMessage] = []

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address.startswith("nobody"):
            return "550 no such user"
        if address.startswith("busy") and not self.taken:
            return "450 try again later"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content
        assert isinstance(content, bytes)
        self.taken.append(email.message_from_bytes(content, EmailMessage, policy=email.policy.default))
        return "250 OK"


def _let_in(server: SMTP, session: Session, envelope: Envelope, mechanism: str, given: LoginPassword) -> AuthResult:
    return AuthResult(success=(given.login, given.password) == (b"gradwatch", b"hidden"))


@contextmanager
def mail_server(
    tls: ssl.SSLContext | None = None, mails: Mails | None = None, **options: Any
) -> Iterator[tuple[Mails, int]]:
    """Run aiosmtpd; where ``tls`` is given, from the first byte on."""
    mails, loop = mails or Mails(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening = loop.create_server(lambda: SMTP(mails, loop=loop, **options), "127.0.0.1", 0, ssl=tls)
    serving = asyncio.run_coroutine_threadsafe(listening, loop).result()
    try:
        yield mails, serving.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_stop(serving), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(serving: asyncio.Server) -> None:
    """End a server and what it is still doing."""
    serving.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def mail_receiver(name: str, port: int, security: str, more: str = "") -> str:
    return (
        f'[[receivers]]\nname = "{name}"\ntype = "email"\nhost = "localhost"\nport = {port}\nsecurity = "{security}"\n'
        f'sender = "gradwatch@example.com"\nto = ["{name}@example.com"]\n'
        f'allow_networks = ["127.0.0.0/8", "::1/128"]\n{more}\n'
    )


def test_mail_arrives_a_busy_server_is_asked_again_and_a_refused_recipient_is_final(tmp_path: Path) -> None:
    with mail_server() as (mails, port):
        text = "[delivery]\nretry_seconds = [0.1, 0.1, 0.1, 1, 2, 5, 10, 20]\n"
        text += "".join(mail_receiver(name, port, "none") for name in ("team", "busy", "nobody"))
        text = text.replace('["team@example.com"]', '["team@example.com", "nobody@example.com"]')
        with configured(tmp_path, text) as server:
            fall_ill(server)
            taken = until(lambda: mails.taken if len(mails.taken) == 2 else None)
            mail = next(mail for mail in taken if mail["To"].startswith("team@example.com"))
            assert mail["Subject"] == "CRITICAL: nonfinite in vision / res<net>"
            assert mail["Message-ID"].startswith("<msg_")
            assert "first.weight: NaN" in mail.get_content()
            (lost,) = until(lambda: server.get("/api/v1/deliveries", receiver="nobody", state="dead"))
            assert lost["attempts"] == 1
            wait_for(server.log, "receiver team: the mail server takes nothing for nobody@example.com")
            assert len(mails.taken) == 2


class SlowMails(Mails):
    """A mail server that takes its time before each answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        await asyncio.sleep(self._seconds)
        return await super().handle_RCPT(server, session, envelope, address, options)


def test_a_mail_server_that_is_too_slow_gets_no_mail(tmp_path: Path) -> None:
    """It answers each of two recipients within the time of an attempt, and both of them not."""
    with mail_server(mails=SlowMails(0.7)) as (mails, port):
        text = "[delivery]\ntimeout_seconds = 1.0\nretry_seconds = [0.1]\n" + mail_receiver("team", port, "none")
        text = text.replace('["team@example.com"]', '["team@example.com", "other@example.com"]')
        with configured(tmp_path, text) as server:
            fall_ill(server)
            (lost,) = until(lambda: server.get("/api/v1/deliveries", state="dead"))
            assert lost["attempts"] == 2
            assert "no answer within 1 s (delivery.timeout_seconds)" in lost["error"] or "timed out" in lost["error"]
            threading.Event().wait(2)
            assert mails.taken == []


def send_mail(
    port: int,
    payload: str | None = None,
    timeout_seconds: float = 5.0,
    security: Literal["starttls", "none"] = "none",
    allow_networks: Sequence[str] = ("127.0.0.0/8",),
    afterwards: Callable[[], None] = lambda: None,
) -> DeliveryResult:
    """Send one mail to a host with two addresses, of which nobody listens at the first; do more in the same loop."""

    async def addresses(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    async def send() -> DeliveryResult:
        to = Email(name="team", host="mail", port=port, security=security, sender="a@example.com", to=["b@example.com"])
        now = time.time()
        async with SmtpTransport(to, AddressGuard(allow_networks, addresses), timeout_seconds) as transport:
            result = await transport.send(Notification("msg_1", payload or _test_payload(now), now), now)
        await asyncio.to_thread(afterwards)
        return result

    return run_apart(send())


def test_mail_goes_to_the_first_address_of_its_host_that_answers() -> None:
    with mail_server() as (mails, port):
        assert send_mail(port) == DeliveryResult(250)
        assert [mail["To"] for mail in mails.taken] == ["b@example.com"]


def test_mail_is_not_sent_to_a_refused_address_or_without_the_required_encryption() -> None:
    with mail_server() as (mails, port):
        assert "AddressRefused" in send_mail(port, allow_networks=()).error
        assert "STARTTLS" in send_mail(port, security="starttls").error
        assert mails.taken == []


@contextmanager
def stalling_mail_server() -> Iterator[tuple[Callable[[], bytes], int]]:
    """Listen for one mail, of whose text nothing is read at first; yield what reads it to its end."""

    def serve() -> bytes:
        connection, _ = listening.accept()
        connection.settimeout(PATIENCE_SECONDS)
        with connection, connection.makefile("rb") as lines, suppress(ConnectionError):
            connection.sendall(b"220 ready\r\n")
            while (line := lines.readline()) != b"DATA\r\n":
                connection.sendall(b"250 OK\r\n")
                assert line, "closed before the text"
            connection.sendall(b"354 go on\r\n")
            assert resume.wait(PATIENCE_SECONDS)
            received.extend(iter(lines.readline, b""))
        return b"".join(received)

    def read() -> bytes:
        resume.set()
        return serving.result()

    resume, received = threading.Event(), list[bytes]()
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as thread:
        serving = thread.submit(serve)
        yield read, listening.getsockname()[1]
        read()


def test_nothing_more_of_a_mail_is_sent_after_its_time_limit() -> None:
    """The text is larger than what the system takes at once, so that most of it waits here when the time is over."""
    payload = json.loads(_test_payload(time.time()))
    payload["data"]["cause"] = "A long story. " * 1_000_000
    received = []
    with stalling_mail_server() as (read, port):
        result = send_mail(
            port, json.dumps(payload), timeout_seconds=3.0, afterwards=lambda: received.append(len(read()))
        )
    assert result == DeliveryResult(None, "no answer within 3 s (delivery.timeout_seconds)")
    assert received[0] < len(payload["data"]["cause"])


def test_mail_is_encrypted_and_the_certificate_is_checked(tmp_path: Path, authority: trustme.CA) -> None:
    login = 'username = "gradwatch"\npassword = "hidden"'
    asked: Any = {"require_starttls": True, "authenticator": _let_in, "auth_required": True}
    with (
        mail_server(tls_context=certified(authority, "localhost"), **asked) as (upgraded, first),
        mail_server(certified(authority, "localhost")) as (encrypted, second),
        mail_server(certified(authority, "elsewhere.example")) as (wrong, third),
        mail_server(tls_context=certified(authority, "elsewhere.example")) as (wrong_too, fourth),
    ):
        text = "[delivery]\nretry_seconds = []\n"
        text += mail_receiver("upgraded", first, "starttls", login) + mail_receiver("encrypted", second, "tls")
        text += mail_receiver("wrong", third, "tls") + mail_receiver("wrong-too", fourth, "starttls")
        with configured(tmp_path, text) as server:
            fall_ill(server)
            until(lambda: upgraded.taken and encrypted.taken)
            for name in ("wrong", "wrong-too"):
                (lost,) = until(partial(server.get, "/api/v1/deliveries", receiver=name, state="dead"))
                assert "certificate is not valid for 'localhost'" in lost["error"]
            assert wrong.taken == wrong_too.taken == []
            assert "hidden" not in server.log.read_text()


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """A certificate authority that the servers of a test trust, and nobody else."""
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return made


def certified(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    """Return the server's side of TLS with a certificate for these names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def test_https_is_checked_for_the_name_and_not_the_address(tmp_path: Path, authority: trustme.CA) -> None:
    with (
        WebhookReceiver(tls=certified(authority, "localhost")) as right,
        WebhookReceiver(tls=certified(authority, "elsewhere.example")) as wrong,
    ):
        text = "[delivery]\nretry_seconds = []\n" + "".join(
            f'[[receivers]]\nname = "{name}"\ntype = "webhook"\nurl = "{hook.url.replace("127.0.0.1", "localhost")}"\n'
            'allow_networks = ["127.0.0.0/8", "::1/128"]\n'
            for name, hook in (("right", right), ("wrong", wrong))
        )
        with configured(tmp_path, text) as server:
            fall_ill(server)
            right.wait(1)
            (lost,) = until(lambda: server.get("/api/v1/deliveries", receiver="wrong", state="dead"))
            assert "certificate is not valid for 'localhost'" in lost["error"]
            assert wrong.requests == []


def test_apprise_carries_it_to_a_service_of_its_own(tmp_path: Path) -> None:
    with WebhookReceiver(statuses=[500, 200]) as service:
        target = service.url.replace("http://", "json://") + "?rto=60&cto=60"
        text = (
            f'[delivery]\nretry_seconds = [0.1]\n[[receivers]]\nname = "rest"\ntype = "apprise"\nurls = ["{target}"]\n'
        )
        with configured(tmp_path, text) as server:
            fall_ill(server)
            told = json.loads(service.wait(2)[1][1])
            assert told["title"] == "CRITICAL: nonfinite in vision / res<net>"
            assert "first.weight: NaN" in told["message"]
            (delivery,) = until(lambda: server.get("/api/v1/deliveries", state="delivered"))
            assert delivery["attempts"] == 2


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ('type = "webhook"\nurl = "ftp://example.com"', "url is not an http or https address"),
        ('type = "webhook"\nurl = "https://example.com:99999/"', "url is not an http or https address"),
        ('type = "webhook"\nurl = "https://ex\u00e4mple.com/"', "url is not an http or https address in ASCII"),
        ('type = "webhook"\nurl = "https://kim:hidden@example.com/"', "has a password in it: put it into headers"),
        ('type = "webhook"\nurl = "https://a.example/"\nheaders = { X = "a\\nb" }', "header 'X' has a character"),
        ('type = "webhook"\nurl = "https://a.example/"\nsecret = "whsec_c2hvcnQ="', "24 to 64 bytes in base64"),
        (f'type = "webhook"\nurl = "https://a.example/"\nprevious_secret = "{OLD}"', "previous_secret without secret"),
        ('type = "webhook"\nurl = "https://a.example/"\nallow_networks = ["10/8"]', "allow_networks: '10/8'"),
        ('type = "webhook"', "missing required field `url`"),
        ('type = "carrier-pigeon"', "Invalid value 'carrier-pigeon'"),
        ('type = "email"\nhost = "a.example"\nsender = "a@b.c"\nto = []', "to is empty"),
        (
            'type = "email"\nhost = "a.example"\nsender = "a@b.c\\nBcc: x@y.z"\nto = ["d@e.f"]',
            "that no header may have",
        ),
        ('type = "apprise"\nurls = ["hidden://nothing"]', "number 1 of urls is no address that Apprise knows"),
        ('type = "alertmanager"\nurl = "http://a.example/"\nresend_seconds = 0', "resend_seconds is 0.0"),
        ('type = "webhook"\nurl = "https://a.example/"\nsecret = "env:NOT_SET"', "variable 'NOT_SET' is not set"),
    ],
)
@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # where Apprise looks for its services
def test_what_is_wrong_with_a_receiver_is_said_before_it_is_used(tmp_path: Path, fields: str, refusal: str) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text(f'[[receivers]]\nname = "it"\n{fields}\n')
    with pytest.raises(ConfigurationError) as refused:
        Configuration.load(config)
    assert refusal in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_an_alertmanager_is_reminded_of_firing_alerts_and_for_5_minutes_of_resolved_ones(tmp_path: Path) -> None:
    with WebhookReceiver(statuses=[200]) as heard:
        address = heard.url.removesuffix("/hook")
        text = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 0.2\n{LOOPBACK}\n'
        )
        with configured(tmp_path, text) as server:
            run = fall_ill(server)
            said = [json.loads(body)[0] for _, body in heard.wait(4)]
            assert {entry["labels"]["run"] for entry in said} == {run}
            assert len({entry["startsAt"] for entry in said}) == 1
            assert len({entry["endsAt"] for entry in said}) == 4, "each time it ends a while after it was said"
            get_well(server, run)
            until(lambda: len({json.loads(body)[0]["endsAt"] for _, body in heard.requests[-3:]}) == 1)
            until(lambda: len(server.get("/api/v1/deliveries", state="delivered")) == 2)
            with closing(sqlite3.connect(server.database, timeout=PATIENCE_SECONDS)) as connection, connection:
                connection.execute("UPDATE deliveries SET delivered_at = delivered_at - 301")
            until(lambda: _quiet(heard))


def test_an_alertmanager_is_reminded_of_a_warning_while_its_critical_notification_fails(tmp_path: Path) -> None:
    with WebhookReceiver(statuses=[200]) as heard:
        address = heard.url.removesuffix("/hook")
        text = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 0.2\n{LOOPBACK}\n'
        )
        with configured(tmp_path, "[delivery]\nretry_seconds = [60]\n" + text) as server:
            run = server.register(["first.weight"])
            server.store(run, wire.Batch(id="worrying", samples=[sample(1, 1.0, loss=NAN)]))
            until(lambda: server.get("/api/v1/deliveries", state="delivered"))
            heard.statuses = [503]
            server.store(run, wire.Batch(id="ill", samples=[sample(2, NAN, loss=NAN)]))
            until(lambda: [each["attempts"] for each in server.get("/api/v1/deliveries", state="due")] == [1])
            heard.statuses = [200]
            said = [json.loads(body)[0] for _, body in heard.wait(len(heard.requests) + 4)[-3:]]
            assert {entry["labels"]["severity"] for entry in said} == {"warning"}
            assert len({entry["endsAt"] for entry in said}) == 3, "it is not over"


def test_an_alertmanager_is_not_reminded_of_a_resolved_alert_that_fires_again(tmp_path: Path) -> None:
    with WebhookReceiver(statuses=[200]) as heard:
        address = heard.url.removesuffix("/hook")
        text = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 0.2\n{LOOPBACK}\n'
        )
        with configured(tmp_path, text) as server:
            run = fall_ill(server)
            get_well(server, run)
            until(lambda: len(server.get("/api/v1/deliveries", state="delivered")) == 2)
            server.store(run, wire.Batch(id="again", samples=[sample(20, NAN)]))
            until(lambda: len(server.get("/api/v1/deliveries", state="delivered")) == 3)
            said = [json.loads(body) for _, body in heard.wait(len(heard.requests) + 5)[-4:]]
            assert [len(entries) for entries in said] == [1] * 4
            assert len({entries[0]["endsAt"] for entries in said}) == 4, "it is not over"


def _quiet(heard: WebhookReceiver) -> bool:
    """Return whether five intervals pass without a request."""
    before = len(heard.requests)
    threading.Event().wait(1)
    return len(heard.requests) == before


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """Run Debian's Alertmanager, which tells this webhook, and return its address."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    assert program is not None, "prometheus-alertmanager is not on the PATH: .ci/system says how to install it"
    address = f"127.0.0.1:{free_port()}"
    config = folder / "alertmanager.yml"
    config.write_text(
        "route: {receiver: hook, group_by: [project], group_wait: 1s, group_interval: 1s}\n"
        f"receivers: [{{name: hook, webhook_configs: [{{url: '{webhook}'}}]}}]\n"
    )
    command = [program, f"--config.file={config}", f"--web.listen-address={address}", "--cluster.listen-address="]
    with (folder / "alertmanager.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.path={folder / 'am'}"], stdout=log, stderr=log)
    try:
        until(lambda: _answers(f"http://{address}/-/ready"))
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_real_alertmanager_receives_groups_resolves_and_is_reminded(tmp_path: Path) -> None:
    with WebhookReceiver() as told, alertmanager(tmp_path, told.url) as address:
        config = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 2\n{LOOPBACK}\n'
            'grafana_url = "https://grafana.example/"\n'
        )
        with configured(tmp_path, config) as server:
            runs = [fall_ill(server, "vision", name) for name in ("one", "two")]

            def known() -> list[dict[str, Any]]:
                answer = httpx.get(f"{address}/api/v2/alerts", timeout=PATIENCE_SECONDS, trust_env=False)
                alerts: list[dict[str, Any]] = answer.json()
                return sorted(alerts, key=lambda alert: str(alert["labels"]["run_name"]))

            alerts = until(lambda: found if len(found := known()) == 2 else None)
            assert [alert["labels"]["run"] for alert in alerts] == runs
            assert alerts[0]["labels"]["severity"] == "critical"
            assert alerts[0]["annotations"]["dashboard"] == f"https://grafana.example/d/gradwatch-run?var-run={runs[0]}"
            assert alerts[0]["annotations"]["page"].startswith(f"{server.url}/runs/{runs[0]}")
            first = alerts[0]["updatedAt"]
            until(lambda: (found := known()) and found[0]["updatedAt"] > first)
            messages = [json.loads(body) for _, body in told.wait(1)]
            assert messages[0]["groupLabels"] == {"project": "vision"}
            for run in runs:
                get_well(server, run)
            until(lambda: json.loads(told.requests[-1][1])["status"] == "resolved")
            (last,) = [json.loads(told.requests[-1][1])]
            assert {alert["labels"]["run"] for alert in last["alerts"]} <= set(runs)


def test_a_real_alertmanager_shows_an_alert_that_became_critical_once(tmp_path: Path) -> None:
    with WebhookReceiver() as told, alertmanager(tmp_path, told.url) as address:
        config = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 0.2\n{LOOPBACK}\n'
        )
        with configured(tmp_path, config) as server:

            def severities() -> list[str]:
                answer = httpx.get(f"{address}/api/v2/alerts", timeout=PATIENCE_SECONDS, trust_env=False)
                return sorted(alert["labels"]["severity"] for alert in answer.json())

            run = server.register(["first.weight"])
            server.store(run, wire.Batch(id="worrying", samples=[sample(1, 1.0, loss=NAN)]))
            until(lambda: severities() == ["warning"])
            server.store(run, wire.Batch(id="ill", samples=[sample(2, NAN, loss=NAN)]))
            until(lambda: "critical" in severities())
            assert severities() == ["critical"], "the warning has ended in the same request"
            get_well(server, run)
            until(lambda: severities() == [])
