"""Receivers of notifications: one module per type, which turns a notification into the format of that type."""

from gradwatch_server.notify.receivers.alertmanager import Alertmanager, AlertmanagerWebhook
from gradwatch_server.notify.receivers.apprise import AppriseService
from gradwatch_server.notify.receivers.base import Notification, Receiver, Transport, WebReceiver
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
    "Notification",
    "PagerDuty",
    "Receiver",
    "Slack",
    "Teams",
    "Transport",
    "WebReceiver",
    "Webhook",
]
