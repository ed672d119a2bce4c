"""PagerDuty, Events API version 2."""

from gradwatch_server.notify.http_client import Letter
from gradwatch_server.notify.receivers.base import Message, WebReceiver
from gradwatch_server.notify.receivers.chat import headline

_DETAILS = ("cause", "remedy", "evidence", "parameters", "step")


class PagerDuty(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="pagerduty"):
    """Triggers and resolves an incident for each alert."""

    url: str = "https://events.pagerduty.com/v2/enqueue"
    """PagerDuty's address; in Europe ``https://events.eu.pagerduty.com/v2/enqueue``."""
    routing_key: str
    """The integration's key."""

    def letter(self, message: Message, now: float) -> Letter:
        """Return the event; one alert is one incident, however often it is told."""
        data = message.data
        return self.json_letter(
            {
                "routing_key": self.routing_key,
                "event_action": "trigger" if data["state"] == "firing" else "resolve",
                "dedup_key": f"gradwatch-{data['id']}",
                "client": "gradwatch",
                "client_url": data["url"],
                "links": [{"href": data["url"], "text": f"step {data['step']}"}],
                "payload": {
                    "summary": f"{headline(data)}: {data['summary']}"[:1024],
                    "source": f"{data['run']['project']}/{data['run']['name']}",
                    "severity": data["severity"],
                    "component": data["parameters"][0]["name"] if data["parameters"] else "",
                    "group": data["run"]["project"],
                    "class": data["rule"],
                    "custom_details": {name: data[name] for name in _DETAILS},
                },
            }
        )
