"""Receivers for Prometheus Alertmanager, and for webhooks that read Alertmanager's own webhook format."""

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from gradwatch_server.notify.http_client import HttpRequest
from gradwatch_server.notify.receivers.base import Notification, WebReceiver, worst_parameters

_LESS_SEVERE = {"critical": ("warning",), "warning": ()}
_NEVER = "0001-01-01T00:00:00Z"


class Alertmanager(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alertmanager"):
    """Posts to Alertmanager's API (``/api/v2/alerts`` below ``url``).

    Alertmanager keeps alerts in memory only, so the notifier repeats firing alerts, and resolved ones for 5 minutes.
    """

    resend_seconds: float = 60.0
    """How often alerts are sent again; Alertmanager takes an alert for resolved after four times as long without it."""
    grafana_url: str = ""
    """Address of the Grafana with the boards, for the annotation ``dashboard``; empty: it is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resend_seconds <= 0:
            raise ValueError(f"receiver {self.name!r}: resend_seconds is {self.resend_seconds}: more than 0 is needed")

    def request(self, notification: Notification, now: float) -> HttpRequest:
        """Return the request that posts one alert."""
        return self.batch_request([notification], now)

    def batch_request(self, notifications: list[Notification], now: float) -> HttpRequest:
        """Return the request that posts several alerts."""
        url = self.url.rstrip("/") + "/api/v2/alerts"
        return self.json_request([alert for each in notifications for alert in self._alerts(each, now)], url)

    def _alerts(self, notification: Notification, now: float) -> list[dict[str, Any]]:
        """Return the alert, and the ends of those that it has been with other severities: they differ in a label."""
        data, created_at = notification.data, notification.created_at
        firing = data["state"] == "firing"
        alert = {
            "labels": labels(data),
            "annotations": annotations(data, self.grafana_url),
            "startsAt": _time(min(data["fired_at"] or created_at, created_at)),
            "endsAt": _time(now + 4 * self.resend_seconds if firing else created_at),
            "generatorURL": data["url"],
        }
        may_have_been_less = not firing or data["step"] != data["fired_step"]
        return [alert] + [
            alert | {"labels": labels(data) | {"severity": severity}, "endsAt": _time(created_at)}
            for severity in _LESS_SEVERE[data["severity"]]
            if may_have_been_less
        ]


class AlertmanagerWebhook(
    WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alertmanager-webhook"
):
    """Posts Alertmanager's webhook format, version 4, so that receivers written for Alertmanager work unchanged."""

    def request(self, notification: Notification, now: float) -> HttpRequest:
        """Return the request that posts Alertmanager's document with one alert."""
        data = notification.data
        firing = data["state"] == "firing"
        named, noted = labels(data), annotations(data)
        alert = {
            "status": data["state"],
            "labels": named,
            "annotations": noted,
            "startsAt": _time(data["fired_at"] or notification.created_at),
            "endsAt": _NEVER if firing else _time(data["resolved_at"] or notification.created_at),
            "generatorURL": data["url"],
            "fingerprint": data["fingerprint"],
        }
        group = {"alertname": named["alertname"], "run": named["run"]}
        key = ", ".join(f'{name}="{value}"' for name, value in group.items())
        return self.json_request(
            {
                "version": "4",
                "groupKey": f"{{}}:{{{key}}}",
                "truncatedAlerts": 0,
                "status": data["state"],
                "receiver": self.name,
                "groupLabels": group,
                "commonLabels": named,
                "commonAnnotations": noted,
                "externalURL": data["url"].partition("/runs/")[0],
                "alerts": [alert],
            }
        )


def labels(data: dict[str, Any]) -> dict[str, str]:
    """Return the labels that identify an alert, and by which it is routed: another severity makes it another alert."""
    run = data["run"]
    return {
        "alertname": "gradwatch_" + data["rule"],
        "rule": data["rule"],
        "project": run["project"],
        "run": run["id"],
        "run_name": run["name"],
        "severity": data["severity"],
    }


def annotations(data: dict[str, Any], grafana_url: str = "") -> dict[str, str]:
    """Return the annotations that describe an alert, with the addresses of the run's page and, if known, its board."""
    worst, left_out = worst_parameters(data)
    names = ", ".join(parameter["name"] for parameter in worst)
    board = f"{grafana_url.rstrip('/')}/d/gradwatch-run?var-run={quote(data['run']['id'])}"
    return {
        "summary": data["summary"],
        "description": f"{data['cause']} {data['remedy']}",
        "page": data["url"],
        "step": str(data["step"]),
        "parameters": names + (f" and {left_out} more" if left_out else ""),
    } | ({"dashboard": board} if grafana_url else {})


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
