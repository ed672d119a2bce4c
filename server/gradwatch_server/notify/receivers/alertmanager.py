"""Prometheus Alertmanager, and webhooks that read what Alertmanager sends."""

from datetime import UTC, datetime
from typing import Any

from gradwatch_server.notify.http_client import Letter
from gradwatch_server.notify.receivers.base import Message, WebReceiver

_NEVER = "0001-01-01T00:00:00Z"


class Alertmanager(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alertmanager"):
    """Posts to Alertmanager's API (``/api/v2/alerts`` below ``url``).

    Alertmanager keeps alerts in memory and forgets them: what fires is sent again, and what was resolved for 5 minutes.
    """

    resend_seconds: float = 60.0
    """How often; Alertmanager takes an alert for resolved that it has not heard of for four times as long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resend_seconds <= 0:
            raise ValueError(f"receiver {self.name!r}: resend_seconds is {self.resend_seconds}: more than 0 is needed")

    def letter(self, message: Message, now: float) -> Letter:
        """Return the alert as Alertmanager's API takes it."""
        return self.digest([message], now)

    def digest(self, messages: list[Message], now: float) -> Letter:
        """Return several alerts as one request."""
        url = self.url.rstrip("/") + "/api/v2/alerts"
        return self.json_letter([self._posted(message, now) for message in messages], url)

    def _posted(self, message: Message, now: float) -> dict[str, Any]:
        data = message.data
        firing = data["state"] == "firing"
        ends_at = now + 4 * self.resend_seconds if firing else message.created_at
        return {
            "labels": labels(data),
            "annotations": annotations(data),
            "startsAt": _time(min(data["fired_at"] or message.created_at, message.created_at)),
            "endsAt": _time(ends_at),
            "generatorURL": data["url"],
        }


class AlertmanagerWebhook(
    WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alertmanager-webhook"
):
    """Posts what Alertmanager (version 4) posts to its webhooks, so that receivers written for it work unchanged."""

    def letter(self, message: Message, now: float) -> Letter:
        """Return Alertmanager's document with one alert in it."""
        data = message.data
        firing = data["state"] == "firing"
        named, noted = labels(data), annotations(data)
        alert = {
            "status": data["state"],
            "labels": named,
            "annotations": noted,
            "startsAt": _time(data["fired_at"] or message.created_at),
            "endsAt": _NEVER if firing else _time(data["resolved_at"] or message.created_at),
            "generatorURL": data["url"],
            "fingerprint": data["fingerprint"],
        }
        group = {"alertname": named["alertname"], "run": named["run"]}
        key = ", ".join(f'{name}="{value}"' for name, value in group.items())
        return self.json_letter(
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
    """Return what identifies an alert: the same while it lives, whatever becomes worse."""
    run = data["run"]
    return {
        "alertname": "gradwatch_" + data["rule"],
        "rule": data["rule"],
        "project": run["project"],
        "run": run["id"],
        "run_name": run["name"],
    }


def annotations(data: dict[str, Any]) -> dict[str, str]:
    """Return what is said of an alert."""
    worst = ", ".join(blame["name"] for blame in data["parameters"][:5])
    left_out = data["parameters_left_out"] + max(0, len(data["parameters"]) - 5)
    return {
        "summary": data["summary"],
        "description": f"{data['cause']} {data['remedy']}",
        "severity": data["severity"],
        "step": str(data["step"]),
        "parameters": worst + (f" and {left_out} more" if left_out else ""),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
