"""``gradwatch run -- python train.py``: runs a training command with the agent attached, its code untouched.

The launcher puts a folder with a ``sitecustomize`` on the PYTHONPATH of the command, which reaches its child processes
and the workers of ``torchrun`` and ``accelerate launch``. Each process that imports ``torch.optim`` attaches by itself
(see ``auto_attach``). When the command has ended, the launcher ends the runs that its agents left open with the exit
status of the command, and delivers their spools. The launcher itself needs no torch.
"""

import argparse
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.flush import deliver
from gradwatch.delivery.sender import Sender
from gradwatch.delivery.spool import Spool, leftovers
from gradwatch.delivery.transport import HttpTransport
from gradwatch.lifecycle.launcher import RunNote, read_notes
from gradwatch.settings import Settings, SettingsError, resolve

_AUTOLOAD_FOLDER: Final = Path(__file__).parent / "autoload"
_FORWARDED_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TERMINAL_SIGNALS: Final = (signal.SIGINT, signal.SIGQUIT)
"""Signals that a terminal sends to the whole process group (Ctrl-C), and so to the command as well."""
_DELIVERY_SECONDS: Final = 10.0
"""Longest wait for servers after the command has ended, for all of its runs together."""
_REQUEST_SECONDS: Final = 3.0
"""Longest wait for the response to one request then."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code; a command that a signal killed ends the launcher in the same way."""
    parser = argparse.ArgumentParser(
        prog="gradwatch run",
        usage="gradwatch run [--url URL] [--project P] [--run NAME] [--every N] -- python train.py ...",
        description="Run a training command with the agent attached, its code untouched.",
    )
    parser.add_argument("--url", help="the server")
    parser.add_argument("--project", help="the project of the run")
    parser.add_argument("--run", help="name of the run, or the id of one to resume")
    parser.add_argument("--every", type=int, help="steps between samples (default: keep the overhead under 1%%)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("there is no command: gradwatch run -- python train.py ...")
    try:
        settings = resolve(url=options.url, project=options.project, run=options.run, every=options.every)
    except SettingsError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="gradwatch-") as folder:
        given = {
            "GRADWATCH_URL": settings.url,
            "GRADWATCH_PROJECT": settings.project,
            "GRADWATCH_RUN": settings.run,
            "GRADWATCH_EVERY": None if settings.every_steps is None else str(settings.every_steps),
            "GRADWATCH_SPOOL_DIR": str(settings.spool_directory) if "GRADWATCH_SPOOL_DIR" in os.environ else None,
            "GRADWATCH_LAUNCH": folder,
            "GRADWATCH_LAUNCHER": str(os.getpid()),
        }
        status = _run(command, command_environment(os.environ, given))
        _finish_runs(Path(folder), status)
    return _exit_like(status)


