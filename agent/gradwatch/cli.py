"""The ``gradwatch`` command: one table of sub-commands, each loaded only when it is called."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, Protocol, cast

from gradwatch import __version__


class Command(Protocol):
    """A module that runs one sub-command."""

    def main(self, arguments: Sequence[str]) -> int:
        """Run the sub-command on its own arguments and return the exit code."""


class Entry(NamedTuple):
    """One sub-command."""

    module: str
    extra: str
    """The optional dependencies that it needs: ``pip install gradwatch[extra]``."""
    purpose: str
    """Its line in ``gradwatch --help``."""


COMMANDS = {
    "serve": Entry("gradwatch_server.serve", "server", "run the server"),
    "migrate": Entry("gradwatch_server.cli.migrate", "server", "upgrade the schema of a database to this version"),
    "health": Entry("gradwatch_server.cli.health", "server", "ask a running server whether it is ready"),
    "token": Entry("gradwatch_server.cli.tokens", "server", "create, list and revoke tokens"),
    "prune": Entry("gradwatch_server.cli.prune", "server", "delete expired samples and runs"),
    "projects": Entry("gradwatch_server.cli.projects", "server", "list what each project takes of the database"),
    "export": Entry("gradwatch_server.cli.export", "server", "write the samples of a run as CSV or Parquet"),
    "run": Entry("gradwatch.launch.command", "agent", "run a training command with the agent attached"),
    "flush": Entry("gradwatch.delivery.flush", "agent", "deliver what agents on this machine left in the spool"),
    "alerts": Entry("gradwatch_server.cli.alerts", "server", "list alerts, or acknowledge one"),
    "silence": Entry("gradwatch_server.cli.silences", "server", "mute alerts for a while"),
    "receivers": Entry("gradwatch_server.cli.receivers", "server", "list, test and enable receivers of alerts"),
    "dashboards": Entry(
        "gradwatch_server.cli.dashboards", "server", "write the boards for Grafana and Prometheus' rules"
    ),
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is printed by its code
            stream.reconfigure(errors="backslashreplace")
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"gradwatch {__version__}")
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
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter flushes it again at its end
        return 1
    return status
