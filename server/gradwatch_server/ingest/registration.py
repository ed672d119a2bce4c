"""Registration: makes a run known, adds parameters to a known run, or starts its next attempt."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server import steady_clock
from gradwatch_server.diagnosis import History, RunParameters, Thresholds
from gradwatch_server.errors import Refused, RetryAfter
from gradwatch_server.ingest import detector_state
from gradwatch_server.ingest.detector_state import DetectorState, DetectorStateCache
from gradwatch_server.ingest.parameter_order import Order, check_same_network, is_plain, order_of
from gradwatch_server.store import schema
from gradwatch_server.store.batch_store import stored_attempt
from gradwatch_server.store.parameters import (
    changed_parameters,
    insert_parameters,
    load_parameters,
    update_parameters,
)

_MOST_SEGMENTS = 5_000
"""Segments of all orders of a run that are kept, beside those of the latest attempt: they are read with each batch."""


def register(
    connection: sa.Connection,
    run_id: str,
    registration: wire.Registration,
    states: DetectorStateCache,
    thresholds: Thresholds,
    ahead_seconds: float,
    most_runs: int,
    after: int | None = None,
) -> bool:
    """Store a run, or what its next attempt adds to it; return whether the run is new.

    Args:
        connection: a transaction that writes.
        run_id: the run.
        registration: a registration that has passed ``check_registration``.
        states: the detector states of runs.
        thresholds: thresholds of the run's project.
        ahead_seconds: how far the clock that numbered the attempt is ahead of the server's, by which attempts are
            ordered.
        most_runs: most runs that a project may have.
        after: the run's latest attempt, as an agent knows it that goes on with the run; None: any.

    Raises:
        Refused: 409 if the run is of another project, has other parameters, or another process has begun a new attempt
            since ``after``; 429 if its project has no room for it.
    """
    now = steady_clock.now()
    # 1. Lock the run, if it is known.
    run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()).one_or_none()
    # 2. Number the attempt by the server's clock.
    attempts = {} if run is None else run.attempts
    attempt = stored_attempt(attempts, registration.attempt)
    if ahead_seconds and attempt > 0 and not _is_known(run, registration.attempt):
        attempt = min(max(1, attempt - round(1_000 * ahead_seconds)), wire.LARGEST_STEP)
        attempts = {**attempts, str(registration.attempt): attempt}
    registration = msgspec.structs.replace(registration, attempt=attempt)
    # 3. Store the run, or what is new of it.
    if run is None:
        if after is not None:
            raise Refused(409, "Another attempt", f"run {run_id!r} is not there any more")
        _check_room(connection, registration.project, most_runs)
        _insert_run(connection, run_id, registration, attempts, now, states)
        return True
    if run.project != registration.project:
        detail = f"run {run_id!r} is not in project {registration.project!r}: use another run id there"
        raise Refused(409, "Another project", detail)
    if after is not None and run.attempt not in (after, attempt):
        raise Refused(409, "Another attempt", f"another process goes on with run {run_id!r}")
    _extend(connection, run, registration, states, thresholds)
    _start_attempt(connection, run, registration, attempts, now)
    return False


def _is_known(run: sa.Row[Any] | None, number: int) -> bool:
    """Return whether an attempt of this number has been ordered already: who sends it again changes nothing."""
    if run is None:
        return False
    return str(number) in run.attempts or str(number) in run.first_steps or number == run.attempt


def _check_room(connection: sa.Connection, project: str, most: int) -> None:
    mine = sa.select(schema.runs.c.id).where(schema.runs.c.project == project).limit(most).subquery()
    if connection.execute(sa.select(sa.func.count()).select_from(mine)).scalar_one() >= most:
        detail = f"project {project!r} has {most} runs, as many as limits.runs_per_project allows: delete some"
        raise Refused(429, "Too many runs", detail, retry_after=RetryAfter.DISK_FULL)


def _insert_run(
    connection: sa.Connection,
    run_id: str,
    registration: wire.Registration,
    attempts: Mapping[str, int],
    now: float,
    states: DetectorStateCache,
) -> None:
    parameters, mark = registration.parameters, detector_state.new_mark()
    connection.execute(
        sa.insert(schema.runs).values(
            id=run_id,
            project=registration.project,
            name=registration.name or run_id,
            attempt=registration.attempt,
            attempts=attempts,
            started_at=registration.started_at or now,
            last_seen_at=now,
            parameter_count=len(parameters),
            statistics=[],
            coverage={},
            attributes=registration.attributes,
            dropped={},
            scalars={},
            memory_mark=mark,
        )
    )
    insert_parameters(connection, run_id, parameters, 0)
    # The first batches of a fleet that starts would otherwise wait until all of this was read back.
    states.put(run_id, DetectorState(RunParameters.of(parameters), History(), registration.attempt, mark=mark))


def _extend(
    connection: sa.Connection,
    run: sa.Row[Any],
    registration: wire.Registration,
    states: DetectorStateCache,
    thresholds: Thresholds,
) -> None:
    """Add new parameters to a known run; change the depths of known ones, and whether they are trained.

    The list may be in any order, and leave some out that this attempt has not found yet. An agent may send an earlier
    registration again, with fewer parameters than its attempt has listed since; it changes nothing.
    """
    listed, stored = registration.parameters, load_parameters(connection, run.id)
    check_same_network(run.id, stored, listed)
    if len(listed) < _listed_before(run, registration.attempt):
        return
    names = {parameter.name for parameter in stored}
    added = [parameter for parameter in listed if parameter.name not in names]
    by_name = {parameter.name: parameter for parameter in listed}
    aligned = [by_name.get(parameter.name, parameter) for parameter in stored]
    changed = changed_parameters(stored, aligned) if registration.attempt >= run.attempt else {}
    if changed or added or registration.attempt > run.attempt:
        _save_state(connection, run, states, thresholds)
    update_parameters(connection, run.id, changed)
    insert_parameters(connection, run.id, added, len(stored))
    _keep_order(connection, run, registration, [parameter.name for parameter in [*stored, *added]])


def _listed_before(run: sa.Row[Any], attempt: int) -> int:
    """Return how many parameters an attempt has listed; of one before the latest it is not known to the last one."""
    order = run.orders.get(str(attempt))
    if order is not None:
        return sum(length for _, length in order)
    return int(run.parameter_count) if attempt <= run.attempt else 0


def _keep_order(
    connection: sa.Connection, run: sa.Row[Any], registration: wire.Registration, names: Sequence[str]
) -> None:
    """Store how many parameters the run has, and the order of this attempt's, if that is not the run's."""
    attempt, orders = str(registration.attempt), dict(run.orders)
    order = order_of(names, registration.parameters)
    if registration.attempt < run.attempt and len(names) > run.parameter_count:
        orders.setdefault(
            str(run.attempt), [[0, run.parameter_count]]
        )  # the latest attempt has not listed the new ones
    if is_plain(order, len(names)):
        orders.pop(attempt, None)
    else:
        orders[attempt] = order
    orders = _bounded(orders)
    values = {"parameter_count": len(names), "orders": orders}
    if values != {"parameter_count": run.parameter_count, "orders": run.orders}:
        connection.execute(sa.update(schema.runs).where(schema.runs.c.id == run.id).values(values))


def _bounded(orders: Mapping[str, Order]) -> dict[str, Order]:
    """Return the orders by attempt, those beyond ``_MOST_SEGMENTS`` as empty: what comes of them is refused."""
    bounded: dict[str, Order] = {}
    segments = 0
    for attempt, order in sorted(orders.items(), key=lambda entry: -int(entry[0])):
        segments += len(order) if bounded else 0
        bounded[attempt] = order if segments <= _MOST_SEGMENTS else []
    return bounded


def _save_state(
    connection: sa.Connection, run: sa.Row[Any], states: DetectorStateCache, thresholds: Thresholds
) -> None:
    """Save the detector state before the parameters change, with which the samples could not be replayed."""
    if run.diagnosed_step is not None:
        state = states.current(connection, run, thresholds)
        detector_state.save(connection, run.id, state, run.diagnosed_step)
    changed = sa.update(schema.runs).where(schema.runs.c.id == run.id)
    connection.execute(changed.values(memory_mark=detector_state.new_mark()))


def _start_attempt(
    connection: sa.Connection,
    run: sa.Row[Any],
    registration: wire.Registration,
    attempts: Mapping[str, int],
    now: float,
) -> None:
    """Have the run's row describe the attempt that registers, if it is newer than the one that the row describes."""
    changes: dict[str, Any] = {"attempts": attempts} if attempts != run.attempts else {}
    if registration.attempt > run.attempt:
        changes = {
            "attempt": registration.attempt,
            "attempts": attempts,
            "attributes": registration.attributes,
            "last_seen_at": now,
            "scalar_steps": {},
            "dropped": {},
            "last_step": None,
            "diagnosed_step": None,
            "finished_at": None,
            "status": None,
            "exit_code": None,
        }
    if changes:
        connection.execute(sa.update(schema.runs).where(schema.runs.c.id == run.id).values(changes))
