"""``gradwatch receivers``: list the server's receivers, test one, enable one, or replay its dead deliveries."""

import argparse
import asyncio
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from gradwatch_server.cli.client import send_request
from gradwatch_server.cli.command import print_line, run_command, server_parser
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.notify.http_client import DeliveryResult
from gradwatch_server.notify.receivers import Notification, Receiver
from gradwatch_server.settings import Configuration


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch receivers``; return the exit code."""
    parser = server_parser("receivers", "List, test or enable the receivers of alerts, or replay dead deliveries.")
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "test", "enable", "replay"),
        default="list",
        help="list the server's receivers (default), send a test alert to one of the configuration file, enable one "
        "that the server has disabled, or send its dead deliveries again",
    )
    parser.add_argument("name", nargs="?", help="of the receiver, for all but list")
    config = Path("gradwatch.toml")
    parser.add_argument("--config", type=Path, default=config, metavar="FILE", help="for test (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.action != "list" and options.name is None:
        parser.error(f"{options.action} needs the NAME of a receiver")
    actions = {"list": _list_receivers, "test": _test, "enable": _enable, "replay": _replay}
    return run_command("receivers", lambda: actions[options.action](options))


def _list_receivers(options: argparse.Namespace) -> int:
    for receiver in send_request(options, "GET", "receivers"):
        state = f"disabled: {receiver['disabled']}" if receiver["disabled"] else "in use"
        print_line(f"{receiver['name']}  {receiver['type']}  {state}  {receiver['due']} due  {receiver['dead']} dead")
    return 0


def _enable(options: argparse.Namespace) -> int:
    send_request(options, "POST", "receivers", options.name, "enable")
    print_line(
        f"{options.name} is in use again; send its dead deliveries with: gradwatch receivers replay {options.name}"
    )
    return 0


def _replay(options: argparse.Namespace) -> int:
    replayed = send_request(options, "POST", "receivers", options.name, "replay")
    print_line(f"due again: {replayed['deliveries']}")
    return 0


def _test(options: argparse.Namespace) -> int:
    """Send a test alert once, without a server, and print what the receiver responds."""
    configuration = Configuration.load(options.config)
    configured = {receiver.name: receiver for receiver in configuration.receivers}
    if options.name not in configured:
        listed = ", ".join(configured) or "none"
        raise ConfigurationError(f"{options.config} has no receiver {options.name!r}; it has: {listed}")
    result = asyncio.run(_send(configured[options.name], configuration.delivery.timeout_seconds))
    print_line(f"{options.name}: {result.verdict}" + (f", status {result.status}" if result.status is not None else ""))
    for line in filter(None, (result.error, result.text)):
        print_line(line)
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
