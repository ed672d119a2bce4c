"""Going on with the run of a job that was preempted, as a new attempt of it.

Only where this process belongs to a job, or was restored from a checkpoint that names a run, the server is asked once,
when the agent attaches, which waits for at most twice ``resume_seconds``. If it does not answer, the training has a run
of its own.
"""

import logging
import os
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from torch import nn

from gradwatch import wire
from gradwatch.delivery.transport import HttpTransport
from gradwatch.lifecycle.job import Job, this_job
from gradwatch.model.discovery import find_parameters, shorten_name
from gradwatch.ranks.exchange import RankExchange
from gradwatch.settings import RUN_ID, Settings

_log = logging.getLogger("gradwatch")

ATTRIBUTE: Final = "job"
"""Attribute of a run that keeps its ``Job`` as JSON."""
_SILENT_SECONDS: Final = 300.0
"""A run whose process cannot be seen from here counts as interrupted when it was not heard of for so long: nothing is
heard of one that evaluates for minutes."""


class Resumable(msgspec.Struct, frozen=True):
    """A run that did not end by itself, as the server tells it."""

    id: str
    attempt: int
    status: str | None
    last_step: int | None
    silent_seconds: float
    attributes: dict[str, str]
    parameters: str


class Begun(msgspec.Struct, frozen=True):
    """The run that a training begins, or goes on with."""

    id: str
    resumed: bool
    attributes: dict[str, str]
    last_step: int = 0
    """The last step that the server has stored of it; 0 for none."""
    by_itself: bool = False
    """Whether it is resumed because its job was interrupted, and not because the user named it."""


def _named_run(settings: Settings) -> str | None:
    """Return the id of the run that the user wants to go on with."""
    return settings.run if settings.run is not None and RUN_ID.fullmatch(settings.run) else None


def _new_run_id(job: Job | None) -> str:
    """Return the id of a new run; it tells the job, so that the job's runs are found."""
    return f"run-{job.prefix}{secrets.token_hex(3)}" if job is not None and job.kind else f"run-{secrets.token_hex(8)}"


def interrupted(runs: Iterable[Resumable], job: Job, *, checkpoint: str | None = None) -> Resumable | None:
    """Return the run that a training is to go on with; None if it has to begin one of its own.

    Args:
        runs: the last started first.
        job: the training's identity.
        checkpoint: the run that the checkpoint names which the training was restored from.
    """
    found = [run for run in runs if _is_interrupted(run, job, from_checkpoint=run.id == checkpoint)]
    return next((run for run in found if run.id == checkpoint), found[0] if found else None)


def _is_interrupted(run: Resumable, job: Job, *, from_checkpoint: bool) -> bool:
    try:
        before = msgspec.json.decode(run.attributes.get(ATTRIBUTE, ""), type=Job)
    except msgspec.MsgspecError:
        return False
    # 1. It is the same training. A checkpoint names its run whatever job it was trained in.
    if (before.program if from_checkpoint else before.training) != (job.program if from_checkpoint else job.training):
        return False
    if job.parameters not in (before.parameters, run.parameters):
        return False
    # 2. It did not end by itself: what failed goes on only where something has started it again.
    again = before.restarts < job.restarts
    replaced = bool(job.instance) and before.instance != job.instance
    if run.status == "completed" or (job.counts_restarts and not (again or from_checkpoint)):
        return False
    if run.status == "failed" and not (again or replaced or from_checkpoint or job.kind == "key"):
        return False
    # 3. Nobody else is training it. Several pods of a job may be alive: another one is no restart.
    alive = before.process.is_alive
    if alive is None:
        return again or run.status is not None or run.silent_seconds >= _SILENT_SECONDS
    return not alive


def unwatched(settings: Settings) -> Begun:
    """Return what stands for the run where nothing is reported."""
    named = _named_run(settings)
    return Begun(named or _new_run_id(None), resumed=named is not None, attributes={})


