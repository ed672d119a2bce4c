"""Where transitions of alerts go: one module a kind, each turning a transition into what that kind reads."""

from gradwatch_server.notify.receivers.alertmanager import Alertmanager, AlertmanagerWebhook
from gradwatch_server.notify.receivers.apprise import AppriseService
from gradwatch_server.notify.receivers.base import Message, Receiver, Way, WebReceiver
from gradwatch_server.notify.receivers.chat import Slack, Teams
from gradwatch_server.notify.receivers.mail import Email
from gradwatch_server.notify.receivers.pagerduty import PagerDuty
from gradwatch_server.notify.receivers.webhook import Webhook

AnyReceiver = Webhook | Alertmanager | AlertmanagerWebhook | Slack | Teams | PagerDuty | Email | AppriseService

__all__ = [
    "Alertmanager",
    "AlertmanagerWebhook",
    "AnyReceiver",
    "AppriseService",
    "Email",
    "Message",
    "PagerDuty",
    "Receiver",
    "Slack",
    "Teams",
    "Way",
    "WebReceiver",
    "Webhook",
]
