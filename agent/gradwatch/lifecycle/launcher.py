"""Notes from an agent to ``gradwatch run``, so that the launcher can finish a run whose process died.

The launcher runs without torch, and so does this module: both sides import it.
"""

import contextlib
import os
from pathlib import Path

import msgspec


class RunNote(msgspec.Struct, frozen=True):
    """Tells the launcher which run an agent has open, where it is reported to and by which process."""

    run: str
    url: str
    attempt: int
    pid: int
    ended: bool = False
    """Whether the run has ended: its process closed it, or another training followed in that process."""


def write_note(note: RunNote, *, ended: bool = False) -> None:
    """Leave a note for ``gradwatch run``; without a launcher do nothing.

    Args:
        note: the run; a later note on the same attempt replaces the earlier one.
        ended: whether the run has ended, so that the launcher has nothing left to finish.
    """
    folder = os.environ.get("GRADWATCH_LAUNCH")
    if folder:
        document = msgspec.json.encode(msgspec.structs.replace(note, ended=ended))
        with contextlib.suppress(OSError):
            whole = Path(folder) / f"{note.attempt}-{note.run}.json"
            part = whole.with_suffix(".part")
            part.write_bytes(document)
            part.replace(whole)


def read_notes(folder: Path) -> list[RunNote]:
    """Return the notes that agents have left in the launcher's folder, by the start of their attempts."""
    return [msgspec.json.decode(path.read_bytes(), type=RunNote) for path in sorted(folder.glob("*.json"))]


def is_launched_command() -> bool:
    """Return whether this process is the command that ``gradwatch run`` waits for, and not a child of it."""
    return os.environ.get("GRADWATCH_LAUNCHER") == str(os.getppid())