def command_environment(environment: Mapping[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of the command: ``environment`` with ``given`` and the autoload folder on PYTHONPATH.

    A variable that is None in ``given`` stays as it is.
    """
    path = os.pathsep.join(filter(None, (str(_AUTOLOAD_FOLDER), environment.get("PYTHONPATH"))))
    kept = {name: value for name, value in given.items() if value is not None}
    return {**environment, **kept, "PYTHONPATH": path}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command on our standard streams, forward signals to it, and return its status as ``Popen`` gives it."""
    received: list[int] = []
    # An ignored signal (nohup ignores SIGHUP) stays ignored, for the command as well.
    signals = (*_FORWARDED_SIGNALS, *_TERMINAL_SIGNALS)
    handled = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda it, _: received.append(it)) for number in handled}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    # A signal that arrives just before the read below would not interrupt it, so each signal also writes a byte.
    wakeup_reader, wakeup_writer = os.pipe()
    os.set_blocking(wakeup_writer, False)
    earlier = signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    try:
        return _wait(command, environment, received, wakeup_reader)
    except OSError as error:
        sys.stderr.write(f"gradwatch run: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    finally:
        signal.set_wakeup_fd(earlier)
        for number, action in before.items():
            signal.signal(number, action)
        os.close(wakeup_reader)
        os.close(wakeup_writer)


def _wait(command: Sequence[str], environment: Mapping[str, str], received: list[int], wakeup_reader: int) -> int:
    process = subprocess.Popen(command, env=environment)
    while (status := process.poll()) is None:
        while received:
            _forward(process, received.pop(0))
        os.read(wakeup_reader, 1024)
    return status


def _forward(process: subprocess.Popen[bytes], number: int) -> None:
    if number not in _TERMINAL_SIGNALS or not _is_in_foreground():
        process.send_signal(number)


def _is_in_foreground() -> bool:
    """Return whether the terminal sends its signals to our process group, which is also the command's."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:  # a supervisor has none
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _finish_runs(folder: Path, status: int) -> None:
    """End the runs that agents left open with the status of the command, and deliver their spools.

    A child process of the command ends its own run; the launcher ends it only if that process died without doing so.
    The run of a process that goes on in the background is left alone.
    """
    try:
        notes = read_notes(folder)
        if not notes:
            if status == 0 and sys.stderr.isatty():  # a program that reads stderr expects only the command's output
                _print(
                    "nothing was watched: no process of the command went back through a network that torch.optim "
                    "trains, or it ran Python with -I, -S or -E, which leaves the agent out"
                )
            return
        settings = resolve()
        deadline = time.monotonic() + _DELIVERY_SECONDS
        outcome = "completed" if status == 0 else "killed" if status < 0 else "failed"
        for note in notes:
            if note.ended or _is_alive(note.pid):
                continue
            end = wire.End(at=time.time(), status=outcome, exit_code=status)
            batch = wire.Batch(id=f"end-{note.pid}-{note.attempt}", attempt=note.attempt, end=end)
            _append_to_spool(wire.encode(batch), note, settings, deadline)
        _deliver_spools({note.run for note in notes}, settings, deadline)
    except Exception as error:  # the command's exit code is what counts
        sys.stderr.write(f"gradwatch: the run cannot be finished: {type(error).__name__}: {error}\n")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state != "Z"  # a zombie has ended, but its parent has not waited for it and may never do


def _append_to_spool(document: bytes, note: RunNote, settings: Settings, deadline: float) -> None:
    """Append a document to the spool that a run's agent left, or to a new one; without a disk send it at once."""
    for leftover in leftovers(settings.spool_directory):
        if leftover.run == note.run and leftover.url == note.url:
            with contextlib.suppress(sqlite3.Error):  # the disk is full
                leftover.append("batch", document)
                return
    dropped = Dropped()
    spool = Spool(settings.spool_directory, url=note.url, run=note.run, dropped=dropped, warn=_ignore)
    spool.append("batch", document)
    if spool.path is None:
        http = HttpTransport(note.url, settings.token)
        Sender(spool, http, dropped, _print).deliver(deadline)
        http.close()
    spool.close()


def _deliver_spools(runs: Collection[str], settings: Settings, deadline: float) -> None:
    """Deliver the spools of some runs by a common deadline; a server that does not respond is tried only once."""
    unreachable: set[str] = set()
    waiting = 0
    for leftover in leftovers(settings.spool_directory):
        if leftover.run not in runs:
            continue
        left = min(_REQUEST_SECONDS, deadline - time.monotonic())
        if leftover.url not in unreachable and left > 0:
            outcome = deliver(leftover, leftover.url, settings.token, timeout_seconds=left, warn=_ignore)
            if outcome.left:
                unreachable.add(leftover.url)
        waiting += leftover.pending
    if waiting:
        _print(f"{waiting} documents wait in {settings.spool_directory}; gradwatch flush delivers them")


def _ignore(_text: str) -> None:
    """Print nothing: the agent has printed the same warning."""


def _print(text: str) -> None:
    sys.stderr.write(f"gradwatch: {text}\n")


def _exit_like(status: int) -> int:
    """Return the exit code; if a signal killed the command, kill the launcher with it, so that its parent sees it."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status
