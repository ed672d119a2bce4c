"""Facts about the training process: its rank, a default name for its run, its host and versions."""

import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Final

import torch

_PARENT: Final = "GRADWATCH_PARENT_RUN"
"""Variable that tells child processes which run their parent reports, and its process id."""
_RANKS: Final = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
"""Variables in which torchrun and schedulers tell the rank, before there is a process group."""


def rank() -> int:
    """Return the rank of this process; only rank 0 reports, since in data parallel training all gradients are equal."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    given = (os.environ.get(name, "") for name in _RANKS)
    return next((int(rank) for rank in given if rank.isdigit()), 0)


def default_run_name() -> str:
    """Return the default name of a run: the script and the local time."""
    return f"{_script_name(sys.argv[0] if sys.argv else '')} {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _script_name(argument: str) -> str:
    """Return the script's name without its folder and suffix, or the package of ``python -m package``."""
    path = Path(argument)
    if argument in ("", "-", "-c", "-m"):
        return "python"
    if path.stem in ("ipykernel_launcher", "colab_kernel_launcher"):
        return Path(os.environ.get("JPY_SESSION_NAME", "")).stem or "notebook"
    return path.parent.name if path.stem == "__main__" else path.stem


def name_parent(run_id: str) -> None:
    """Tell child processes from now on which run this process reports; an empty text: none any more."""
    own = f" {os.getpid()}"
    if run_id:
        os.environ[_PARENT] = run_id + own
    elif os.environ.get(_PARENT, "").endswith(own):
        del os.environ[_PARENT]


def _parent() -> dict[str, str]:
    run, _, process = os.environ.get(_PARENT, "").partition(" ")
    return {"parent_run": run} if run and process != str(os.getpid()) else {}


def attributes() -> dict[str, str]:
    """Return the attributes of a registration that describe the process: host, pid, versions, the parent's run."""
    return {
        **_parent(),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
