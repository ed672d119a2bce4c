"""``gradwatch run -- python train.py``: the agent attached to a command whose code is untouched.

The command gets a folder with a ``sitecustomize`` on its PYTHONPATH, which reaches its child processes and the workers
of ``torchrun`` and ``accelerate launch``. In each process that imports ``torch.optim``, what is trained is watched: see
``automatic`` and ``trainings``. The last run is finished with the exit status of the command.
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
from gradwatch.delivery.sender import Http, Sender
from gradwatch.delivery.spool import Spool, leftovers
from gradwatch.lifecycle.launcher import RunNote, read_notes
from gradwatch.settings import Settings, SettingsError, resolve

_FOLDER: Final = Path(__file__).parent / "autoload"
_PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FINISHING_SECONDS: Final = 10.0
"""Longest wait for servers when the command has ended, for all of its runs together."""
_ANSWER_SECONDS: Final = 3.0
"""Longest wait for one answer then."""
_OF_THE_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)
"""Signals that Ctrl-C and its like send to the command as well."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="gradwatch run",
        usage="gradwatch run [--url URL] [--project P] [--run NAME] [--every N] -- python train.py ...",
        description="Run a training command with the agent attached, its code untouched.",
    )
    parser.add_argument("--url", help="the server")
    parser.add_argument("--project", help="what the run belongs to")
    parser.add_argument("--run", help="name of the run, or the id of one to resume")
    parser.add_argument("--every", type=int, help="steps between samples; default: as 1%% of the time allows")
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
        status = _run(command, surroundings(os.environ, given))
        _finish(Path(folder), status)
    return _end_like(status)


def surroundings(environment: Mapping[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of the command: ours, with the folder first on PYTHONPATH and what was given."""
    path = os.pathsep.join(filter(None, (str(_FOLDER), environment.get("PYTHONPATH"))))
    kept = {name: value for name, value in given.items() if value is not None}
    return {**environment, **kept, "PYTHONPATH": path}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command on our own standard streams, passing signals on, and return its status as ``Popen`` gives it."""
    caught: list[int] = []
    # A signal that is ignored, as nohup ignores SIGHUP, stays so, for the command as well.
    heard = [it for it in (*_PASSED_ON, *_OF_THE_TERMINAL) if signal.getsignal(it) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda it, _: caught.append(it)) for number in heard}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
    # A signal that comes just before a wait begins would not end it: each leaves a byte, which does.
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    earlier = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        return _waited(command, environment, caught, awake)
    except OSError as error:
        sys.stderr.write(f"gradwatch run: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    finally:
        signal.set_wakeup_fd(earlier)
        for number, action in before.items():
            signal.signal(number, action)
        os.close(awake)
        os.close(wake)


def _waited(command: Sequence[str], environment: Mapping[str, str], caught: list[int], awake: int) -> int:
    process = subprocess.Popen(command, env=environment)
    while (status := process.poll()) is None:
        while caught:
            _pass_on(process, caught.pop(0))
        os.read(awake, 1024)
    return status


def _pass_on(process: subprocess.Popen[bytes], number: int) -> None:
    if number not in _OF_THE_TERMINAL or not _is_in_foreground():
        process.send_signal(number)


def _is_in_foreground() -> bool:
    """Return whether the terminal sends its signals to our process group, which is the command's."""
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


def _finish(folder: Path, status: int) -> None:
    """End the runs that agents left open, as the command ended, and deliver what is still in their spools.

    A run in another process than the command's own is ended by that process; here only where it has died without a
    word. One that goes on in the background is left alone.
    """
    try:
        notes = read_notes(folder)
        if not notes:
            if status == 0 and sys.stderr.isatty():  # what is read by a program stays the command's own
                _say(
                    "nothing was watched: no process of the command went back through a network that torch.optim "
                    "trains, or it ran Python with -I, -S or -E, which leaves the agent out"
                )
            return
        settings = resolve()
        deadline = time.monotonic() + _FINISHING_SECONDS
        ending = "completed" if status == 0 else "killed" if status < 0 else "failed"
        for note in notes:
            if note.ended or _is_alive(note.pid):
                continue
            end = wire.End(at=time.time(), status=ending, exit_code=status)
            batch = wire.Batch(id=f"end-{note.pid}-{note.attempt}", attempt=note.attempt, end=end)
            _leave(wire.encode(batch), note, settings, deadline)
        _deliver({note.run for note in notes}, settings, deadline)
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
    return state != "Z"  # nobody has asked a zombie how it ended, and nobody may


def _leave(document: bytes, note: RunNote, settings: Settings, deadline: float) -> None:
    """Put the end of a run behind what its agent left; where there is no spool to put it in, send it at once."""
    for leftover in leftovers(settings.spool_directory):
        if leftover.run == note.run and leftover.url == note.url:
            with contextlib.suppress(sqlite3.Error):  # of a disk that is full
                leftover.append("batch", document)
                return
    dropped = Dropped()
    spool = Spool(settings.spool_directory, url=note.url, run=note.run, dropped=dropped, warn=_nothing)
    spool.append("batch", document)
    if spool.path is None:
        http = Http(note.url, settings.token)
        Sender(spool, http, dropped, _say).deliver(deadline)
        http.close()
    spool.close()


def _deliver(runs: Collection[str], settings: Settings, deadline: float) -> None:
    """Deliver what was left of some runs, all together by a deadline; a server that does not answer is asked once."""
    silent: set[str] = set()
    waiting = 0
    for leftover in leftovers(settings.spool_directory):
        if leftover.run not in runs:
            continue
        left = min(_ANSWER_SECONDS, deadline - time.monotonic())
        if leftover.url not in silent and left > 0:
            outcome = deliver(leftover, leftover.url, settings.token, timeout_seconds=left, say=_nothing)
            if outcome.left:
                silent.add(leftover.url)
        waiting += leftover.pending
    if waiting:
        _say(f"{waiting} documents wait in {settings.spool_directory}; gradwatch flush delivers them")


def _nothing(_text: str) -> None:
    """The agent has said it."""


def _say(text: str) -> None:
    sys.stderr.write(f"gradwatch: {text}\n")


def _end_like(status: int) -> int:
    """Return the exit code; a command that a signal killed takes the launcher with it, so that its parent sees it."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status


def watch_automatically() -> None:
    """Attach at the first backward pass of this process. Called when ``torch.optim`` has been imported."""
    from gradwatch.launch.automatic import Waiting

    Waiting()
