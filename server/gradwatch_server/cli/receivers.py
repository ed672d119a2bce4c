"""``gradwatch receivers``: list the server's receivers, test one, or bring one back."""

import argparse
import asyncio
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from gradwatch_server.cli.client import AskError, ask, parser, told
from gradwatch_server.notify.http_client import DeliveryResult
from gradwatch_server.notify.receivers import Notification, Receiver
from gradwatch_server.settings import Configuration


def main(arguments: Sequence[str]) -> int:
    """Test a receiver of a configuration file; list the server's, enable one, send its dead deliveries again."""
    options = parser("receivers", "List the server's receivers, test one, or bring one back.")
    options.add_argument("action", nargs="?", choices=("list", "test", "enable", "replay"), default="list")
    options.add_argument("name", nargs="?", help="a receiver")
    options.add_argument("--config", type=Path, default=Path("gradwatch.toml"), help="file that `test` reads")
    given = options.parse_args(arguments)
    if given.action != "list" and given.name is None:
        options.error(f"{given.action} needs the NAME of a receiver")
    actions = {"list": _list_receivers, "test": _test, "enable": _enable, "replay": _replay}
    return told(lambda: actions[given.action](given), "receivers")


def _list_receivers(given: argparse.Namespace) -> int:
    for each in ask(given, "GET", "/receivers"):
        state = f"disabled: {each['disabled']}" if each["disabled"] else "in use"
        print(f"{each['name']}  {each['type']}  {state}  {each['due']} due  {each['dead']} dead")
    return 0


def _enable(given: argparse.Namespace) -> int:
    ask(given, "POST", f"/receivers/{given.name}/enable")
    print(f"{given.name} is in use again; send what was given up with: gradwatch receivers replay {given.name}")
    return 0


def _replay(given: argparse.Namespace) -> int:
    print(f"due again: {ask(given, 'POST', f'/receivers/{given.name}/replay')['deliveries']}")
    return 0


def _test(given: argparse.Namespace) -> int:
    """Send a test alert without a server, once, and print what the receiver says."""
    configuration = Configuration.load(given.config)
    known = {receiver.name: receiver for receiver in configuration.receivers}
    if given.name not in known:
        listed = ", ".join(known) or "none"
        raise AskError(f"{given.config} has no receiver {given.name!r}; it has: {listed}")
    result = asyncio.run(_send(known[given.name], configuration.delivery.timeout_seconds))
    print(f"{given.name}: {result.verdict}" + (f", status {result.status}" if result.status is not None else ""))
    for line in filter(None, (result.error, result.text)):
        print(line)
    return 0 if result.verdict == "delivered" else 1


async def _send(receiver: Receiver, timeout_seconds: float) -> DeliveryResult:
    now = time.time()
    async with receiver.transport(timeout_seconds, 1) as transport:
        return await transport.send(Notification(f"msg_{secrets.token_hex(12)}", _test_payload(now), now), now)


def _test_payload(now: float) -> str:
    data: dict[str, Any] = dict.fromkeys(("resolved_step", "resolved_at", "resolution"))
    data |= {
        "id": secrets.token_hex(8),
        "fingerprint": "0" * 16,
        "run": {"id": "test", "name": "test", "project": "test"},
        "rule": "nonfinite",
        "severity": "warning",
        "state": "firing",
        "step": 0,
        "first_step": 0,
        "fired_step": 0,
        "fired_at": now,
        "parameters": [{"name": "test.weight", "value": 1.0, "limit": 1.0}],
        "parameters_left_out": 0,
        "evidence": {},
        "summary": "This is a test of gradwatch: nothing is wrong.",
        "cause": "Somebody ran gradwatch receivers test.",
        "remedy": "Nothing is to be done.",
        "url": "http://127.0.0.1:8321/runs/test?step=0",
    }
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now))
    return msgspec.json.encode({"type": "alert.firing", "timestamp": timestamp, "data": data}).decode()
