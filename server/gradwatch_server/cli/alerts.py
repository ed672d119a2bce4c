"""``gradwatch alerts``: list alerts, acknowledge one, or withdraw an acknowledgement."""

import argparse
import getpass
import time
from collections.abc import Sequence
from typing import Any

from gradwatch_server.cli.client import send_request
from gradwatch_server.cli.command import print_line, run_command, server_parser


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch alerts``; return the exit code."""
    parser = server_parser("alerts", "List the newest 1,000 alerts, acknowledge one, or withdraw an acknowledgement.")
    parser.add_argument("--project", help="list the alerts of this project only")
    parser.add_argument("--run", metavar="ID", help="list the alerts of this run only")
    parser.add_argument("--state", choices=("pending", "firing", "resolved"), help="list the alerts in this state only")
    parser.add_argument("--ack", metavar="ID", help="acknowledge this alert: receivers are notified only of its end")
    parser.add_argument("--unack", metavar="ID", help="withdraw the acknowledgement of this alert")
    parser.add_argument("--author", default=getpass.getuser(), help="who acknowledges it (default: %(default)s)")
    options = parser.parse_args(arguments)
    work = _acknowledge if options.ack else _withdraw if options.unack else _list_alerts
    return run_command("alerts", lambda: work(options))


def _acknowledge(options: argparse.Namespace) -> int:
    alert = send_request(options, "POST", "alerts", options.ack, "acknowledge", json={"author": options.author})
    print_line(f"{alert['rule']} of run {alert['run']} is acknowledged by {alert['acknowledged_by']}")
    return 0


def _withdraw(options: argparse.Namespace) -> int:
    alert = send_request(options, "DELETE", "alerts", options.unack, "acknowledge")
    print_line(f"{alert['rule']} of run {alert['run']} is no longer acknowledged")
    return 0


def _list_alerts(options: argparse.Namespace) -> int:
    filters = {name: getattr(options, name) for name in ("project", "run", "state") if getattr(options, name)}
    alerts = send_request(options, "GET", "alerts", params=filters)
    for alert in alerts:
        print_line(_line(alert))
    if not alerts:
        print_line("no alerts")
    return 0


def _line(alert: dict[str, Any]) -> str:
    columns = [f"{alert['id']}  {alert['state']:<8}  {alert['severity']:<8}  {alert['rule']:<10}  {alert['run']}"]
    columns += [f"step {alert['first_step']}", alert["summary"], _note(alert)]
    return "  ".join(filter(None, columns))


def _note(alert: dict[str, Any]) -> str:
    """Return who has acknowledged an alert and when, or else why it is muted."""
    if not alert["acknowledged_by"]:
        return alert["muted"] or ""
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(alert["acknowledged_at"]))
    return f"acknowledged by {alert['acknowledged_by']} {at}"
