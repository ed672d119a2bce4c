"""Receivers for chat services: Slack and Microsoft Teams."""

import re
from typing import Any

from gradwatch_server.notify.http_client import HttpRequest
from gradwatch_server.notify.receivers.base import Notification, WebReceiver, ended_with_run, parameter_lines, title

_ZERO_WIDTH_SPACE = "\u200b"
_MENTION = re.compile(r"(?<!\w)@(?=\w)")
_MARKDOWN = re.compile(r"[\\`*_\[\]<>{}~|#]")
_MOST_CHARACTERS = 2_900
"""Longest text; Slack refuses more than 3,000 characters."""


class Slack(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="slack"):
    """Posts to an incoming webhook of Slack; Mattermost and Rocket.Chat read the same format."""

    def request(self, notification: Notification, now: float) -> HttpRequest:
        """Return the request that posts a message in blocks, with a plain text for pop-ups."""
        data = notification.data
        lines = [f"*{_escaped(title(data))}*", _escaped(data["summary"])]
        lines += [f"• {_escaped(line)}" for line in parameter_lines(data)]
        if data["state"] == "firing":
            lines += [f"*Cause:* {_escaped(data['cause'])}", f"*Remedy:* {_escaped(data['remedy'])}"]
        elif data["resolution"]:
            lines.append(_escaped(data["resolution"]))
        link = f"<{data['url']}|step {data['step']}>"
        text = "\n".join(lines)[: _MOST_CHARACTERS - len(link)] + "\n" + link
        section = {"type": "section", "text": {"type": "mrkdwn", "text": text}}
        return self.json_request({"text": _escaped(title(data)), "blocks": [section]})


class Teams(WebReceiver, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="teams"):
    """Posts an Adaptive Card to a Workflows webhook of Microsoft Teams."""

    def request(self, notification: Notification, now: float) -> HttpRequest:
        """Return the request that posts the card."""
        data = notification.data
        firing_color = {"critical": "Attention", "warning": "Warning"}[data["severity"]]
        color = firing_color if data["state"] == "firing" or ended_with_run(data) else "Good"
        body = [_block(title(data), weight="Bolder", size="Medium", color=color), _block(data["summary"])]
        if facts := [{"title": "Parameter", "value": _escaped_markdown(line)} for line in parameter_lines(data)]:
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
        return self.json_request({"type": "message", "attachments": [attachment]})


def _escaped(text: str) -> str:
    """Return a text that Slack shows as it is, and in which Mattermost and Rocket.Chat find no link and call nobody."""
    unlinked = text.replace("](", f"]{_ZERO_WIDTH_SPACE}(")
    entities = unlinked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MENTION.sub("@" + _ZERO_WIDTH_SPACE, entities)


def _block(text: str, **style: str) -> dict[str, Any]:
    return {"type": "TextBlock", "text": _escaped_markdown(text), "wrap": True, **style}


def _escaped_markdown(text: str) -> str:
    """Return a text in which an Adaptive Card finds no Markdown and no function such as ``{{DATE(...)}}``."""
    return _MARKDOWN.sub(r"\\\g<0>", text)
