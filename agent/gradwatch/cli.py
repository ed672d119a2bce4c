"""The ``gradwatch`` command: one table of sub-commands, each loaded only when it is called."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import NamedTuple, Protocol, cast


class Command(Protocol):
    """What the module of a sub-command offers."""

    def main(self, arguments: Sequence[str]) -> int:
        """Run the sub-command on its own arguments and return the exit code."""


class Entry(NamedTuple):
    """A line of the table."""

    module: str
    extra: str
    """The optional dependencies that it needs: ``pip install gradwatch[extra]``."""
    purpose: str


COMMANDS = {
    "serve": Entry("gradwatch_server.serve", "server", "run the server"),
    "migrate": Entry("gradwatch_server.cli.migrate", "server", "bring the schema of a database to this version"),
    "token": Entry("gradwatch_server.cli.tokens", "server", "make, list and revoke tokens"),
    "prune": Entry("gradwatch_server.cli.prune", "server", "remove what is over its time"),
    "export": Entry("gradwatch_server.cli.export", "server", "write the samples of a run as CSV or Parquet"),
    "run": Entry(
        "gradwatch.launch.command", "agent", "run a training command with the agent attached, its code untouched"
    ),
    "flush": Entry("gradwatch.delivery.flush", "agent", "deliver what is left in the spool of this machine"),
    "alerts": Entry("gradwatch_server.cli.alerts", "server", "list alerts, or acknowledge one"),
    "silence": Entry("gradwatch_server.cli.silences", "server", "have alerts not told for a while"),
    "receivers": Entry("gradwatch_server.cli.receivers", "server", "list, test, enable receivers of alerts"),
    "demo": Entry(
        "gradwatch.demo", "demo", "train four small networks, three of them sick, and watch the alerts arrive"
    ),
}


def usage() -> str:
    """Return the overview that ``gradwatch --help`` prints."""
    lines = [f"  {name:<10} {entry.purpose}" for name, entry in COMMANDS.items()]
    head = "usage: gradwatch [--version] COMMAND [--help] ...\n\ncommands:\n"
    return head + "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first argument names."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"gradwatch {metadata.version('gradwatch')}")
        return 0
    entry = COMMANDS.get(given[0])
    if entry is None:
        print(f"gradwatch: unknown command {given[0]!r}\n{usage()}", file=sys.stderr)
        return 2
    try:
        command = cast("Command", import_module(entry.module))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gradwatch", "gradwatch_server"):
            raise
        needed = f"pip install 'gradwatch[{entry.extra}]'"
        print(f"gradwatch {given[0]} needs {error.name}, which is not installed: {needed}", file=sys.stderr)
        return 1
    try:
        status = command.main(given[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # of a reader that has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the end does not try again
        return 1
    return status
