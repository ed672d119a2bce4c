"""The transaction behind every 2xx: sample rows, diagnosis, alerts, transitions and due deliveries commit together."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.alerting.run_alerts import RunAlerts
from gradwatch_server.diagnosis import Layout, Memory, Reading
from gradwatch_server.diagnosis.clip_advice import advise
from gradwatch_server.diagnosis.rules import exploding, nonfinite
from gradwatch_server.errors import Refused
from gradwatch_server.ingest import detector_state
from gradwatch_server.ingest.detector_state import Memories, Watched
from gradwatch_server.ingest.diagnosis_pool import Examiner
from gradwatch_server.ingest.diagnosis_worker import Examined
from gradwatch_server.ingest.validation import LARGEST_STEP, check_batch, check_fit, check_registration
from gradwatch_server.settings import Configuration
from gradwatch_server.store import batch_store, queries, schema
from gradwatch_server.store.database import upsert
from gradwatch_server.store.group_commit import Halfway
from gradwatch_server.store.runs import RUN_ENDED

_ADVISED = 100
"""Samples before an explosion that its remedy is taken from, at most."""
_SLOWER = 5.0
"""Times the usual interval that one batch counts at most."""


class Stored(msgspec.Struct, frozen=True):
    """The answer to a batch: it is on disk."""

    id: str
    samples: int
    duplicate: bool


class Registered(msgspec.Struct, frozen=True):
    """The answer to a registration."""

    id: str
    url: str
    created: bool


class _Look(NamedTuple):
    """A look at the samples of a batch, while it lasts."""

    watched: Watched
    told: Mapping[int, float]
    """Losses that the batch tells of, by their steps."""
    readings: list[Reading]
    examined: Callable[[], Examined]
    """Waits for what comes of it."""


class Ingest:
    """Registers runs and stores batches; holds the diagnosis' memory of the runs that report now."""

    def __init__(self, configuration: Configuration, public_url: str, examiner: Examiner | None = None) -> None:
        self._configuration = configuration
        self._public_url = public_url
        self._examiner = examiner or Examiner()
        self._memories = Memories()
        self.batches = 0
        self.duplicates = 0
        self.samples = 0
        self.values = 0

    def configure(self, configuration: Configuration, public_url: str) -> None:
        """Use these limits, thresholds, routes and links from the next batch on."""
        self._configuration = configuration
        self._public_url = public_url

    def register(
        self, connection: sa.Connection, run_id: str, registration: wire.Registration, ahead_seconds: float = 0.0
    ) -> Registered:
        """Store a run, or what its next attempt adds to it.

        Args:
            ahead_seconds: how far the clock is ahead that numbered the attempt; it is ordered by the server's clock.

        Raises:
            Refused: 409 where the id is taken by a run with other parameters, 422 where the content is wrong.
        """
        check_registration(registration, self._configuration.limits)
        now = time.time()
        known = connection.execute(
            sa.select(schema.runs).where(schema.runs.c.id == run_id).with_for_update()
        ).one_or_none()
        answer = Registered(run_id, f"{self._public_url}/runs/{run_id}", known is None)
        attempts = {} if known is None else known.attempts
        attempt = _effective(attempts, registration.attempt)
        if ahead_seconds and attempt == registration.attempt > 0:
            attempt = min(max(1, attempt - round(1_000 * ahead_seconds)), LARGEST_STEP)
            attempts = {**attempts, str(registration.attempt): attempt}
        registration = msgspec.structs.replace(registration, attempt=attempt)
        if known is None:
            mark = detector_state.new_mark()
            connection.execute(
                sa.insert(schema.runs).values(
                    id=run_id,
                    project=registration.project,
                    name=registration.name or run_id,
                    attempt=attempt,
                    attempts=attempts,
                    started_at=registration.started_at or now,
                    last_seen_at=now,
                    parameter_count=len(registration.parameters),
                    statistics=[],
                    coverage={},
                    attributes=registration.attributes,
                    dropped={},
                    scalars={},
                    memory_mark=mark,
                )
            )
            self._insert_parameters(connection, run_id, registration.parameters, 0)
            # A fleet that starts would have its first batches wait until all of this was read back.
            self._memories.put(run_id, Watched(Layout.of(registration.parameters), Memory(), attempt, mark=mark))
            return answer
        if known.project != registration.project:
            detail = f"run {run_id!r} is not in project {registration.project!r}: use another run id there"
            raise Refused(409, "Another project", detail)
        self._extend(connection, run_id, registration, known)
        if attempt > known.attempt:
            resumed = {
                "attempt": attempt,
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
            connection.execute(sa.update(schema.runs).where(schema.runs.c.id == run_id).values(resumed))
        elif attempts != known.attempts:
            connection.execute(sa.update(schema.runs).where(schema.runs.c.id == run_id).values(attempts=attempts))
        return answer

    def _extend(
        self, connection: sa.Connection, run_id: str, registration: wire.Registration, known: sa.Row[Any]
    ) -> None:
        """Append parameters; change what may change of the known ones: depths, and whether they are trained.

        What an attempt registered before the run gained parameters comes again where its agent left it behind.
        """
        count = known.parameter_count
        stored = connection.execute(
            sa.select(*schema.parameters.c["position", "name", "depth", "trainable"])
            .where(schema.parameters.c.run == run_id)
            .order_by("position")
        ).all()
        listed = registration.parameters
        for row, parameter in zip(stored, listed, strict=False):
            if row.name != parameter.name:
                detail = f"run {run_id!r} has parameter {row.name!r} at {row.position}, not {parameter.name!r}"
                raise Refused(409, "Another run", f"{detail}: use another run id for another network")
        if len(listed) < count and registration.attempt <= known.attempt:
            return
        if len(listed) < count:
            detail = f"run {run_id!r} has {count} parameters already, the registration lists {len(listed)}"
            raise Refused(409, "Parameters missing", f"{detail}: list the known ones first, new ones after them")
        told = {
            row.position: (row.depth if parameter.depth is None else parameter.depth, parameter.trainable)
            for row, parameter in zip(stored, listed, strict=False)
        }
        changed = [
            {"at": row.position, "to": told[row.position][0], "trains": told[row.position][1]}
            for row in stored
            if registration.attempt >= known.attempt and told[row.position] != (row.depth, row.trainable)
        ]
        if changed or len(listed) > count or registration.attempt > known.attempt:
            self._put_down(connection, known)
        if changed:
            connection.execute(
                sa.update(schema.parameters)
                .where(schema.parameters.c.run == run_id, schema.parameters.c.position == sa.bindparam("at"))
                .values(depth=sa.bindparam("to"), trainable=sa.bindparam("trains")),
                changed,
            )
        if len(listed) > count:
            self._insert_parameters(connection, run_id, listed[count:], count)
            connection.execute(
                sa.update(schema.runs).where(schema.runs.c.id == run_id).values(parameter_count=len(listed))
            )

    def _put_down(self, connection: sa.Connection, run: sa.Row[Any]) -> None:
        """Store what is remembered of a run as it is: once it has changed, its samples would be replayed as others."""
        if run.diagnosed_step is not None:
            detector_state.save(connection, run.id, self._watch(connection, run), run.diagnosed_step)
        changed = sa.update(schema.runs).where(schema.runs.c.id == run.id)
        connection.execute(changed.values(memory_mark=detector_state.new_mark()))

    def _insert_parameters(
        self, connection: sa.Connection, run_id: str, listed: Sequence[wire.Parameter], first: int
    ) -> None:
        rows = [
            {
                "run": run_id,
                "position": position,
                "name": parameter.name,
                "shape": parameter.shape,
                "dtype": parameter.dtype,
                "depth": position if parameter.depth is None else parameter.depth,
                "units": parameter.units,
                "trainable": parameter.trainable,
                "kind": parameter.kind,
            }
            for position, parameter in enumerate(listed, first)
        ]
        if rows:
            connection.execute(sa.insert(schema.parameters), rows)

    def store(self, connection: sa.Connection, run_id: str, batch: wire.Batch) -> Stored:
        """Store a batch once, diagnose its samples and write what follows from them; raises what ``begin`` does."""
        begun = self.begin(connection, run_id, batch)
        return begun.finish() if isinstance(begun, Halfway) else begun

    def begin(self, connection: sa.Connection, run_id: str, batch: wire.Batch) -> Stored | Halfway[Stored]:
        """Store a batch once, and begin to diagnose its samples; to finish writes what follows from them.

        Raises:
            Refused: 404 for a run that is not registered, 422 where the content does not fit the run.
        """
        now = time.time()
        limits = self._configuration.limits
        run = connection.execute(_locked_run, {"of_run": run_id}).one_or_none()
        if run is None:
            raise Refused(404, "Unknown run", f"run {run_id!r} is not registered: POST /api/v1/runs first")
        check_batch(batch, limits)
        batch = msgspec.structs.replace(batch, attempt=_effective(run.attempts, batch.attempt))
        older = batch.attempt < run.attempt
        try:
            check_fit(batch, run.parameter_count, run.coverage.get("scalars", {}), limits, older=older)
        except Refused:
            if self._knows(connection, run_id, batch):  # it fitted once: the run may have gained parameters since
                return Stored(batch.id, 0, duplicate=True)
            raise
        if not self._claim(connection, run_id, batch, now):
            return Stored(batch.id, 0, duplicate=True)
        scalars = batch_store.scalars_by_step(batch)
        look = None if older else self._look(connection, run, batch, scalars)
        changes = batch_store.put(connection, run, batch, scalars)
        changes |= self._progress(run, batch, now)

        def finish() -> Stored:
            found = {} if look is None else self._diagnose(connection, run, look, batch, scalars, now)
            if look is not None and batch.end is not None:
                found |= self._finish(connection, run, batch.end, changes.get("last_step", run.last_step))
            connection.execute(_update_run, changes | found | {"of_run": run_id})
            return Stored(batch.id, len(batch.samples), duplicate=False)

        return Halfway(finish)

    def count(self, stored: Stored, batch: wire.Batch) -> None:
        """Count a batch that is on disk."""
        if stored.duplicate:
            self.duplicates += 1
            return
        self.batches += 1
        self.samples += len(batch.samples)
        self.values += sum(vector.size for sample in batch.samples for vector in sample.statistics.values())

    @staticmethod
    def _knows(connection: sa.Connection, run_id: str, batch: wire.Batch) -> bool:
        """Return whether a batch of this id is stored."""
        table = schema.batches
        same = (table.c.run == run_id, table.c.rank == batch.rank, table.c.id == batch.id)
        return connection.execute(sa.select(table.c.id).where(*same)).first() is not None

    def _claim(self, connection: sa.Connection, run_id: str, batch: wire.Batch, now: float) -> bool:
        """Remember the batch's id; return False where it is known already."""
        row = {"run": run_id, "rank": batch.rank, "id": batch.id, "at": now}
        return connection.execute(_insert_batch(connection.dialect.name), row).one_or_none() is not None

    def _progress(self, run: sa.Row[Any], batch: wire.Batch, now: float) -> dict[str, Any]:
        changes: dict[str, Any] = {"last_seen_at": now, "sample_count": run.sample_count + len(batch.samples)}
        if batch.attempt >= run.attempt:
            known = run.scalar_steps
            latest = {name: told for name, told in _latest(batch).items() if told[0] >= known.get(name, 0)}
            changes["scalars"] = run.scalars | batch_store.spelled({name: value for name, (_, value) in latest.items()})
            changes["scalar_steps"] = known | {name: step for name, (step, _) in latest.items()}
            dropped = msgspec.to_builtins(batch.dropped)
            changes["dropped"] = {name: max(count, run.dropped.get(name, 0)) for name, count in dropped.items()}
        if batch.samples:
            times = sorted(sample.at for sample in batch.samples)
            span = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else now - run.last_seen_at
            usual = run.usual_interval_seconds
            slow = _SLOWER * (usual or span)  # a long pause does not become usual
            changes["usual_interval_seconds"] = span if usual is None else 0.8 * usual + 0.2 * min(span, slow)
        steps = [sample.step for sample in batch.samples]
        steps += [max(scalar.steps) for scalar in batch.trail.values() if scalar.steps]
        if steps and batch.attempt >= run.attempt:
            changes["last_step"] = max([*steps, run.last_step or 0])
        return changes

    def _look(
        self,
        connection: sa.Connection,
        run: sa.Row[Any],
        batch: wire.Batch,
        scalars: Mapping[int, Mapping[str, float]],
    ) -> _Look:
        """Begin to look at what the rules have not seen yet."""
        watched, told = self._watch(connection, run), _losses(batch)
        losses = watched.losses | told
        readings = _readings(batch, run.diagnosed_step, scalars, sorted(losses.items()))
        watched.wait(losses, readings[-1].step if readings else run.diagnosed_step)
        thresholds = self._configuration.thresholds(run.project)
        examined = self._examiner.begin(watched.layout, watched.memory, readings, thresholds)
        return _Look(watched, told, readings, examined)

    def _diagnose(
        self,
        connection: sa.Connection,
        run: sa.Row[Any],
        look: _Look,
        batch: wire.Batch,
        scalars: Mapping[int, Mapping[str, float]],
        now: float,
    ) -> dict[str, Any]:
        watched, told, readings, examined = look
        alerts = RunAlerts(connection, run, self._configuration, self._public_url)
        step = readings[-1].step if readings else run.diagnosed_step
        self._look_at_late(connection, run, watched, batch, scalars, alerts)
        watched.memory, found = examined()
        for reading, findings in zip(readings, found, strict=True):
            alerts.advance(findings, reading.step, reading.at)
            alerts.advance_stalled(None, reading.step, now)
        self._name_module(connection, run.id, watched, alerts)
        self._name_threshold(connection, run.id, alerts)
        if run.finished_at is not None and batch.end is None:
            at = max([run.finished_at, *(sample.at for sample in batch.samples)])
            alerts.resolve_all(step or 0, at, f"{RUN_ENDED}: {run.status}")
        alerts.save()
        watched.unsaved += len(readings)
        watched.mark = detector_state.new_mark(run.memory_mark)
        known = -1 if run.diagnosed_step is None else run.diagnosed_step
        late = any(step <= known for step in (*told, *(sample.step for sample in batch.samples)))
        due = watched.unsaved >= detector_state.SAVED_EVERY_SAMPLES or (
            watched.unsaved and (watched.fresh or batch.end)
        )
        if step is not None and (due or late):  # what came late was not looked at, and would be in a replay
            detector_state.save(connection, run.id, watched, step)
        self._memories.put(run.id, watched)
        return {"diagnosed_step": step, "memory_mark": watched.mark}

    def _look_at_late(
        self,
        connection: sa.Connection,
        run: sa.Row[Any],
        watched: Watched,
        batch: wire.Batch,
        scalars: Mapping[int, Mapping[str, float]],
        alerts: RunAlerts,
    ) -> None:
        """Look for what is not finite in samples that came after later ones: no other rule does without history."""
        known = -1 if run.diagnosed_step is None else run.diagnosed_step
        late = [sample for sample in batch.samples if sample.step <= known]
        limits = self._configuration.thresholds(run.project).nonfinite
        for sample in sorted(late, key=lambda sample: sample.step):
            if alerts.first_step(nonfinite.RULE) is not None:
                return
            reading = Reading(
                step=sample.step, at=sample.at, statistics=sample.statistics, scalars=scalars[sample.step]
            )
            found = nonfinite.find(watched.layout, Memory(), reading, reading.profile(watched.layout), limits)
            if found is not None and not _was_told(connection, run.id, nonfinite.RULE, sample.step):
                alerts.add_late(found, sample.step, sample.at)

    @staticmethod
    def _name_module(connection: sa.Connection, run_id: str, watched: Watched, alerts: RunAlerts) -> None:
        """Have the alert for non-finite numbers name the module that the agent found, whichever of them came first."""
        first_step = alerts.first_step(nonfinite.RULE)
        if first_step is None:
            return
        table = schema.events
        since = first_step - watched.memory.every_steps
        known = table.c.run == run_id, table.c.kind == nonfinite.EVENT, table.c.step >= since
        order = table.c.step, table.c.id
        event = connection.execute(sa.select(table).where(*known).order_by(*order).limit(1)).one_or_none()
        if event is not None:
            names = watched.layout.names
            alerts.refine(nonfinite.RULE, lambda found: nonfinite.refine(found, names, event.parameter, event.message))

    @staticmethod
    def _name_threshold(connection: sa.Connection, run_id: str, alerts: RunAlerts) -> None:
        """Have the remedy of an explosion name the threshold that the steps before it recommend."""
        first_step = alerts.first_step(exploding.RULE)
        if first_step is None or not alerts.notifies(exploding.RULE):
            return
        recommended = advise(*queries.read_histograms(connection, run_id, None, first_step - 1, _ADVISED)).recommended
        if recommended is not None:
            alerts.refine(exploding.RULE, lambda found: exploding.name_threshold(found, recommended))

    def _watch(self, connection: sa.Connection, run: sa.Row[Any]) -> Watched:
        """Return what is remembered of a run, up to the sample that its row names."""
        watched = self._memories.take(run.id)
        if watched is not None and watched.mark == run.memory_mark:
            watched.fresh = False
        else:
            known = watched is not None and detector_state.same_parameters(watched.mark, run.memory_mark)
            layout = watched.layout if watched and known else Layout.of(load_parameters(connection, run.id))
            watched = detector_state.load(connection, run, layout, self._configuration.thresholds(run.project))
        watched.resume(run.attempt)
        return watched

    def _finish(self, connection: sa.Connection, run: sa.Row[Any], end: wire.End, step: int | None) -> dict[str, Any]:
        alerts = RunAlerts(connection, run, self._configuration, self._public_url)
        alerts.resolve_all(step or 0, end.at, f"{RUN_ENDED}: {end.status}")
        alerts.save()
        return {"finished_at": end.at, "status": end.status, "exit_code": end.exit_code}


# Made once: to put a statement together takes SQLAlchemy as long as to run it.
_locked_run = sa.select(schema.runs).where(schema.runs.c.id == sa.bindparam("of_run")).with_for_update()
_update_run = sa.update(schema.runs).where(schema.runs.c.id == sa.bindparam("of_run"))
"""Sets the columns that the values name."""


@cache
def _insert_batch(engine: str) -> sa.sql.dml.ReturningInsert[tuple[str]]:
    """Return the insert that yields a row only where the batch is new."""
    return upsert(engine, schema.batches).on_conflict_do_nothing().returning(schema.batches.c.id)


def load_parameters(connection: sa.Connection, run_id: str) -> list[wire.Parameter]:
    """Return the parameters of a run, in the order of its vectors."""
    table = schema.parameters
    rows = connection.execute(sa.select(table).where(table.c.run == run_id).order_by(table.c.position))
    return [
        wire.Parameter(row.name, row.shape, row.dtype, row.depth, row.units, row.trainable, row.kind) for row in rows
    ]


def load_order(connection: sa.Connection, run_id: str) -> tuple[list[int], list[str]]:
    """Return the indices of a run's parameters into its vectors, from input to output, and their names likewise."""
    rows = connection.execute(_order_of, {"of_run": run_id}).all()
    return [row[0] for row in rows], [row[1] for row in rows]


_order_of = (
    sa.select(*schema.parameters.c["position", "name"])
    .where(schema.parameters.c.run == sa.bindparam("of_run"))
    .order_by(*schema.parameters.c["depth", "position"])
)


def _effective(attempts: Mapping[str, int], number: int) -> int:
    """Return the number under which an attempt is kept."""
    return attempts.get(str(number), number)


def _readings(
    batch: wire.Batch,
    after: int | None,
    scalars: Mapping[int, Mapping[str, float]],
    losses: Sequence[tuple[int, float]],
) -> list[Reading]:
    """Return what the rules have not seen yet, in the order of the steps."""
    readings = []
    earlier = after
    for sample in sorted(batch.samples, key=lambda sample: sample.step):
        if after is not None and sample.step <= after:
            continue
        readings.append(
            Reading(
                step=sample.step,
                at=sample.at,
                statistics=sample.statistics,
                scalars=scalars[sample.step],
                losses=detector_state.between(losses, earlier, sample.step),
            )
        )
        earlier = sample.step
    return readings


def _was_told(connection: sa.Connection, run_id: str, rule: str, step: int) -> bool:
    """Return whether an alert of a rule, over by now, was there at a step."""
    table = schema.alerts
    mine = table.c.run == run_id, table.c.rule == rule, table.c.state == "resolved"
    then = table.c.first_step <= step, table.c.resolved_step >= step
    return connection.execute(sa.select(table.c.id).where(*mine, *then).limit(1)).first() is not None


def _latest(batch: wire.Batch) -> dict[str, tuple[int, wire.Number]]:
    """Return the last step and value of each scalar that the batch tells of."""
    told = {
        name: max(zip(scalar.steps, scalar.values, strict=True), key=itemgetter(0))
        for name, scalar in batch.trail.items()
        if scalar.steps
    }
    for sample in batch.samples:
        for name, value in sample.scalars.items():
            if name not in told or sample.step >= told[name][0]:
                told[name] = (sample.step, value)
    return told


def _losses(batch: wire.Batch) -> dict[int, float]:
    """Return the loss of every step that the batch tells of; what a sample carries itself wins."""
    sampled = {sample.step: wire.number(sample.scalars["loss"]) for sample in batch.samples if "loss" in sample.scalars}
    return detector_state.told_losses(batch.trail) | sampled
