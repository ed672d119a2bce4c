"""The commands for alerts, silences and receivers, and the configuration read again."""

import base64
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from gradwatch import wire
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, environment, sample, wait_for

NAN = float("nan")


def command(*arguments: str, code: int = 0, url: str = "") -> str:
    """Run the command; return what it prints."""
    ran = subprocess.run(
        [sys.executable, "-m", "gradwatch", *arguments],
        env=environment(GRADWATCH_URL=url),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def hook(name: str, url: str, more: str = 'allow_networks = ["127.0.0.0/8"]') -> str:
    return f'[[receivers]]\nname = "{name}"\ntype = "webhook"\nurl = "{url}"\n{more}\n'


def test_alerts_and_silences_from_the_command_line(server: GradwatchServer) -> None:
    assert "no alerts" in command("alerts", url=server.url)
    run = server.register(["a"])
    server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
    (alert,) = server.get("/api/v1/alerts")
    assert f"{alert['id']}  firing    critical  nonfinite" in command("alerts", "--state", "firing", url=server.url)
    assert "acknowledged by kim" in command("alerts", "--ack", alert["id"], "--author", "kim", url=server.url)
    listed = command("alerts", "--state", "firing", url=server.url)
    assert f"acknowledged by kim {time.strftime('%Y-%m-%d')}" in listed
    assert "is no longer acknowledged" in command("alerts", "--unack", alert["id"], url=server.url)
    assert "409" in command("alerts", "--unack", alert["id"], url=server.url, code=1)
    added = command("silence", "--for", "2h", "--rule", "dead", "--author", "kim", url=server.url)
    (silence,) = server.get("/api/v1/silences")
    assert 7_000 < silence["ends_at"] - time.time() < 7_300
    assert (silence["rule"], silence["author"]) == ("dead", "kim")
    assert command("silence", url=server.url) == added
    assert "has ended" in command("silence", "--end", silence["id"], url=server.url)
    assert "404" in command("silence", "--end", silence["id"], url=server.url, code=1)
    assert "is not a duration: write 30m" in command("silence", "--for", "soon", url=server.url, code=2)
    assert "is the server running?" in command("alerts", url="http://127.0.0.1:1", code=1)
    assert "'http://127.0.0.1:abc' is not the address of a server" in command(
        "alerts", url="http://127.0.0.1:abc", code=1
    )


def test_a_reader_that_has_seen_enough(server: GradwatchServer) -> None:
    run = server.register(["a"])
    server.store(run, wire.Batch(id="b", samples=[sample(step, 1.0) for step in range(1, 2_000)]))
    for arguments in (["alerts"], ["export", run, "--database-url", f"sqlite:///{server.database}"]):
        with subprocess.Popen(
            [sys.executable, "-m", "gradwatch", *arguments],
            env=environment(GRADWATCH_URL=server.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            running.stdout.close()
            said = running.stderr.read()
        assert (running.returncode, "roken pipe" in said, "Traceback" in said) == (1, False, False), said


def test_a_receiver_is_tested_before_it_is_needed(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    with WebhookReceiver(statuses=[204, 403]) as receiver:
        config.write_text(hook("ops", receiver.url + "?key=hidden") + hook("public", receiver.url, ""))
        assert "ops: delivered, status 204" in command("receivers", "test", "ops", "--config", str(config))
        assert json.loads(receiver.requests[0][1])["data"]["run"]["project"] == "test"
        assert "ops: refused, status 403" in command("receivers", "test", "ops", "--config", str(config), code=1)
        refused = command("receivers", "test", "public", "--config", str(config), code=1)
        assert "has the loopback address 127.0.0.1" in refused
        assert "hidden" not in refused
        missing = command("receivers", "test", "nobody", "--config", str(config), code=1)
        assert "has no receiver 'nobody'; it has: ops, public" in missing


WRONG = [
    ('[[routes]]\nreceivers = ["third"]\n', "a route names receiver 'third'"),
    (hook("second", "https://example.com/"), "two receivers are named 'second'"),
    (hook("other", "https://example.com/", 'secret = "env:NOT_THERE"'), "the environment variable 'NOT_THERE' is not"),
    ("[delivery]\nlease_seconds = 1\n", "must be more than delivery.timeout_seconds"),
    ("[rules.exploding]\nno_such_key = 1\n", "no_such_key"),
    ("[unheard_of]\n", "unknown field `unheard_of`"),
    ("[delivery\n", "gradwatch.toml: "),
]
"""What is wrong with a file, of which everything else is right, and what the log says of it."""


def test_sighup_reads_the_configuration_again_whole_or_not_at_all(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    with WebhookReceiver() as first, WebhookReceiver() as second:
        config.write_text(hook("first", first.url + "?key=hidden"))
        with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
            for wrong, reason in WRONG:
                config.write_text(hook("second", second.url) + wrong)
                _reload(server, reason)
            _fall_ill(server)
            first.wait(1)
            config.write_text(hook("second", second.url))
            _reload(server, "configuration reloaded")
            assert "second  webhook  in use  0 due  0 dead" in command("receivers", url=server.url)
            _fall_ill(server)
            second.wait(1)
            assert len(first.requests) == 1
            assert "hidden" not in server.log.read_text()


def test_sighup_that_comes_while_the_server_starts_does_not_end_it(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("")
    command = [sys.executable, "-m", "gradwatch", "serve", "--port", "0", "--config", str(config)]
    with (tmp_path / "log").open("wb") as log:
        serving = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=log)
    assert serving.stdout is not None
    with serving.stdout:
        assert serving.stdout.readline().startswith(b"gradwatch serves on")
        serving.send_signal(signal.SIGHUP)
        wait_for(tmp_path / "log", "configuration reloaded")
    serving.terminate()
    assert serving.wait(30) == 0


def test_sighup_without_the_file_of_a_secret_keeps_the_configuration(tmp_path: Path) -> None:
    secret, log = tmp_path / "secret", tmp_path / "log"
    secret.write_text("whsec_" + base64.b64encode(b"x" * 32).decode())
    command = [sys.executable, "-m", "gradwatch", "serve", "--port", "0", "--webhook", "http://127.0.0.1:9/hook"]
    variables = environment(GRADWATCH_WEBHOOK_SECRET_FILE=str(secret))
    with log.open("wb") as written:
        serving = subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=written)
    assert serving.stdout is not None
    with serving.stdout:
        assert serving.stdout.readline().startswith(b"gradwatch serves on")
        away = secret.rename(tmp_path / "away")
        serving.send_signal(signal.SIGHUP)
        wait_for(log, f"reload failed, keeping the previous configuration: GRADWATCH_WEBHOOK_SECRET_FILE={secret}")
        away.rename(secret)
        serving.send_signal(signal.SIGHUP)
        wait_for(log, "configuration reloaded")
    serving.terminate()
    assert serving.wait(PATIENCE_SECONDS) == 0
    assert "Traceback" not in log.read_text()


def _fall_ill(server: GradwatchServer) -> None:
    server.store(server.register(["a"]), wire.Batch(id="b", samples=[sample(1, NAN)]))


def _reload(server: GradwatchServer, logged: str) -> None:
    server.process.send_signal(signal.SIGHUP)
    wait_for(server.log, logged)
