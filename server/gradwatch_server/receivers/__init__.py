"""Where transitions of alerts go: one module a kind, each turning a transition into what that kind reads."""

from gradwatch_server.receivers.base import Message, Receiver, Way, WebReceiver
from gradwatch_server.receivers.webhook import Webhook

AnyReceiver = Webhook

__all__ = ["AnyReceiver", "Message", "Receiver", "Way", "WebReceiver", "Webhook"]
