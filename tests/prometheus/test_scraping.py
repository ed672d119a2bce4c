"""A real Prometheus scrapes a real server; its rules tell a real Alertmanager."""

import math
import time
from pathlib import Path
from typing import Any

from gradwatch import wire
from tests.processes import ROOT, GradwatchServer, sample
from tests.prometheus.programs import Alertmanager, Prometheus, scraping, until

RULES = ROOT / "dashboards" / "prometheus"


def test_a_finished_run_is_gone_at_the_next_scrape(server: GradwatchServer, tmp_path: Path) -> None:
    run_id = server.register(name="short")
    server.store(run_id, wire.Batch(id="1", samples=[sample(7, 1, 1)]))
    with Prometheus(tmp_path / "prometheus", scraping(server.url)) as prometheus:
        step = f'gradwatch_run_step{{run="{run_id}"}}'
        (found,) = until(lambda: prometheus.query(step), "scraped run")
        assert found["value"][1] == "7"
        server.store(run_id, wire.Batch(id="2", end=wire.End(at=time.time())))
        # The server is scraped still: the series ends, not the scrapes.
        until(lambda: prometheus.query("up == 1") and not prometheus.query(step), "end of the series alone")


def test_an_unhealthy_run_reaches_alertmanager(server: GradwatchServer, tmp_path: Path) -> None:
    run_id = server.register(name="ill")
    server.store(run_id, wire.Batch(id="1", samples=[sample(1, math.nan, 1)]))
    with Alertmanager(tmp_path / "alertmanager", RULES / "alertmanager.yml") as alertmanager:
        more = (
            f"rule_files: ['{RULES / 'rules.yml'}']\n"
            f"alerting: {{alertmanagers: [{{static_configs: [{{targets: ['127.0.0.1:{alertmanager.port}']}}]}}]}}\n"
        )
        with Prometheus(tmp_path / "prometheus", scraping(server.url, more)):
            (alert,) = until(lambda: alertmanager.http.get("/api/v2/alerts").json(), "alert in Alertmanager")
    assert alert["labels"] == {
        "alertname": "GradwatchRunUnhealthy",
        "name": "ill",
        "project": "default",
        "run": run_id,
        "severity": "critical",
    }
    assert alert["annotations"]["summary"] == "Run ill (default) is unhealthy"
    assert alert["annotations"]["page"].endswith(f"/runs/{run_id}")
    assert alert["annotations"]["dashboard"].endswith(f"/d/gradwatch-run?var-run={run_id}")


def test_prometheus_own_alert_is_inhibited_where_gradwatch_sends_one_of_the_run(tmp_path: Path) -> None:
    def state(alerts: list[dict[str, Any]], name: str, run: str) -> str:
        (found,) = [alert for alert in alerts if (alert["labels"]["alertname"], alert["labels"]["run"]) == (name, run)]
        return str(found["status"]["state"])

    with Alertmanager(tmp_path / "alertmanager", RULES / "alertmanager.yml") as alertmanager:
        sent = [("gradwatch_nonfinite", "ill"), ("GradwatchRunUnhealthy", "ill"), ("GradwatchRunUnhealthy", "other")]
        alerts = [{"labels": {"alertname": name, "run": run}} for name, run in sent]
        alertmanager.http.post("/api/v2/alerts", json=alerts).raise_for_status()

        def states() -> list[str] | None:
            known = alertmanager.http.get("/api/v2/alerts").json()
            found = [state(known, *each) for each in sent] if len(known) == 3 else ["unprocessed"]
            return None if "unprocessed" in found else found

        assert until(states, "states of the alerts") == ["active", "suppressed", "active"]
