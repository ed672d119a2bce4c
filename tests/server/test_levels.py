"""The levels: whatever order the samples came in, every range reads as if all of it had been gathered at once."""

import threading
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradwatch import wire
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store import vectors
from gradwatch_server.store.database import writing
from gradwatch_server.store.rollups import queries
from gradwatch_server.store.rollups.buckets import Buckets
from tests.processes import sample

NAN, INF = float("nan"), float("inf")


class Store:
    """A run written through the real write path, and beside it what it must hold."""

    def __init__(self, engine: sa.Engine, run: str, parameters: int = 2) -> None:
        self.engine, self.run, self.parameters = engine, run, parameters
        self.ingest = Ingest(Configuration(), "http://localhost")
        self.kept: dict[int, list[float]] = {}
        self.batches = 0
        self.attempt = -1
        self.resume()

    def resume(self) -> None:
        self.attempt += 1
        self.first: int | None = None if self.attempt else 0
        listed = [wire.Parameter(f"p{position}", [1]) for position in range(self.parameters)]
        with writing(self.engine) as connection:
            registration = wire.Registration(parameters=listed, attempt=self.attempt)
            self.ingest.register(connection, self.run, registration)

    def put(self, samples: dict[int, list[float]]) -> None:
        if self.first is None or min(samples) < self.first:
            end = 2**53 if self.first is None else self.first
            self.kept = {step: row for step, row in self.kept.items() if not min(samples) <= step < end}
            self.first = min(samples)
        self.kept |= samples
        self.batches += 1
        listed = [sample(step, *row, loss=row[0]) for step, row in samples.items()]
        batch = wire.Batch(id=f"b{self.batches}", attempt=self.attempt, samples=listed)
        with writing(self.engine) as connection:
            self.ingest.store(connection, self.run, batch)

    def check(self, first: int | None, last: int | None, points: int) -> None:
        within = sorted(step for step in self.kept if (first or 0) <= step <= (2**53 if last is None else last))
        values = np.array([self.kept[step] for step in within], np.float32).reshape(-1, self.parameters)
        with self.engine.connect() as connection:
            columns = list(range(self.parameters))
            found = queries.read_statistic(connection, self.run, "grad_norm", first, last, columns, points)
            alone = [
                queries.read_statistic(connection, self.run, "grad_norm", first, last, [column], points)
                for column in columns
            ]
            loss = queries.read_scalar(connection, self.run, "loss", first, last, points)
        for column, one in enumerate(alone):
            for plane in ("low", "high", "mean", "last", "finite", "nonfinite"):
                np.testing.assert_array_equal(getattr(one, plane)[:, 0], getattr(found, plane)[:, column])
        agrees(found, np.array(within, np.int64), values, points, wire.MISSING)
        agrees(loss, np.array(within, np.int64), values[:, :1].astype(np.float64), points, None)


