"""``gradwatch flush``: delivers the spools that agents of dead processes left on this machine."""

import argparse
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Sender
from gradwatch.delivery.spool import Leftover, leftovers
from gradwatch.delivery.transport import HttpTransport
from gradwatch.settings import SettingsError, resolve


class Outcome(NamedTuple):
    """Result of delivering one spool."""

    left: int
    """Documents that stay in the spool."""
    rejected: int
    """Documents that the server did not take, or took only in part."""
    dropped: Dropped
    """Counts over the rejected parts."""


def main(arguments: Sequence[str]) -> int:
    """Deliver every spool that no living process owns; the exit code is 1 if a document stays or was rejected."""
    parser = argparse.ArgumentParser(
        prog="gradwatch flush", description="Deliver what agents on this machine left in the spool."
    )
    parser.add_argument("--url", help="deliver to this server instead of the one the run was meant for")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for a response (default 10)")
    options = parser.parse_args(arguments)
    try:
        settings = resolve(url=options.url)
    except SettingsError as error:
        parser.error(str(error))
    stayed, failed = 0, False
    for leftover in leftovers(settings.spool_directory):
        url = settings.url if options.url else leftover.url
        try:
            waiting = leftover.pending
            left, rejected, dropped = deliver(leftover, url, settings.token, timeout_seconds=options.timeout)
        except (sqlite3.Error, TypeError, ValueError) as error:
            failed = True
            _print(f"{leftover.path} cannot be read and stays: {error}")
            continue
        stayed += left
        failed |= rejected > 0
        _print_outcome(leftover, url, waiting, Outcome(left, rejected, dropped))
    if stayed:
        _print(
            f"{stayed} documents stay in {settings.spool_directory}; run gradwatch flush again when the server takes "
            "them, with --url where it is another one"
        )
    return 1 if stayed or failed else 0


def deliver(
    leftover: Leftover,
    url: str,
    token: str | None,
    *,
    timeout_seconds: float = 10.0,
    warn: Callable[[str], None] | None = None,
) -> Outcome:
    """Deliver one spool to the server at ``url``.

    Args:
        leftover: the spool.
        url: root of the server.
        token: bearer token, None where the server wants none.
        timeout_seconds: longest wait for one response.
        warn: called with each warning; None: warnings go to the standard error stream.
    """
    http, dropped = HttpTransport(url, token, tell_clock=leftover.has_this_clock), Dropped()
    sender = Sender(leftover, http, dropped, warn or _print, timeout_seconds=timeout_seconds)
    sender.deliver()
    http.close()
    return Outcome(leftover.pending, sender.rejected, dropped)


def _print_outcome(leftover: Leftover, url: str, waiting: int, outcome: Outcome) -> None:
    left, rejected, dropped = outcome
    if left:
        _print(f"{leftover.run}: {left} documents stay in {leftover.path}")
    _print(f"{leftover.run}: {waiting - left - rejected} of {waiting} documents delivered to {url}")
    if rejected:
        counts = f"{dropped.samples} samples and {dropped.values} other numbers ({dropped.bytes} bytes)"
        _print(f"{leftover.run}: the server did not take all of {rejected} documents: {counts} are dropped")


def _print(text: str) -> None:
    sys.stderr.write(f"gradwatch: {text}\n")
