"""The transaction behind every 2xx: sample rows, alerts, transitions and due deliveries of a batch commit together."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server import steady_clock
from gradwatch_server.alerting.run_alerts import RunAlerts
from gradwatch_server.diagnosis import History, Observation, Sample
from gradwatch_server.diagnosis.clip_advice import advise, name_threshold
from gradwatch_server.diagnosis.rules import exploding, nonfinite
from gradwatch_server.errors import Refused
from gradwatch_server.ingest import detector_state
from gradwatch_server.ingest.detector_state import DetectorState, DetectorStateCache
from gradwatch_server.ingest.diagnosis_pool import Diagnosed, DiagnosisPool
from gradwatch_server.ingest.parameter_order import in_run_order
from gradwatch_server.ingest.progress import progress
from gradwatch_server.ingest.registration import register
from gradwatch_server.ingest.validation import check_batch, check_fit, check_registration, with_states
from gradwatch_server.settings import Configuration
from gradwatch_server.store import batch_store, schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.group_commit import Deferred
from gradwatch_server.store.prepared import Prepared
from gradwatch_server.store.rollups import queries
from gradwatch_server.store.runs import RUN_ENDED

_ADVICE_SAMPLES = 100
"""Most samples before an explosion from which its remedy is derived."""


class Stored(msgspec.Struct, frozen=True):
    """The answer to a batch that is on disk."""

    id: str
    samples: int
    """How many of the batch's samples are stored."""
    duplicate: bool
    left_out: int = 0
    """How many are not, because a later attempt of the run has replaced their steps."""


class Registered(msgspec.Struct, frozen=True):
    """The answer to a registration."""

    id: str
    url: str
    created: bool


class _Diagnosis(NamedTuple):
    """A diagnosis of the samples of a batch that is under way."""

    state: DetectorState
    """The run's state before these samples."""
    losses: Mapping[int, float]
    """step -> loss, of the batch alone."""
    scalars: Mapping[int, Mapping[str, float]]
    """step -> scalars, of all samples of the batch."""
    samples: list[Sample]
    """Those after the last sample that has been diagnosed, by ascending steps."""
    wait: Callable[[], Diagnosed]


