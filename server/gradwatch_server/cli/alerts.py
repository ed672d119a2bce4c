"""``gradwatch alerts``: list alerts, or say who takes care of one."""

import argparse
import getpass
import time
from collections.abc import Sequence
from typing import Any

from gradwatch_server.cli.client import ask, parser, told


def main(arguments: Sequence[str]) -> int:
    """List alerts, or say who takes care of one."""
    options = parser("alerts", "List alerts, the newest 1,000, or acknowledge one.")
    options.add_argument("--project")
    options.add_argument("--run", help="a run's id")
    options.add_argument("--state", choices=("pending", "firing", "resolved"), help="(default: all)")
    options.add_argument("--ack", metavar="ID", help="acknowledge this alert: only its end is told from now on")
    options.add_argument("--unack", metavar="ID", help="withdraw the acknowledgement of this alert")
    options.add_argument("--author", default=getpass.getuser(), help="who acknowledges it (default: %(default)s)")
    given = options.parse_args(arguments)
    return told(lambda: _alerts(given), "alerts")


def _alerts(given: argparse.Namespace) -> int:
    if given.ack:
        alert = ask(given, "POST", f"/alerts/{given.ack}/acknowledge", json={"author": given.author})
        print(f"{alert['rule']} of run {alert['run']} is acknowledged by {alert['acknowledged_by']}")
        return 0
    if given.unack:
        alert = ask(given, "DELETE", f"/alerts/{given.unack}/acknowledge")
        print(f"{alert['rule']} of run {alert['run']} is no longer acknowledged")
        return 0
    asked = {name: getattr(given, name) for name in ("project", "run", "state") if getattr(given, name)}
    listed = ask(given, "GET", "/alerts", params=asked)
    for alert in listed:
        taken = alert["acknowledged_by"] and f"acknowledged by {alert['acknowledged_by']} {_at(alert)}"
        notes = [taken or alert["muted"] or ""]
        shown = f"{alert['id']}  {alert['state']:<8}  {alert['severity']:<8}  {alert['rule']:<10}  {alert['run']}"
        print("  ".join(filter(None, [shown, f"step {alert['first_step']}", alert["summary"], *notes])))
    if not listed:
        print("no alerts")
    return 0


def _at(alert: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(alert["acknowledged_at"]))
