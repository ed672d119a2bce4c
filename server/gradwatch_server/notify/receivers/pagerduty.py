"""Receiver for PagerDuty, Events API version 2."""

from gradwatch_server.notify.http_client import HttpRequest
from gradwatch_server.notify.receivers.base import Notification, WebReceiver, ended_with_run, title

_DETAILS = ("cause", "remedy", "evidence", "parameters", "step")


class PagerDuty(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pagerduty"):
    """Triggers and resolves one PagerDuty incident per alert; a run that ends with the alert on leaves it open."""

    url: str = "https://events.pagerduty.com/v2/enqueue"
    """PagerDuty's URL; in Europe ``https://events.eu.pagerduty.com/v2/enqueue``."""
    routing_key: str
    """Key of the PagerDuty integration."""

    def request(self, notification: Notification, now: float) -> HttpRequest | None:
        """Return the request that sends a PagerDuty event; all notifications of an alert have the same dedup_key."""
        data = notification.data
        if ended_with_run(data):
            return None  # nothing got better: the incident stays as it is, and a closed one is not opened again
        return self.json_request(
            {
                "routing_key": self.routing_key,
                "event_action": "trigger" if data["state"] == "firing" else "resolve",
                "dedup_key": f"gradwatch-{data['id']}",
                "client": "gradwatch",
                "client_url": data["url"],
                "links": [{"href": data["url"], "text": f"step {data['step']}"}],
                "payload": {
                    "summary": f"{title(data)}: {data['summary']}"[:1024],
                    "source": f"{data['run']['project']}/{data['run']['name']}",
                    "severity": data["severity"],
                    "component": data["parameters"][0]["name"] if data["parameters"] else "",
                    "group": data["run"]["project"],
                    "class": data["rule"],
                    "custom_details": {name: data[name] for name in _DETAILS},
                },
            }
        )