def agrees(
    found: Buckets,
    steps: NDArray[np.int64],
    values: NDArray[Any],
    points: int,
    missing: float | None,
    fewest: int | None = None,
) -> None:
    """Gather the samples anew, bucket by bucket, and compare; means to a rounding, everything else bit by bit."""
    assert (min(len(steps), -(-points // 3)) if fewest is None else fewest) <= len(found) <= points
    assert (found.first_steps[1:] > found.last_steps[:-1]).all()
    edges = np.searchsorted(steps, found.first_steps)
    covered = np.searchsorted(steps, found.last_steps, "right")
    assert (edges[1:] == covered[:-1]).all()
    if len(steps):
        assert (edges[0], covered[-1]) == (0, len(steps))
    for row, (begin, end) in enumerate(zip(edges, covered, strict=True)):
        for column in range(values.shape[1]):
            mine = values[begin:end, column]
            there = mine if missing is None else mine[mine != missing]
            finite = there[np.isfinite(there)]
            last = there[-1] if len(there) else missing
            expected: list[Any] = (
                [finite.min(), finite.max(), finite.mean(dtype=np.float64)] if len(finite) else [last] * 3
            )
            assert same(found.last[row, column], last)
            assert same(found.low[row, column], expected[0])
            assert same(found.high[row, column], expected[1])
            np.testing.assert_allclose(found.mean[row, column], expected[2], rtol=1e-5, atol=1e-30)
            assert found.nonfinite[row, column] == len(there) - len(finite)


def same(found: float, expected: float | None) -> bool:
    return found == expected or (found != found and expected != expected)


numbers = st.one_of(st.sampled_from([NAN, INF, wire.MISSING, 0.0]), st.floats(0, 1e6, width=32))
rows = st.tuples(numbers.map(lambda value: 3.0 if value == wire.MISSING else value), numbers).map(list)
batches = st.lists(
    st.tuples(
        st.booleans(), st.integers(0, 400), st.lists(st.tuples(st.integers(1, 5), rows), min_size=1, max_size=60)
    ),
    min_size=1,
    max_size=12,
)
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
numbered = iter(range(10**9))


some_examples = settings(
    max_examples=40,
    deadline=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@some_examples
@given(batches, st.integers(0, 400), st.integers(0, 400), st.integers(1, 40))
def test_any_order_of_batches_reads_as_if_gathered_at_once(
    engine: sa.Engine, sent: list[tuple[bool, int, list[tuple[int, list[float]]]]], a: int, b: int, points: int
) -> None:
    store = Store(engine, f"run{next(numbered)}")
    for resumed, start, gaps in sent:
        if resumed:
            store.resume()
        steps = start + np.cumsum([gap for gap, _ in gaps])
        store.put({int(step): row for step, (_, row) in zip(steps, gaps, strict=True)})
    store.check(None, None, points)
    store.check(min(a, b), max(a, b), points)
    store.check(a, None, 1)


def test_steps_sent_backwards_one_by_one_stay_in_small_buckets(engine: sa.Engine) -> None:
    store = Store(engine, "backwards")
    for step in range(300, 0, -1):
        store.put({step: [float(step), 1.0]})
    store.check(None, None, 30)
    store.check(17, 211, 7)


@pytest.mark.parametrize("apart", [1, 3, 40], ids=["each bucket", "each third", "far apart"])
def test_late_samples_are_gathered_together(engine: sa.Engine, apart: int) -> None:
    store = Store(engine, f"late{apart}", 1)
    for begin in range(0, 3_200, 800):
        store.put({step * 100: [float(step)] for step in range(begin, begin + 800)})
    statements: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    late = {step + offset: [NAN if step % 3 else 7.0] for step in range(0, 320_000, 1_600 * apart) for offset in (7, 9)}
    sa.event.listen(engine, "before_cursor_execute", count)
    try:
        store.put(late)
    finally:
        sa.event.remove(engine, "before_cursor_execute", count)
    for points in (10, 300):
        store.check(None, None, points)
    store.check(1_000, 40_000, 50)
    if apart < 16:
        assert len(statements) < 300, "one by one, each takes five on each level"


@pytest.mark.parametrize("points", [1, 10, 500])
def test_one_spike_and_one_nan_show_in_the_widest_view(engine: sa.Engine, points: int) -> None:
    store = Store(engine, f"planted{points}")
    steps = np.arange(1, 20_001)
    for block in steps.reshape(-1, 1_000):
        store.put({step: [1e6 if step == 12_345 else 1.0, NAN if step == 6_789 else 1.0] for step in block.tolist()})
    store.check(None, None, points)
    with engine.connect() as connection:
        found = queries.read_statistic(connection, store.run, "ratio", None, None, [0, 1], points)
    spike = int(np.searchsorted(found.last_steps, 12_345))
    assert found.high[spike, 0] > 9e5
    assert found.nonfinite[:, 1].tolist() == [
        int(a <= 6_789 <= b) for a, b in zip(found.first_steps, found.last_steps, strict=True)
    ]


def test_a_parameter_that_came_later_is_missing_before(engine: sa.Engine) -> None:
    store = Store(engine, "gained", parameters=1)
    store.put({step: [float(step)] for step in range(1, 41)})
    early, store.parameters = store.kept, 3
    listed = [wire.Parameter(f"p{position}", [1]) for position in range(3)]
    with writing(engine) as connection:
        store.ingest.register(connection, store.run, wire.Registration(parameters=listed))
    store.kept = {step: [*row, wire.MISSING, wire.MISSING] for step, row in early.items()}
    store.put({step: [1.0, float(step), 2.0] for step in range(41, 101)})
    for points in (1, 5, 12, 100):
        store.check(None, None, points)


@pytest.mark.parametrize("later", [2, 3], ids=["alike", "gained"])
def test_rows_read_in_the_order_of_their_steps_wherever_they_lie(engine: sa.Engine, later: int) -> None:
    store = Store(engine, f"lie{later}")
    for first in range(80, -1, -20):
        if first == 40:
            store.parameters = later
            listed = [wire.Parameter(f"p{position}", [1]) for position in range(later)]
            with writing(engine) as connection:
                store.ingest.register(connection, store.run, wire.Registration(parameters=listed))
        store.put({step: [float(step), 1.0, 2.0][: store.parameters] for step in range(first, first + 20)})
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":  # else it goes by the index, which is in that order
            for way in ("indexscan", "bitmapscan", "indexonlyscan"):
                connection.execute(sa.text(f"SET LOCAL enable_{way} = off"))
        for columns in ([0], list(range(later))):
            found = queries.read_statistic(connection, store.run, "grad_norm", 3, 95, columns, 100)
            assert found.first_steps.tolist() == found.low[:, 0].tolist() == list(range(3, 96))
            gathered = queries.read_statistic(connection, store.run, "grad_norm", None, None, columns, 9)
            assert (gathered.first_steps == gathered.low[:, 0]).all()
            assert (gathered.last_steps == gathered.last[:, 0]).all()


def test_steps_that_lie_far_apart_are_read_whatever_is_between_them(engine: sa.Engine) -> None:
    """PostgreSQL is asked for stretches of the range; of these all but two are empty."""
    store = Store(engine, "far-apart")
    steps = [*range(300), *range(2**35, 2**35 + 7), 2**36]
    for begin in range(0, len(steps), 100):
        store.put({step: [float(place), -1.0] for place, step in enumerate(steps[begin : begin + 100], begin)})
    for first, last in ((None, None), (0, 2**53), (250, 2**35 + 3), (301, 2**35 - 1), (299, 299)):
        for points in (7, 1_000):
            store.check(first, last, points)


def test_long_ranges_come_in_stretches_on_every_level(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run of hundreds of parameters needs: made due here by strings of a few bytes, for reader and writer."""
    monkeypatch.setattr(vectors, "_CHUNK_BYTES", 16)
    store = Store(engine, "stretches")
    for begin in range(0, 700, 100):
        store.put(
            {step: [float(step), NAN if step == 333 else 1.0] for step in range(begin, begin + 100) if step != 50}
        )
    store.put({50: [9_000.0, INF]})  # late: the buckets above it are read and gathered anew
    for first, last in ((None, None), (3, 641), (100, 200)):
        for points in (2, 7, 40, 1_000):
            store.check(first, last, points)


def test_a_range_is_read_from_the_coarsest_level_that_fills_it(engine: sa.Engine) -> None:
    store = Store(engine, "coarsest")
    store.put({step: [float(step), 1.0] for step in range(400)})
    counted = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        counted.append(statement.startswith("SELECT (SELECT count(*)"))

    def read(last: int) -> tuple[int, bool]:
        """Return how many samples the first bucket of up to 30 has, and whether buckets were counted."""
        counted.clear()
        with engine.connect() as connection:
            found = queries.read_statistic(connection, store.run, "grad_norm", 0, last, [0, 1], 30)
        return int(found.last_steps[0]) + 1, any(counted)

    sa.event.listen(engine, "before_cursor_execute", note)
    assert read(144) == (16, True)  # ten buckets of 16 begin there
    assert read(143) == (5, False)
    sa.event.remove(engine, "before_cursor_execute", note)


def test_ends_of_a_range_are_exact_for_wide_networks_too(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Level by level where two parameters are many; a parameter alone still skips levels."""
    monkeypatch.setattr(queries, "_NARROW_COLUMNS", 1)
    store = Store(engine, "wide")
    for begin in (0, 600):
        store.put({step: [float(step), NAN if step % 90 == 3 else 1.0] for step in range(begin, begin + 600)})
    for first, last in ((None, None), (3, 1_141), (250, 1_030), (17, 795)):
        for points in (2, 3, 40):
            store.check(first, last, points)


def test_rows_that_are_read_ahead_are_the_same(database_url: str, engine: sa.Engine) -> None:
    """A range of 150 buckets of level 1; on SQLite others fetch parts of it meanwhile."""
    store = Store(engine, "ahead")
    for first in range(0, 2_400, 800):
        store.put({step: [float(step), NAN if step == 1_000 else 1.0] for step in range(first, first + 800)})
    helped, reader = threading.Semaphore(0), threading.current_thread()
    quick = database_url.startswith("postgresql")

    def took(*_: object) -> None:
        if threading.current_thread().name.startswith("gradwatch-readahead"):
            helped.release()

    def wait(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        """Keep the reader at its roll-ups until each helper has a connection."""
        if threading.current_thread() is reader and "rollups.low" in statement and not quick:
            assert all(helped.acquire(timeout=20) for _ in range(3))

    sa.event.listen(engine, "checkout", took)
    sa.event.listen(engine, "before_cursor_execute", wait)
    with engine.connect() as connection:
        found = queries.read_statistic(connection, "ahead", "grad_norm", None, None, [0, 1], 400)
    quick = True
    with writing(engine) as connection:  # it would keep the helpers waiting
        queries.read_statistic(connection, "ahead", "grad_norm", None, None, [0, 1], 400)
    sa.event.remove(engine, "checkout", took)
    sa.event.remove(engine, "before_cursor_execute", wait)
    assert not helped.acquire(blocking=False)
    assert found.high[:, 0].tolist() == [float(step) for step in range(15, 2_400, 16)]
    assert found.nonfinite[:, 1].nonzero()[0].tolist() == [1_000 // 16]


@pytest.mark.parametrize("ones", [[1.0] * 128, [1.0] * 127 + ["NaN"]], ids=["finite", "beside NaN"])
def test_the_mean_of_large_losses_is_finite(engine: sa.Engine, ones: list[wire.Number]) -> None:
    store = Store(engine, f"large{ones[-1]}")
    largest = float(np.finfo(np.float64).max)
    trail = wire.Trail(steps=list(range(512)), values=[*[1.5e308] * 128, *[-1.5e308] * 128, *ones, *[largest] * 128])
    with writing(engine) as connection:
        store.ingest.store(connection, store.run, wire.Batch(id="b", trail={"loss": trail}))
        wide, narrow = (queries.read_scalar(connection, store.run, "loss", 0, 511, points) for points in (8, 1))
    np.testing.assert_allclose(wide.mean[::2, 0], [1.5e308, -1.5e308, 1.0, largest], rtol=1e-12)
    np.testing.assert_allclose(narrow.mean[:, 0], [largest / narrow.finite[0, 0] * 128], rtol=1e-12)


@pytest.mark.parametrize("points", [1, 4, 40, 1_000])
def test_what_was_not_measured_is_left_out_in_every_view(engine: sa.Engine, points: int) -> None:
    store = Store(engine, f"unmeasured{points}", parameters=1)
    store.put({step: [1.0] for step in range(400)})
    late = {step: sample(step, 2.0) for step in range(400, 800)}
    for one in late.values():
        one.statistics["update_norm"] = np.array([one.step], np.float32)
    with writing(engine) as connection:
        store.ingest.store(connection, store.run, wire.Batch(id="late", samples=list(late.values())))
        for first, last in ((None, None), (3, None), (0, 390), (100, 420)):
            found = queries.read_statistic(connection, store.run, "update_norm", first, last, [0], points)
            within = [float(step) for step in late if (first or 0) <= step <= (last or 800)]
            assert np.isfinite(found.last).all()
            assert (found.low.min(), found.high.max()) == (within[0], within[-1]) if within else not len(found)
            assert not len(queries.read_statistic(connection, store.run, "zero_unit_share", first, last, [0], points))