class Ingest:
    """Registers runs and stores batches; holds the detector states of the runs that report now."""

    def __init__(self, configuration: Configuration, public_url: str, pool: DiagnosisPool | None = None) -> None:
        self._configuration = configuration
        self._public_url = public_url
        self._pool = pool or DiagnosisPool()
        self._states = DetectorStateCache()
        self.batches = 0
        self.duplicates = 0
        self.samples = 0
        self.left_out = 0
        self.values = 0

    def configure(self, configuration: Configuration, public_url: str) -> None:
        """Use these limits, thresholds, routes and links from the next batch on."""
        self._configuration = configuration
        self._public_url = public_url

    def register(
        self,
        connection: sa.Connection,
        run_id: str,
        registration: wire.Registration,
        ahead_seconds: float = 0.0,
        after: int | None = None,
    ) -> Registered:
        """Store a run, or what its next attempt adds to it.

        Args:
            connection: a transaction that writes.
            run_id: the run.
            registration: the registration as the agent sent it.
            ahead_seconds: how far the agent's clock is ahead of the server's.
            after: the run's latest attempt, as the agent knows it; None: any.

        Raises:
            Refused: 409 where the id is taken by a run with other parameters, 422 where the content is wrong.
        """
        check_registration(registration, self._configuration.limits)
        thresholds = self._configuration.thresholds[registration.project]
        most_runs = self._configuration.limits.runs_per_project
        created = register(connection, run_id, registration, self._states, thresholds, ahead_seconds, most_runs, after)
        return Registered(run_id, f"{self._public_url}/runs/{run_id}", created)

    def store(self, connection: sa.Connection, run_id: str, batch: wire.Batch) -> Stored:
        """Store and diagnose a batch; raises as ``begin`` does."""
        begun = self.begin(connection, run_id, batch)
        return begun.finish() if isinstance(begun, Deferred) else begun

    def begin(self, connection: sa.Connection, run_id: str, batch: wire.Batch) -> Stored | Deferred[Stored]:
        """Store a batch once, and begin to diagnose its samples; ``finish`` of the result enters the findings.

        Raises:
            Refused: 404 for a run that is not registered, 422 where the content does not fit the run.
        """
        now = steady_clock.now()
        # 1. Lock the run, and check that the batch fits it.
        run = _locked_run.one_or_none(connection, {"of_run": run_id})
        if run is None:
            raise Refused(404, "Unknown run", f"run {run_id!r} is not registered: POST /api/v1/runs first")
        batch = msgspec.structs.replace(batch, attempt=batch_store.stored_attempt(run.attempts, batch.attempt))
        # 2. Claim the batch's id. A batch that is sent again changes nothing.
        fitting = self._claim(connection, run, batch, now)
        if fitting is None:
            return Stored(batch.id, 0, duplicate=True)
        batch = with_states(fitting)
        # 3. Begin to diagnose. While another process may do so, store the content.
        scalars = batch_store.scalars_by_step(batch)
        diagnosis = None
        if batch.attempt >= run.attempt:
            diagnosis = self._begin_diagnosis(connection, run, batch, scalars)
        changes = batch_store.insert_batch(connection, run, batch, scalars) | progress(run, batch, now)

        # 4. Once the diagnosis is there: alerts, and the run's row.
        def finish() -> Stored:
            entered = {}
            if diagnosis is not None:
                entered = self._enter_findings(connection, run, batch, diagnosis, now)
                if batch.end is not None:
                    entered |= self._end_run(connection, run, batch.end, changes.get("last_step", run.last_step))
            changed = changes | entered
            _update_run(tuple(changed)).execute(connection, changed | {"of_run": run_id})
            count = changes["arrivals"] - run.arrivals
            return Stored(batch.id, count, duplicate=False, left_out=len(batch.samples) - count)

        return Deferred(finish)

    def count(self, stored: Stored, batch: wire.Batch) -> None:
        """Count a batch that is on disk."""
        if stored.duplicate:
            self.duplicates += 1
            return
        self.batches += 1
        self.samples += stored.samples
        self.left_out += stored.left_out
        kept = sorted(batch.samples, key=lambda sample: sample.step)[
            : stored.samples
        ]  # a later attempt cuts off the end
        self.values += sum(vector.size for sample in kept for vector in sample.statistics.values())

    def _claim(self, connection: sa.Connection, run: sa.Row[Any], batch: wire.Batch, now: float) -> wire.Batch | None:
        """Check a batch and claim its id; return it in the order of the run, or None if it is stored already."""
        limits = self._configuration.limits
        check_batch(batch, limits)
        older = batch.attempt < run.attempt
        try:
            batch = in_run_order(batch, run.orders, run.parameter_count, run.attempt)
            check_fit(batch, run.parameter_count, run.coverage.get("scalars", {}), limits, older=older)
        except Refused:
            if _is_stored(connection, run.id, batch):  # it fitted then: the run may have gained parameters since
                return None
            raise
        row = {"run": run.id, "rank": batch.rank, "id": batch.id, "at": now}
        return None if _insert_batch_id.one_or_none(connection, row) is None else batch

    def _begin_diagnosis(
        self,
        connection: sa.Connection,
        run: sa.Row[Any],
        batch: wire.Batch,
        scalars: Mapping[int, Mapping[str, float]],
    ) -> _Diagnosis:
        """Begin to diagnose the samples that are newer than those that have been diagnosed."""
        thresholds = self._configuration.thresholds[run.project]
        state, batch_losses = self._states.current(connection, run, thresholds), _losses(batch)
        losses = state.losses | batch_losses
        samples = _new_samples(batch, run.diagnosed_step, scalars, sorted(losses.items()))
        state.keep_losses(losses, samples[-1].step if samples else run.diagnosed_step)
        wait = self._pool.begin(state.parameters, state.history, samples, thresholds)
        return _Diagnosis(state, batch_losses, scalars, samples, wait)

    def _enter_findings(
        self, connection: sa.Connection, run: sa.Row[Any], batch: wire.Batch, diagnosis: _Diagnosis, now: float
    ) -> dict[str, Any]:
        """Advance the run's alerts by the findings; return the new values of the run's row."""
        state, samples = diagnosis.state, diagnosis.samples
        alerts = RunAlerts(connection, run, self._configuration, self._public_url)
        step = samples[-1].step if samples else run.diagnosed_step
        self._check_late_samples(connection, run, batch, diagnosis, alerts)
        state.history, found = diagnosis.wait()
        for sample, findings in zip(samples, found, strict=True):
            alerts.advance(findings, sample.step, sample.at)
            alerts.advance_stalled(None, sample.step, now)
        _name_module(connection, run.id, state, alerts)
        _name_threshold(connection, run.id, alerts)
        if run.finished_at is not None and batch.end is None:
            at = max([run.finished_at, *(sample.at for sample in batch.samples)])
            alerts.resolve_all(step or 0, at, f"{RUN_ENDED}: {run.status}")
        alerts.save()
        self._keep_state(connection, run, batch, diagnosis, step)
        return {"diagnosed_step": step, "memory_mark": state.mark}

    def _check_late_samples(
        self,
        connection: sa.Connection,
        run: sa.Row[Any],
        batch: wire.Batch,
        diagnosis: _Diagnosis,
        alerts: RunAlerts,
    ) -> None:
        """Apply the rule ``nonfinite`` to samples that came after later ones: all other rules need the history."""
        late = [sample for sample in batch.samples if sample.step <= _diagnosed_step(run)]
        limits, parameters = self._configuration.thresholds[run.project][nonfinite.RULE], diagnosis.state.parameters
        for sample in sorted(late, key=lambda sample: sample.step):
            if alerts.first_step(nonfinite.RULE.name) is not None:
                return
            scalars = diagnosis.scalars[sample.step]
            seen = Sample(step=sample.step, at=sample.at, statistics=sample.statistics, scalars=scalars)
            found = nonfinite.RULE.judge(Observation.of(parameters, History(), seen), limits)
            if found is not None and not _had_alert(connection, run.id, nonfinite.RULE.name, sample.step):
                alerts.add_late(found, sample.step, sample.at)

    def _keep_state(
        self, connection: sa.Connection, run: sa.Row[Any], batch: wire.Batch, diagnosis: _Diagnosis, step: int | None
    ) -> None:
        """Keep the run's detector state for the next batch, and save it if that is due."""
        state = diagnosis.state
        state.unsaved_samples += len(diagnosis.samples)
        state.mark = detector_state.new_mark(run.memory_mark)
        # What came late was not diagnosed, but a replay would include it: the state is saved before that can happen.
        steps = (*diagnosis.losses, *(sample.step for sample in batch.samples))
        late = any(each <= _diagnosed_step(run) for each in steps)
        many = state.unsaved_samples >= detector_state.SAVED_EVERY_SAMPLES
        if step is not None and (late or many or (state.unsaved_samples and (state.loaded or batch.end))):
            detector_state.save(connection, run.id, state, step)
        self._states.put(run.id, state)

    def _end_run(self, connection: sa.Connection, run: sa.Row[Any], end: wire.End, step: int | None) -> dict[str, Any]:
        """Resolve the alerts of a run that has ended; return the new values of the run's row."""
        alerts = RunAlerts(connection, run, self._configuration, self._public_url)
        alerts.resolve_all(step or 0, end.at, f"{RUN_ENDED}: {end.status}")
        alerts.save()
        return {"finished_at": end.at, "status": end.status, "exit_code": end.exit_code}


