"""From a bad sample to a signed webhook at a real receiver."""

import base64
import json
import secrets
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from gradwatch import wire
from tests.processes import GradwatchServer, WebhookReceiver, sample
from tests.server.hook import settled

SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
NAN = float("nan")


def test_a_firing_and_a_resolved_alert_arrive_signed_and_in_order(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url, "--webhook-secret", SECRET) as server,
    ):
        run = server.register(["first.weight", "second.weight"], project="vision", name="resnet")
        server.store(run, wire.Batch(id="b1", samples=[sample(1, 1.0, 1.0), sample(2, NAN, 1.0)]))
        (headers, body) = receiver.wait(1)[0]
        firing = Webhook(SECRET).verify(body, headers)
        assert firing["type"] == "alert.firing"
        data = firing["data"]
        assert (data["rule"], data["severity"], data["step"]) == ("nonfinite", "critical", 2)
        assert data["run"] == {"id": run, "name": "resnet", "project": "vision"}
        assert data["parameters"][0] == {"name": "first.weight", "value": "NaN", "limit": "Infinity"}
        assert data["url"].startswith(f"{server.url}/runs/{run}")
        (alert,) = server.get("/api/v1/alerts", run=run)
        assert (alert["state"], alert["first_step"], alert["fired_step"]) == ("firing", 2, 2)
        assert server.get(f"/api/v1/runs/{run}")["firing"] == 1
        server.store(run, wire.Batch(id="b2", samples=[sample(step, 1.0, 1.0) for step in range(3, 9)]))
        headers, body = receiver.wait(2)[1]
        resolved = Webhook(SECRET).verify(body, headers)
        assert (resolved["type"], resolved["data"]["resolved_step"]) == ("alert.resolved", 7)
        assert server.get("/api/v1/alerts", run=run, state="firing") == []
        assert headers["webhook-id"] != receiver.requests[0][0]["webhook-id"]
        with pytest.raises(WebhookVerificationError):
            Webhook(SECRET).verify(body + b" ", headers)


def test_a_failed_delivery_is_retried_with_the_same_id(tmp_path: Path) -> None:
    with (
        WebhookReceiver(statuses=[500, 204]) as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register(["a"])
        server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
        first, second = receiver.wait(2)
        assert first[0]["webhook-id"] == second[0]["webhook-id"]
        assert first[1] == second[1]
        assert "webhook-signature" not in first[0]


def test_a_delivery_that_is_due_survives_kill_9(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[delivery]\nlease_seconds = 3\ntimeout_seconds = 2\n")
    with WebhookReceiver(statuses=[503, 204]) as receiver:
        options = ("--config", str(config), "--webhook", receiver.url)
        with GradwatchServer(tmp_path / "gradwatch.db", *options) as server:
            run = server.register(["a"])
            server.store(run, wire.Batch(id="b", samples=[sample(1, NAN)]))
            receiver.wait(1)
            server.kill()
            server.start()
            first, second = receiver.wait(2)
            assert first[0]["webhook-id"] == second[0]["webhook-id"]
        assert json.loads(second[1])["data"]["rule"] == "nonfinite"


def test_a_restart_in_the_middle_keeps_the_alert_and_does_not_repeat_it(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register(["a"])
        server.store(run, wire.Batch(id="b1", samples=[sample(1, NAN)]))
        receiver.wait(1)
        settled(server)
        server.kill()
        server.start()
        server.store(run, wire.Batch(id="b2", samples=[sample(2, NAN)]))
        server.store(run, wire.Batch(id="b3", end=wire.End(at=1_790_000_100.0)))
        (_, last) = receiver.wait(2)[1]
        assert json.loads(last)["data"]["resolution"] == "the run has ended: completed"
        assert len(server.get("/api/v1/alerts", run=run)) == 1
        assert len(receiver.requests) == 2


def test_a_run_that_ended_sick_says_what_it_ended_with(server: GradwatchServer) -> None:
    run = server.register(["a"])
    server.store(run, wire.Batch(id="b1", samples=[sample(1, NAN)]))
    running = server.get(f"/api/v1/runs/{run}")
    assert (running["firing"], running["worst_rule"], running["worst_severity"]) == (1, "nonfinite", "critical")
    server.store(run, wire.Batch(id="b2", end=wire.End(at=1_790_000_100.0)))
    ended = server.get(f"/api/v1/runs/{run}")
    assert (ended["firing"], ended["worst_rule"], ended["worst_severity"]) == (0, "nonfinite", "critical")
