"""Rooms where people talk: Slack and Microsoft Teams."""

from typing import Any

from gradwatch_server.notify.http_client import Letter
from gradwatch_server.notify.receivers.base import Message, WebReceiver

_MOST_CHARACTERS = 2_900
"""Slack refuses a text of more than 3,000."""


class Slack(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="slack"):
    """Posts to an incoming webhook of Slack (Mattermost and Rocket.Chat read the same)."""

    def letter(self, message: Message, now: float) -> Letter:
        """Return the message in blocks, with a plain text for notifications."""
        data = message.data
        title = headline(data)
        lines = [f"*{_escaped(title)}*", _escaped(data["summary"])]
        lines += [f"• {_escaped(line)}" for line in blamed(data)]
        if data["state"] == "firing":
            lines += [f"*Cause:* {_escaped(data['cause'])}", f"*Remedy:* {_escaped(data['remedy'])}"]
        elif data["resolution"]:
            lines.append(_escaped(data["resolution"]))
        link = f"<{data['url']}|step {data['step']}>"
        text = "\n".join(lines)[: _MOST_CHARACTERS - len(link)] + "\n" + link
        section = {"type": "section", "text": {"type": "mrkdwn", "text": text}}
        return self.json_letter({"text": _escaped(title), "blocks": [section]})


class Teams(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="teams"):
    """Posts an Adaptive Card to a Workflows webhook of Microsoft Teams."""

    def letter(self, message: Message, now: float) -> Letter:
        """Return the card."""
        data = message.data
        worrying = {"critical": "Attention", "warning": "Warning"}[data["severity"]]
        color = worrying if data["state"] == "firing" else "Good"
        body = [_block(headline(data), weight="Bolder", size="Medium", color=color), _block(data["summary"])]
        if facts := [{"title": "Parameter", "value": line} for line in blamed(data)]:
            body.append({"type": "FactSet", "facts": facts})
        if data["state"] == "firing":
            body += [_block("Cause: " + data["cause"]), _block("Remedy: " + data["remedy"])]
        elif data["resolution"]:
            body.append(_block(data["resolution"]))
        card = {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
            "type": "AdaptiveCard",
            "version": "1.4",
            "body": body,
            "actions": [{"type": "Action.OpenUrl", "title": f"Step {data['step']}", "url": data["url"]}],
        }
        attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None, "content": card}
        return self.json_letter({"type": "message", "attachments": [attachment]})


def headline(data: dict[str, Any]) -> str:
    """Return an alert in one line."""
    run = data["run"]
    state = "RESOLVED" if data["state"] == "resolved" else data["severity"].upper()
    return f"{state}: {data['rule']} in {run['project']} / {run['name']}"


def blamed(data: dict[str, Any]) -> list[str]:
    """Return the worst parameters, one a line, and how many more there are."""
    worst = [f"{blame['name']}: {_number(blame['value'])}" for blame in data["parameters"][:5]]
    left_out = data["parameters_left_out"] + max(0, len(data["parameters"]) - 5)
    return [*worst, f"and {left_out} more"] if left_out else worst


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _block(text: str, **style: str) -> dict[str, Any]:
    return {"type": "TextBlock", "text": text, "wrap": True, **style}