_columns = [column for column in schema.runs.c if column.name != "attributes"]
"""What a batch has to know of its run; attributes may have a megabyte."""
_mine = schema.runs.c.id == sa.bindparam("of_run")
_locked_run = Prepared(lambda _: sa.select(*_columns).where(_mine).with_for_update())
_insert_batch_id = Prepared(
    lambda engine: upsert(engine, schema.batches).on_conflict_do_nothing().returning(schema.batches.c.id),
    ("run", "rank", "id", "at"),
)
"""Yields a row only if the batch is new."""


@lru_cache(256)
def _update_run(names: Sequence[str]) -> Prepared:
    """Return the update of these columns of a run."""
    return Prepared(lambda _: sa.update(schema.runs).where(_mine), (*names, "of_run"))


def _is_stored(connection: sa.Connection, run_id: str, batch: wire.Batch) -> bool:
    """Return whether a batch of this id is stored."""
    table = schema.batches
    same = (table.c.run == run_id, table.c.rank == batch.rank, table.c.id == batch.id)
    return connection.execute(sa.select(table.c.id).where(*same)).first() is not None


def _diagnosed_step(run: sa.Row[Any]) -> int:
    """Return the step of the last sample that has been diagnosed; -1 if there is none."""
    return -1 if run.diagnosed_step is None else int(run.diagnosed_step)


