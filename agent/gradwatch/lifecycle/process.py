"""What the agent knows of the process that trains: its rank, its script, its launcher."""

import contextlib
import os
import platform
import socket
import sys
import time
from pathlib import Path

import msgspec
import torch

from gradwatch.launch.automatic import script_name
from gradwatch.launch.command import Note


def rank() -> int:
    """Return the rank of this process: in data parallel training the gradients are equal, and rank 0 reports."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else 0


def automatic_name() -> str:
    """Return a name for a run that was given none: the script and the time."""
    return f"{script_name(sys.argv[0] if sys.argv else '')} {time.strftime('%Y-%m-%d %H:%M:%S')}"


def tell_the_launcher(note: Note, *, ended: bool = False) -> None:
    """Leave a note for ``gradwatch run``, which finishes a run that has not ended with the command's exit status."""
    folder = os.environ.get("GRADWATCH_LAUNCH")
    if folder:
        document = msgspec.json.encode(msgspec.structs.replace(note, ended=ended))
        with contextlib.suppress(OSError):
            whole = Path(folder) / f"{note.attempt}-{note.run}.json"
            part = whole.with_suffix(".part")
            part.write_bytes(document)
            part.replace(whole)


def is_the_command() -> bool:
    """Return whether this process is the command that ``gradwatch run`` waits for, and not a child of it."""
    return os.environ.get("GRADWATCH_LAUNCHER") == str(os.getppid())


def attributes() -> dict[str, str]:
    """Return where the run trains and with which versions."""
    return {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
