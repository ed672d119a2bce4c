"""Detector state outlives the server: which server diagnoses a run, and since when, changes nothing."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch_server.diagnosis import History, RunParameters
from gradwatch_server.ingest.detector_state import DetectorState, DetectorStateCache
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import writing
from gradwatch_server.store.rollups.downsampling import REPLAYED_FIRST_SAMPLES, REPLAYED_LAST_SAMPLES
from tests.postgres import migrated_database
from tests.processes import GradwatchServer, sample

LAYERS = ("0.weight", "1.weight", "aux.weight", "2.weight", "head.weight")
_ids = itertools.count()


def _ingest() -> Ingest:
    return Ingest(Configuration(), "http://localhost")


def _parameters(*frozen: int, count: int = len(LAYERS)) -> list[wire.Parameter]:
    names = [*LAYERS, "late.weight"][:count]
    return [wire.Parameter(name, [20, 20], units=20, trainable=place not in frozen) for place, name in enumerate(names)]


def _story(seed: int) -> list[wire.Registration | wire.Batch]:
    """Return what two attempts of a run send, two thousand samples in which much goes wrong and is well again."""
    random = np.random.default_rng(seed)
    story: list[wire.Registration | wire.Batch] = [wire.Registration(parameters=_parameters(), attempt=1)]
    step = 0

    def train(steps: int, attempt: int, judge: Callable[[int, NDArray[Any]], float], clipped: float = 0.5) -> None:
        nonlocal step
        end = step + steps
        while step < end:
            size = min(int(random.integers(1, 40)), end - step)
            ahead = int(random.integers(0, 3))
            samples, losses = [], []
            for here in range(step + 1, step + size + 1):
                gradients = np.exp(0.1 * random.standard_normal(len(story_parameters())))
                loss = judge(here, gradients)
                losses.append(loss)
                if here % every == 0:
                    weight = (3.0 + 0.001 * here) * (10.0 if loss > 10.0 else 1.0)  # an explosion moves the weights
                    plain = sample(here, *gradients, weight_norm=weight, loss=loss)
                    shares = np.full(len(gradients), clipped, np.float32)
                    statistics = {**plain.statistics, "clipped_unit_share": shares}
                    samples.append(msgspec.structs.replace(plain, statistics=statistics))
            steps_told = list(range(step + 1, step + size + 1))
            trail = {"loss": wire.Trail(steps=steps_told, values=[*losses])}
            batch = wire.Batch(id=str(len(story)), attempt=attempt, samples=samples, trail=trail)
            if ahead == 0 and samples:  # losses first, samples in the batch behind
                story.append(msgspec.structs.replace(batch, samples=[]))
                batch = wire.Batch(id=str(len(story)), attempt=attempt, samples=samples)
            story.append(batch)
            step += size
        if len(story) > 4 and random.random() < 0.5:
            earlier = story.pop(-2) if isinstance(story[-2], wire.Batch) else None
            if earlier is not None:
                story.append(earlier)  # it comes late

    def story_parameters() -> list[wire.Parameter]:
        return next(entry.parameters for entry in reversed(story) if isinstance(entry, wire.Registration))

    def calm(here: int, _: NDArray[Any]) -> float:
        return float(3.0 * 0.9995**here)

    def without(*places: int, value: float = 0.0) -> Callable[[int, NDArray[Any]], float]:
        def judge(here: int, gradients: NDArray[Any]) -> float:
            gradients[list(places)] = value
            return calm(here, gradients)

        return judge

    def loud(here: int, gradients: NDArray[Any]) -> float:
        gradients *= 10.0 ** min(0.2 * (here % 40), 5.0)
        return float(3.0 * 1.2 ** (here % 40))

    every = 1
    train(60, 1, calm)
    train(70, 1, without(2))
    train(200, 1, calm)
    train(600, 1, calm, clipped=1.0)
    train(30, 1, loud)
    train(150, 1, calm)
    story.append(wire.Registration(parameters=_parameters(0, 1), attempt=1))
    train(60, 1, without(0, 1, value=wire.MISSING))
    story.append(wire.Registration(parameters=_parameters(), attempt=1))
    train(60, 1, without(2))
    story.append(wire.Registration(parameters=_parameters(), attempt=2))
    step -= 50
    train(100, 2, calm)
    story.append(wire.Registration(parameters=_parameters(count=6), attempt=2))
    every = 7
    train(700, 2, calm)
    train(70, 2, without(0, 1, 2))
    train(70, 2, without(0, value=float("nan")))
    train(140, 2, loud)
    story.append(wire.Batch(id="end", attempt=2, end=wire.End(at=1_790_009_999.0)))
    return story


def _tell(engine: sa.Engine, story: list[wire.Registration | wire.Batch], choose: Callable[[], Ingest]) -> Any:
    """Send a story, each part through the server of choice; return the alerts and what is remembered at the end."""
    run = f"run-{next(_ids)}"
    for part in story:
        with writing(engine) as connection:
            if isinstance(part, wire.Registration):
                choose().register(connection, run, part)
            else:
                choose().store(connection, run, part)
    alerts, kept = schema.alerts, schema.detector_states
    with engine.connect() as connection:
        columns = [column for column in alerts.c if column.name not in ("id", "run")]
        found = connection.execute(
            sa.select(*columns).where(alerts.c.run == run).order_by(alerts.c.first_at, alerts.c.rule)
        )
        listed = [tuple(map(repr, row)) for row in found]
        body = connection.execute(sa.select(kept.c.body).where(kept.c.run == run)).scalar_one()
    return listed, body


@pytest.mark.parametrize("seed", range(2))
def test_who_judges_a_run_and_since_when_changes_nothing(engine: sa.Engine, seed: int) -> None:
    story, random = _story(seed), np.random.default_rng(seed)
    alone = _ingest()
    expected = _tell(engine, story, lambda: alone)
    assert {"'dead'", "'throttled'", "'exploding'", "'nonfinite'"} <= {row[0] for row in expected[0]}

    current = [_ingest(), _ingest()]

    def restarted() -> Ingest:
        if random.random() < 0.1:
            current[0] = _ingest()
        return current[0]

    assert _tell(engine, story, restarted) == expected
    assert _tell(engine, story, lambda: current[int(random.integers(2))]) == expected
    assert _tell(engine, story, _ingest) == expected


@pytest.mark.parametrize("restart", [False, True])
def test_a_new_attempt_is_compared_with_what_was_usual_before(engine: sa.Engine, restart: bool) -> None:
    run, ingests = f"run-{next(_ids)}", [_ingest(), _ingest()]
    random = np.random.default_rng(0)

    def batch(attempt: int, steps: range, size: float, loss: float) -> wire.Batch:
        gradients = [size * np.exp(0.05 * random.standard_normal(len(LAYERS))) for _ in steps]
        weight = 1e3 * size  # an explosion moves the weights
        samples = [
            sample(step, *each, weight_norm=weight, loss=loss) for step, each in zip(steps, gradients, strict=True)
        ]
        return wire.Batch(id=str(attempt), attempt=attempt, samples=samples)

    story: list[tuple[bool, wire.Registration | wire.Batch]] = [
        (False, wire.Registration(parameters=_parameters(), attempt=1)),
        (False, batch(1, range(1, 201), 1.0, 2.0)),
        (restart, wire.Registration(parameters=_parameters(), attempt=2)),
        (restart, batch(2, range(150, 200), 300.0, 12.0)),
    ]
    for other, part in story:
        with writing(engine) as connection:
            if isinstance(part, wire.Registration):
                ingests[other].register(connection, run, part)
            else:
                ingests[other].store(connection, run, part)
    with engine.connect() as connection:
        alerts = schema.alerts.c["rule", "state", "first_step", "fired_step"]
        found = connection.execute(sa.select(*alerts).where(schema.alerts.c.run == run)).all()
    assert list(map(tuple, found)) == [("exploding", "firing", 150, 152)]


def test_what_was_undone_is_not_remembered(engine: sa.Engine) -> None:
    ingest, run = _ingest(), f"run-{next(_ids)}"
    with writing(engine) as connection:
        ingest.register(connection, run, wire.Registration(parameters=_parameters()))

    def batch(name: str, first: int, gradient: float) -> wire.Batch:
        samples = [sample(step, *[gradient] * len(LAYERS), loss=1.0) for step in range(first, first + 20)]
        return wire.Batch(id=name, samples=samples)

    with writing(engine) as connection:
        ingest.store(connection, run, batch("first", 1, 1.0))
    with engine.execution_options(writes=True).connect() as connection:
        ingest.store(connection, run, batch("undone", 21, 9.0))
        connection.rollback()
    with writing(engine) as connection:
        ingest.store(connection, run, batch("second", 21, 1.0))
        ingest.store(connection, run, wire.Batch(id="end", end=wire.End(at=1.0)))
    with engine.connect() as connection:
        body = connection.execute(
            sa.select(schema.detector_states.c.body).where(schema.detector_states.c.run == run)
        ).scalar_one()
    usual = np.log10(np.sqrt(len(LAYERS)))
    assert History.from_bytes(body).log_gradients == pytest.approx([usual] * 40)


def test_a_registration_that_was_undone_is_not_remembered(engine: sa.Engine) -> None:
    here, elsewhere, run = _ingest(), _ingest(), f"run-{next(_ids)}"
    with engine.execution_options(writes=True).connect() as connection:
        here.register(connection, run, wire.Registration(parameters=_parameters()))
        connection.rollback()
    stored = [wire.Parameter(name, [20, 20], units=20) for name in ("a.weight", "b.weight")]
    with writing(engine) as connection:
        elsewhere.register(connection, run, wire.Registration(parameters=stored))
    with writing(engine) as connection:
        here.store(connection, run, wire.Batch(id="first", samples=[sample(1, 1.0, float("nan"))]))
    with engine.connect() as connection:
        alerts = schema.alerts.c["rule", "parameters"]
        found = connection.execute(sa.select(*alerts).where(schema.alerts.c.run == run)).all()
    assert [(rule, [told["name"] for told in listed]) for rule, listed in found] == [("nonfinite", ["b.weight"])]


def test_what_another_version_wrote_is_replayed(engine: sa.Engine) -> None:
    run = f"run-{next(_ids)}"
    with writing(engine) as connection:
        _ingest().register(connection, run, wire.Registration(parameters=_parameters()))
    for first in range(1, 200, 20):
        samples = [sample(step, *[1.0] * len(LAYERS), loss=1.0) for step in range(first, first + 20)]
        with writing(engine) as connection:
            _ingest().store(connection, run, wire.Batch(id=str(first), samples=samples))
    mine = schema.detector_states.c.run == run
    with writing(engine) as connection:
        connection.execute(sa.update(schema.detector_states).where(mine).values(version=1, body=b"?"))
        _ingest().store(connection, run, wire.Batch(id="next", samples=[sample(300, *[1.0] * len(LAYERS), loss=1.0)]))
        body = connection.execute(sa.select(schema.detector_states.c.body).where(mine)).scalar_one()
    replayed = REPLAYED_FIRST_SAMPLES + REPLAYED_LAST_SAMPLES
    assert History.from_bytes(body).samples == replayed + 1


def test_the_cache_is_bounded_in_bytes() -> None:
    cache, parameters = DetectorStateCache(limit_bytes=1_000_000), RunParameters.of(_parameters())
    for place in range(200):
        cache.put(str(place), DetectorState(parameters, History(), 0, mark="m"))
    found = [place for place in range(200) if cache.take(str(place)) is not None]
    assert found == list(range(found[0], 200))
    assert 50 < len(found) < 100
    for place in range(200):
        cache.put("one", DetectorState(parameters, History(), 0, mark=str(place)))
    cache.put("two", DetectorState(parameters, History(), 0, mark="m"))
    known = cache.take("one")
    assert known is not None
    assert known.mark == "199"
    assert cache.take("one") is None
    assert cache.take("two") is not None


def _clipped(step: int) -> wire.Sample:
    plain = sample(step, 0.1, 0.1, loss=2.0 * 0.998**step)
    shares = np.array([1.0, 0.0], np.float32)
    return msgspec.structs.replace(plain, statistics={**plain.statistics, "clipped_unit_share": shares})


def test_an_alert_goes_on_firing_while_the_server_is_started_again(tmp_path: Path, own_database_url: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        run = server.register(["first.weight", "classifier.weight"])
        for first in range(1, 801, 100):
            if first == 701:
                server.stop()
                server.start()
            batch = wire.Batch(id=str(first), samples=[_clipped(step) for step in range(first, first + 100)])
            assert server.store(run, batch).status_code == 200
        found = [(alert["fired_step"], alert["state"]) for alert in server.get("/api/v1/alerts", run=run)]
        assert found == [(501, "firing"), (101, "resolved")]  # at first because nothing is learned yet


def test_two_servers_in_turn_see_what_one_sees(tmp_path: Path, postgres: str) -> None:
    with (
        migrated_database(postgres) as url,
        GradwatchServer(tmp_path / "one.db", url=url) as one,
        GradwatchServer(tmp_path / "two.db", url=url) as two,
    ):
        run = one.register(["first.weight", "classifier.weight"])
        for place, server in zip(range(60), itertools.cycle([one, two])):
            batch = wire.Batch(id=str(place), samples=[_clipped(10 * place + index) for index in range(1, 11)])
            assert server.store(run, batch).status_code == 200
        assert [alert["fired_step"] for alert in one.get("/api/v1/alerts", run=run)] == [501, 101]
        one.register(["first.weight", "classifier.weight", "new.weight"], id=run)
        longer = wire.Batch(id="longer", samples=[sample(1_000, 0.1, 0.1, 0.1, loss=1.0)])
        assert two.store(run, longer).status_code == 200
