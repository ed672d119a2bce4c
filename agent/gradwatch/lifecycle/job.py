"""The job that a training belongs to, as its scheduler or the user names it, and which process of it is still alive.

A job that is preempted and requeued starts its program again. The same program, arguments and parameters in the same
job are the same training, whose run goes on (see ``resumption``).
"""

import hashlib
import multiprocessing
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

RUN_KEY: Final = "GRADWATCH_RUN_KEY"
_POD_SUFFIX: Final = re.compile(r"-[bcdfghjklmnpqrstvwxz2456789]{5}$")
"""What Kubernetes appends to the name of a Job for each of its pods."""
_COUNTING: Final = ("slurm", "torchelastic", "torchrun")
"""Kinds whose scheduler counts how often it has started a job: without a restart, nothing was interrupted."""
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Process(msgspec.Struct, frozen=True):
    """A process that can be told from every other one, on this machine and elsewhere."""

    host: str
    boot: str
    """Changes when the machine starts; containers share it with their machine."""
    namespace: str
    """Namespace in which the process id counts; each container has its own."""
    pid: int
    started: str
    """Ticks after the machine's start; empty where the system does not tell."""

    @property
    def is_alive(self) -> bool | None:
        """Return whether the process exists; None if that cannot be seen from here."""
        here = process_of(self.pid)
        # Machines of a cluster may have one name: another boot id may be another machine.
        if (here.host, here.boot, here.namespace) != (self.host, self.boot, self.namespace):
            return None
        if self.started:
            return here.started == self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class Job(msgspec.Struct, frozen=True):
    """The identity of a training within its job, as a run's attributes keep it."""

    kind: str
    """``key``, ``slurm``, ``kubernetes``, ``torchelastic`` or ``torchrun``; empty: the training is of no job."""
    training: str
    """Checksum over the job, the working directory, ``program``, and the number of the training within its process."""
    program: str
    """Checksum over program, arguments and the name of the run."""
    parameters: str
    """Checksum over the parameters that were there when the agent attached."""
    restarts: list[int]
    """How often the scheduler, and torchrun, have started it again."""
    instance: str
    """The container of an indexed Kubernetes Job; empty elsewhere, where other pods of a job do not replace it."""
    process: Process

    @property
    def prefix(self) -> str:
        """Return the digits with which the ids of its runs begin."""
        return self.training[:10]

    @property
    def counts_restarts(self) -> bool:
        """Return whether the scheduler says that it has started the job again."""
        return self.kind in _COUNTING

    @property
    def may_go_on(self) -> bool:
        """Return whether an earlier process of the job may have left a run: a counted first one follows nobody."""
        return bool(self.kind) and (not self.counts_restarts or any(self.restarts))


def process_of(pid: int) -> Process:
    """Return what is known of a process id on this machine."""
    return Process(
        host=socket.gethostname(),
        boot=_text_of("/proc/sys/kernel/random/boot_id"),
        namespace=_namespace(),
        pid=pid,
        started=_start_of(pid),
    )


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 -- pathlib does not read what is no path
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    fields = _text_of(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def job_of(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the kind of the job that this process is started in, and its name; two empty texts for none.

    Args:
        environment: the variables of the process.
    """
    if environment.get(RUN_KEY):
        return "key", environment[RUN_KEY]
    if environment.get("SLURM_JOB_ID"):
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        name = f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]
        return "slurm", f"{environment.get('SLURM_CLUSTER_NAME', '')} {name}"
    if name := _kubernetes_job(environment):
        return "kubernetes", name
    name = environment.get("TORCHELASTIC_RUN_ID", "")
    if name not in ("", "none"):
        return "torchelastic", name
    if environment.get("TORCHELASTIC_RESTART_COUNT"):
        launcher = process_of(os.getppid())
        return "torchrun", msgspec.json.encode(launcher).decode()
    return "", ""


def _kubernetes_job(environment: Mapping[str, str]) -> str:
    """Return the namespace and name of the Kubernetes Job of this pod; empty if it is of none."""
    if not environment.get("KUBERNETES_SERVICE_HOST"):
        return ""
    pod, index = environment.get("HOSTNAME") or socket.gethostname(), environment.get("JOB_COMPLETION_INDEX", "")
    # Others, Jenkins for one, set JOB_NAME as well: it counts beside an index only.
    name = (environment.get("JOB_NAME") if index else "") or _POD_SUFFIX.sub("", pod)
    if name == pod and not index:
        return ""
    return f"{_text_of(str(_NAMESPACE_FILE))} {name} {index}"


_trainings: dict[str, int] = {}
"""Checksum over job, directory, program, arguments and name -> number of trainings of this process that had it."""


def this_job(environment: Mapping[str, str], name: str, parameters: str) -> Job:
    """Return the identity of a training that begins in this process.

    Args:
        environment: the variables of the process.
        name: the name that the user gave to the run.
        parameters: checksum over the parameters.
    """
    kind, job = job_of(environment)
    # A child of multiprocessing has its parent's arguments, and does other work.
    child = multiprocessing.current_process().name if multiprocessing.parent_process() is not None else ""
    program = _checksum(*_program(), child, name)
    folder = _folder()
    same = _checksum(kind, job, folder, program, parameters)
    number = _trainings[same] = _trainings.get(same, -1) + 1
    process = process_of(os.getpid())
    # The pods that follow each other at an index may have the same name.
    container = " ".join((process.host, process.boot, process.namespace))
    indexed = kind == "kubernetes" and bool(environment.get("JOB_COMPLETION_INDEX"))
    return Job(
        kind=kind,
        training=_checksum(kind, job, folder, program, str(number)),
        program=program,
        parameters=parameters,
        restarts=[_count(environment, "SLURM_RESTART_COUNT"), _count(environment, "TORCHELASTIC_RESTART_COUNT")],
        instance=container if indexed else "",
        process=process,
    )


def _program() -> list[str]:
    """Return the program and its arguments; of ``python -c`` its text."""
    arguments = list(sys.argv)
    if arguments[:1] == ["-c"]:
        return sys.orig_argv[1:]
    return [str(Path(argument).absolute()) for argument in arguments[:1]] + arguments[1:]


def _folder() -> str:
    """Return the working directory; empty if it was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def _checksum(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