def _losses(batch: wire.Batch) -> dict[int, float]:
    """Return step -> loss of a batch; the loss that a sample carries wins over the trail's."""
    of_samples = {
        sample.step: wire.deserialise(sample.scalars["loss"]) for sample in batch.samples if "loss" in sample.scalars
    }
    return detector_state.trail_losses(batch.trail) | of_samples


def _new_samples(
    batch: wire.Batch,
    after: int | None,
    scalars: Mapping[int, Mapping[str, float]],
    losses: Sequence[tuple[int, float]],
) -> list[Sample]:
    """Return the samples after a step for the rules, by ascending steps, each with the losses since the one before."""
    samples = []
    earlier = after
    for sample in sorted(batch.samples, key=lambda sample: sample.step):
        if after is not None and sample.step <= after:
            continue
        samples.append(
            Sample(
                step=sample.step,
                at=sample.at,
                statistics=sample.statistics,
                scalars=scalars[sample.step],
                losses=detector_state.losses_between(losses, earlier, sample.step),
            )
        )
        earlier = sample.step
    return samples


def _had_alert(connection: sa.Connection, run_id: str, rule: str, step: int) -> bool:
    """Return whether a resolved alert of a rule was open at a step."""
    table = schema.alerts
    mine = table.c.run == run_id, table.c.rule == rule, table.c.state == "resolved"
    then = table.c.first_step <= step, table.c.resolved_step >= step
    return connection.execute(sa.select(table.c.id).where(*mine, *then).limit(1)).first() is not None


def _name_module(connection: sa.Connection, run_id: str, state: DetectorState, alerts: RunAlerts) -> None:
    """Have the alert for non-finite numbers name the module that the agent's event names.

    Alert and event may come in either order.
    """
    first_step = alerts.first_step(nonfinite.RULE.name)
    if first_step is None:
        return
    table = schema.events
    since = first_step - state.history.every_steps
    mine = table.c.run == run_id, table.c.kind == nonfinite.EVENT, table.c.step >= since
    order = table.c.step, table.c.id
    event = connection.execute(sa.select(table).where(*mine).order_by(*order).limit(1)).one_or_none()
    if event is not None:
        names = state.parameters.names
        alerts.refine(nonfinite.RULE.name, lambda found: nonfinite.refine(found, names, event.parameter, event.message))


def _name_threshold(connection: sa.Connection, run_id: str, alerts: RunAlerts) -> None:
    """Have the remedy of an explosion name the clipping threshold that the steps before it recommend."""
    first_step = alerts.first_step(exploding.RULE.name)
    if first_step is None or not alerts.notifies(exploding.RULE.name):
        return
    histograms = queries.read_histograms(connection, run_id, None, first_step - 1, _ADVICE_SAMPLES)
    recommended = advise(*histograms).recommended
    if recommended is not None:
        alerts.refine(exploding.RULE.name, lambda found: name_threshold(found, recommended))
