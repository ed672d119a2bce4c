"""Every kind of receiver, over real sockets: what arrives is what that kind reads."""

import email
import email.policy
import json
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from standardwebhooks import Webhook

from gradwatch import wire
from tests.processes import GradwatchServer, WebhookReceiver, sample

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


def until(seen: Callable[[], Any], seconds: float = 30) -> Any:
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


class MailServer:
    """An SMTP server that takes what it is given, and refuses one recipient for good."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        mails = self.mails

        class Session(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                self.say("220 here")
                while line := self.rfile.readline().decode().strip():
                    verb = line.split(":")[0].upper()
                    if verb == "DATA":
                        self.take()
                    elif verb == "RCPT TO" and "nobody" in line:
                        self.say("550 no such user")
                    else:
                        self.say("250 fine" if verb != "QUIT" else "221 bye")

            def say(self, text: str) -> None:
                self.wfile.write(text.encode() + b"\r\n")

            def take(self) -> None:
                self.say("354 go on")
                lines = []
                while (line := self.rfile.readline()) != b".\r\n":
                    lines.append(line)
                mails.append(email.message_from_bytes(b"".join(lines), EmailMessage, policy=email.policy.default))
                self.say("250 taken")

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session)
        self.port = self._server.server_address[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_mail_arrives_and_a_refused_recipient_is_final(tmp_path: Path) -> None:
    with MailServer() as smtp:
        text = "".join(
            f'[[receivers]]\nname = "{name}"\ntype = "email"\nhost = "localhost"\nport = {smtp.port}\n'
            f'security = "none"\n'
            f'sender = "gradwatch@example.com"\nto = ["{to}@example.com"]\n'
            f'allow_networks = ["127.0.0.0/8", "::1/128"]\n'
            for name, to in (("team", "team"), ("lost", "nobody"))
        )
        with configured(tmp_path, text) as server:
            fall_ill(server)
            mail = until(lambda: smtp.mails)[0]
            assert mail["Subject"] == "CRITICAL: nonfinite in vision / res<net>"
            assert mail["To"] == "team@example.com"
            assert "first.weight: NaN" in mail.get_content()
            until(lambda: server.get("/api/v1/deliveries", receiver="lost", state="dead"))
            assert len(smtp.mails) == 1


@contextmanager
def alertmanager(folder: Path, webhook: str) -> Iterator[str]:
    """Run Debian's Alertmanager, which tells this webhook, and return its address."""
    program = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    assert program is not None, "prometheus-alertmanager is not on the PATH: .ci/system says how to install it"
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
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


@pytest.mark.skipif(
    not os.environ.get("CI") and not (shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")),
    reason="prometheus-alertmanager is not installed: apt-get install prometheus-alertmanager",
)
def test_a_real_alertmanager_receives_groups_resolves_and_is_reminded(tmp_path: Path) -> None:
    with WebhookReceiver() as told, alertmanager(tmp_path, told.url) as address:
        config = (
            f'[[receivers]]\nname = "am"\ntype = "alertmanager"\nurl = "{address}"\nresend_seconds = 0.5\n{LOOPBACK}\n'
        )
        with configured(tmp_path, config) as server:
            runs = [fall_ill(server, "vision", name) for name in ("one", "two")]

            def known() -> list[dict[str, Any]]:
                alerts: list[dict[str, Any]] = httpx.get(f"{address}/api/v2/alerts", trust_env=False).json()
                return sorted(alerts, key=lambda alert: str(alert["labels"]["run_name"]))

            alerts = until(lambda: known() if len(known()) == 2 else None)
            assert [alert["labels"]["run"] for alert in alerts] == runs
            assert alerts[0]["annotations"]["severity"] == "critical"
            first = alerts[0]["updatedAt"]
            until(lambda: known()[0]["updatedAt"] > first)
            messages = [json.loads(body) for _, body in told.wait(1)]
            assert messages[0]["groupLabels"] == {"project": "vision"}
            for run in runs:
                get_well(server, run)
            until(lambda: json.loads(told.requests[-1][1])["status"] == "resolved")
            (last,) = [json.loads(told.requests[-1][1])]
            assert {alert["labels"]["run"] for alert in last["alerts"]} <= set(runs)
