"""``gradwatch flush``: deliver what agents on this machine left in the spool."""

import argparse
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Http, Sender
from gradwatch.delivery.spool import Leftover, leftovers
from gradwatch.settings import SettingsError, resolve


class Outcome(NamedTuple):
    """What became of one spool."""

    left: int
    """Documents that stay behind."""
    refused: int
    """Documents of which the server did not take all."""
    lost: Dropped
    """What was in them, and is dropped."""


def main(arguments: Sequence[str]) -> int:
    """Deliver every spool that no living process owns; the exit code is 1 where something stays behind or is lost."""
    parser = argparse.ArgumentParser(
        prog="gradwatch flush", description="Deliver what agents on this machine left in the spool."
    )
    parser.add_argument("--url", help="deliver to this server instead of the one the run was meant for")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait for an answer (default 10)")
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
            left, refused, lost = deliver(leftover, url, settings.token, timeout_seconds=options.timeout)
        except (sqlite3.Error, TypeError, ValueError) as error:
            failed = True
            _say(f"{leftover.path} cannot be read and stays: {error}")
            continue
        stayed += left
        if left:
            _say(f"{leftover.run}: {left} documents stay in {leftover.path}")
        _say(f"{leftover.run}: {waiting - left - refused} of {waiting} documents delivered to {url}")
        if refused:
            failed = True
            _say(f"{leftover.run}: the server did not take all of {refused} documents: {_told(lost)} are dropped")
    if stayed:
        _say(
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
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Deliver one spool; trouble is told to ``say``, or on the standard error stream."""
    http, lost = Http(url, token), Dropped()
    sender = Sender(leftover, http, lost, say or _say, timeout_seconds=timeout_seconds)
    sender.deliver()
    http.close()
    return Outcome(leftover.pending, sender.refused, lost)


def _told(lost: Dropped) -> str:
    return f"{lost.samples} samples and {lost.values} other numbers ({lost.bytes} bytes)"


def _say(text: str) -> None:
    sys.stderr.write(f"gradwatch: {text}\n")