def begin_run(
    settings: Settings,
    models: Sequence[nn.Module],
    ranks: RankExchange | None,
    attempt: int,
    attributes: Mapping[str, str],
    *,
    checkpoint: str | None,
) -> Begun:
    """Return the run of a training: the one that is named, the interrupted one of its job, or a new one.

    Args:
        settings: the address of the server, and what the user says of the run.
        models: the watched models.
        ranks: the ranks of a sharded training; rank 0 tells the others at which step they go on.
        attempt: number of the new attempt.
        attributes: those of the new attempt.
        checkpoint: the run that the checkpoint names which the training was restored from; None: where no callback
            keeps it with checkpoints.
    """
    named = _named_run(settings)
    job, found, known = None, None, dict(attributes)
    try:
        parameters = ((shorten_name(info.name), info.shape) for info in find_parameters(models))
        job = this_job(os.environ, settings.training_name, wire.checksum_of_parameters(parameters))
        if job.kind or checkpoint is not None:
            known[ATTRIBUTE] = msgspec.json.encode(job).decode()
        if named is None and settings.resume_seconds and (job.may_go_on or checkpoint):
            found = _resume_on_all_ranks(settings, job, ranks, attempt, known, checkpoint)
    except Exception:  # the training has a run of its own then
        _log.debug("the run of this job cannot be looked for", exc_info=True)
    if named is not None:
        return Begun(named, resumed=True, attributes=known)
    if found is not None:
        return msgspec.structs.replace(found, attributes=known)
    return Begun(_new_run_id(job), resumed=False, attributes=known)


def _resume_on_all_ranks(
    settings: Settings,
    job: Job,
    ranks: RankExchange | None,
    attempt: int,
    attributes: Mapping[str, str],
    checkpoint: str | None,
) -> Begun | None:
    if ranks is not None and not ranks.own_connection:
        return None  # ranks that go on at different steps are worse than a run of their own
    if ranks is not None and ranks.rank > 0:
        run, step = ranks.start(2 * settings.resume_seconds + 1)
        return Begun(run, resumed=True, attributes={}, last_step=step, by_itself=True) if run else None
    found = None
    try:
        found = _resume_in_time(settings, job, attempt, attributes, checkpoint)
    finally:
        if ranks is not None:
            ranks.tell_start(found.id if found else "", found.last_step if found else 0)
    return found


def _resume_in_time(
    settings: Settings, job: Job, attempt: int, attributes: Mapping[str, str], checkpoint: str | None
) -> Begun | None:
    """Do what ``resume`` does within twice ``resume_seconds``; return None where it takes longer.

    Limits of time of single reads bound neither the look-up of a name nor a server that sends a byte at a time.
    """
    found: list[Begun | None] = []
    late = threading.Event()

    def look() -> None:
        try:
            found.append(resume(settings, job, attempt, attributes, checkpoint=checkpoint, late=late))
        except Exception:  # as if the server had not answered
            _log.debug("the run of this job cannot be looked for", exc_info=True)

    thread = threading.Thread(target=look, name="gradwatch-resume", daemon=True)
    thread.start()
    thread.join(2 * settings.resume_seconds)
    late.set()
    return found[0] if found else None


def resume(
    settings: Settings,
    job: Job,
    attempt: int,
    attributes: Mapping[str, str],
    *,
    checkpoint: str | None,
    late: threading.Event,
) -> Begun | None:
    """Look for the interrupted run of a training, and begin a new attempt of it before anybody else does.

    Args:
        settings: the address of the server, and the project.
        job: the training's identity.
        attempt: number of the new attempt.
        attributes: those of the new attempt.
        checkpoint: the run that the checkpoint names which the training was restored from.
        late: set when the training has a run of its own already: no attempt begins then.
    """
    query = {"project": settings.project}
    query |= {"job": job.prefix} if job.may_go_on else {}
    query |= {"run": checkpoint} if checkpoint else {}
    http = HttpTransport(settings.url, settings.token)
    try:
        answer = http.get("/api/v1/resumable", query, settings.resume_seconds)
        runs = [] if answer is None else _resumable(answer)
        found = interrupted(runs, job, checkpoint=checkpoint)
        if found is None or late.is_set():
            return None
        registration = wire.Registration(
            project=settings.project,
            id=found.id,
            attempt=attempt,
            started_at=attempt / 1000,
            parameters=[],
            attributes=dict(attributes),
        )
        path = f"/api/v1/runs?after={found.attempt}"
        result = http.post(path, wire.encode(registration), settings.resume_seconds)
        if result.outcome != "committed":
            return None
        return Begun(found.id, resumed=True, attributes={}, last_step=found.last_step or 0, by_itself=True)
    finally:
        http.close()


def _resumable(document: Any) -> Sequence[Resumable]:
    try:
        return msgspec.convert(document, list[Resumable])
    except msgspec.ValidationError:  # another server
        return []
