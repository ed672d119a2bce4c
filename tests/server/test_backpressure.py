"""Too much at once: refused with the limit's name, never held without bound; and the end of a server, in order."""

import gzip
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import msgspec
import pytest
import sqlalchemy as sa
import zstandard

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.store import group_commit
from gradwatch_server.store.database import open_engine, writing
from gradwatch_server.store.group_commit import Deferred, Writer
from tests.processes import PATIENCE_SECONDS, GradwatchServer, sample, wait_for

PACKED = {"content-type": wire.MESSAGEPACK_TYPE}
LIMITS = "[limits]\nqueued_batches = 5\nqueued_batches_per_run = 2\ndrain_seconds = 30\n"


@contextmanager
def stuck(url: str) -> Iterator[None]:
    """Keep every writer of a database waiting."""
    engine = open_engine(url)
    try:
        with writing(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text("LOCK TABLE batches IN ACCESS EXCLUSIVE MODE"))
            yield
    finally:
        engine.dispose()


class Fleet:
    """A server with small limits, runs on it, and requests that are under way."""

    def __init__(self, folder: Path, url: str) -> None:
        self._config = folder / "gradwatch.toml"
        self._config.write_text(LIMITS)
        self.server = GradwatchServer(folder / "s.db", "--config", str(self._config), url=url)
        self.runs = [self.server.register(["a"]) for _ in range(4)]
        self._threads = ThreadPoolExecutor(8)
        self._sent = 0

    def hurry(self) -> None:
        """Let it end within 3 seconds from now on."""
        self._config.write_text(LIMITS.replace("= 30", "= 3"))
        self.server.process.send_signal(signal.SIGHUP)
        wait_for(self.server.log, "configuration reloaded")

    def send(self, run: str) -> Future[httpx.Response]:
        self._sent += 1
        batch = wire.Batch(id=f"b{self._sent}", samples=[sample(self._sent, 1.0)])
        return self._threads.submit(self.server.store, run, batch)

    def waiting(self, count: int) -> None:
        """Wait until so many batches have been taken in, those that a writer is at among them."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.server.get("/api/v1/server")["queued_batches"] < count:
            assert time.monotonic() < deadline, self.server.get("/api/v1/server")
            threading.Event().wait(0.02)


@pytest.fixture
def fleet(tmp_path: Path, database_url: str) -> Iterator[Fleet]:
    started = Fleet(tmp_path, database_url)
    with started.server:
        yield started


def problem(answer: httpx.Response) -> tuple[int, str, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.headers.get("retry-after", ""), answer.json()["detail"]


def test_a_full_queue_refuses_and_what_it_has_taken_is_stored(fleet: Fleet, database_url: str) -> None:
    with stuck(database_url):
        taken = [fleet.send(fleet.runs[0])]
        fleet.waiting(1)
        taken += [fleet.send(fleet.runs[0])]
        fleet.waiting(2)
        status, again, detail = problem(fleet.send(fleet.runs[0]).result())
        assert (status, again) == (429, "1")
        assert "limits.queued_batches_per_run" in detail
        taken += [fleet.send(run) for run in fleet.runs[1:3]]
        fleet.waiting(4)
        # The fifth place may be taken by the server itself, which tidies up every few seconds.
        last = [fleet.send(fleet.runs[3]) for _ in range(2)]
        refused = wait(last, return_when=FIRST_COMPLETED).done.pop()
        status, again, detail = problem(refused.result())
        assert (status, again) == (503, "1")
        assert "limits.queued_batches" in detail
    assert [answer.result().status_code for answer in taken] == [200] * 4
    stored = [answer.result().status_code for answer in last].count(200)
    assert stored < 2
    assert [fleet.server.get(f"/api/v1/runs/{run}")["sample_count"] for run in fleet.runs] == [2, 1, 1, stored]
    assert fleet.send(fleet.runs[0]).result().status_code == 200


def test_pieces_of_a_run_are_done_in_the_order_in_which_they_came(database_url: str) -> None:
    engine = open_engine(database_url)
    writer = Writer(engine, capacity=1_000, capacity_per_run=1_000)
    done: dict[str, list[int]] = {f"run{number}": [] for number in range(5)}

    def work(connection: sa.Connection, run: str, number: int) -> None:
        connection.execute(sa.text("SELECT 1"))
        done[run].append(number)

    futures = [
        writer.submit(partial(work, run=run, number=number), run) for number in range(100) for run in sorted(done)
    ]
    for future in futures:
        future.result(timeout=30)
    writer.close(30)
    engine.dispose()
    assert done == {run: list(range(100)) for run in done}
    assert writer.waiting == 0


def test_a_writer_that_stands_still_is_known(tmp_path: Path) -> None:
    engine, held, gate = open_engine(f"sqlite:///{tmp_path / 'gradwatch.db'}"), threading.Event(), threading.Event()
    writer = Writer(engine, capacity=10, capacity_per_run=10)
    assert writer.busy_seconds() == 0.0

    def hold(_connection: sa.Connection) -> bool:
        held.set()
        return gate.wait(PATIENCE_SECONDS)

    holding = writer.submit(hold)
    assert held.wait(PATIENCE_SECONDS)
    assert writer.busy_seconds() > 0.0
    gate.set()
    assert holding.result(PATIENCE_SECONDS)
    assert writer.busy_seconds() == 0.0
    writer.close(PATIENCE_SECONDS)
    engine.dispose()


def _of_one_writer() -> Iterator[str]:
    """Yield ids of runs that the same writer is at, in their order."""
    return (name for name in (f"run{number:03}" for number in itertools.count()) if hash(name) % 2 == 0)


def _begun_and_finished(database_url: str, failing: str = "", refused: str = "") -> tuple[list[str], list[object]]:
    """Have four pieces done in one group, two of one run; return what was done, in order, and what came of them."""
    engine = open_engine(database_url)
    queue = Writer(engine, capacity=1_000, capacity_per_run=1_000)
    first, second, third = itertools.islice(_of_one_writer(), 3)
    done: list[str] = []
    held, gate = threading.Event(), threading.Event()

    def hold(_connection: sa.Connection) -> bool:
        held.set()
        return gate.wait(PATIENCE_SECONDS)

    def work(_connection: sa.Connection, name: str) -> str | Deferred[str]:
        if name == refused:
            raise Refused(422, "Refused", name)
        done.append(f"begin {name}")

        def finish() -> str:
            if name == failing:
                raise ValueError(name)
            done.append(f"finish {name}")
            return name

        return Deferred(finish)

    holding = queue.submit(hold, first)
    assert held.wait(PATIENCE_SECONDS)
    pieces = [(third, "c"), (first, "a1"), (second, "b"), (first, "a2")]
    futures = [queue.submit(partial(work, name=name), run) for run, name in pieces]
    gate.set()
    assert holding.result(PATIENCE_SECONDS)
    wait(futures, PATIENCE_SECONDS)
    queue.close(PATIENCE_SECONDS)
    engine.dispose()
    return done, [future.exception() or future.result() for future in futures]


@pytest.fixture
def _one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a piece takes, all that waits is one group."""
    monkeypatch.setattr(group_commit, "_COMMIT_SECONDS", 1e6)


@pytest.mark.usefixtures("_one_group")
def test_a_piece_begins_while_those_of_other_runs_wait(database_url: str) -> None:
    done, results = _begun_and_finished(database_url)
    order = "begin a1, finish a1, begin a2, begin b, begin c, finish a2, finish b, finish c"
    assert ", ".join(done) == order
    assert results == ["c", "a1", "b", "a2"]


@pytest.mark.usefixtures("_one_group")
def test_a_piece_that_is_refused_between_two_halves_leaves_them_alone(database_url: str) -> None:
    done, results = _begun_and_finished(database_url, refused="b")
    order = "begin a1, finish a1, begin a2, begin c, finish a2, finish c"
    assert ", ".join(done) == order
    refusal = results.pop(2)
    assert isinstance(refusal, Refused)
    assert refusal.detail == "b"
    assert results == ["c", "a1", "a2"]


@pytest.mark.usefixtures("_one_group")
def test_a_piece_that_fails_halfway_leaves_its_neighbours_alone(database_url: str) -> None:
    done, results = _begun_and_finished(database_url, failing="b")
    assert [str(result) for result in results] == ["c", "a1", "b", "a2"]
    assert [isinstance(result, ValueError) for result in results] == [False, False, True, False]
    again = done[done.index("finish a2") + 1 :]  # all of them, one by one
    assert again == ["begin a1", "finish a1", "begin a2", "finish a2", "begin b", "begin c", "finish c"]


def test_runs_take_turns_however_much_waits_on_one(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "_MOST_IN_ONE_COMMIT", 1)
    engine = open_engine(database_url)
    queue = Writer(engine, capacity=1_000, capacity_per_run=1_000)
    greedy, other = itertools.islice(_of_one_writer(), 2)
    held, gate = threading.Event(), threading.Event()
    done: list[str] = []

    def hold(_connection: sa.Connection) -> bool:
        held.set()
        return gate.wait(PATIENCE_SECONDS)

    def note(_connection: sa.Connection, name: str) -> None:
        done.append(name)

    holding = queue.submit(hold, greedy)
    assert held.wait(PATIENCE_SECONDS)
    pieces = [(greedy, f"greedy {number}") for number in range(8)] + [(other, "other")]
    futures = [queue.submit(partial(note, name=name), run) for run, name in pieces]
    gate.set()
    assert holding.result(PATIENCE_SECONDS)
    wait(futures, PATIENCE_SECONDS)
    queue.close(PATIENCE_SECONDS)
    engine.dispose()
    assert done == ["greedy 0", "other", *(f"greedy {number}" for number in range(1, 8))]


def test_sigterm_readiness_goes_first_and_what_was_taken_is_answered(fleet: Fleet, database_url: str) -> None:
    with stuck(database_url):
        taken = fleet.send(fleet.runs[0])
        fleet.waiting(1)
        fleet.server.process.terminate()
        while (ready := fleet.server.http.get("/readyz")).status_code == 200:
            threading.Event().wait(0.01)
        assert problem(ready)[:2] == (503, "2")
        assert fleet.server.http.get("/healthz").status_code == 200
        assert problem(fleet.send(fleet.runs[1]).result())[:2] == (503, "2")
        assert not taken.done()
    assert taken.result().status_code == 200
    assert fleet.server.ended() == 0


def test_sigterm_ends_in_a_set_time_whatever_the_database_does(fleet: Fleet, database_url: str) -> None:
    with stuck(database_url):
        taken = fleet.send(fleet.runs[0])
        fleet.waiting(1)
        fleet.hurry()
        fleet.server.process.terminate()
        assert fleet.server.ended() == 0
        with pytest.raises((httpx.TransportError, AssertionError)):
            assert taken.result().status_code == 200


def _store(server: GradwatchServer, body: bytes, **headers: str) -> httpx.Response:
    path = f"/api/v1/runs/{server.register(['a'])}/samples"
    return server.http.post(path, content=body, headers=PACKED | headers)


GOOD = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0)]))
BOMB = bytes(200 * 1024 * 1024)


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    frame = zstandard.compress(BOMB[: 4 * 1024 * 1024], 1)
    streaming = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(BOMB)
    window = zstandard.ZstdCompressionParameters(window_log=27)
    wide = zstandard.ZstdCompressor(compression_params=window).compressobj()
    return {
        "gzip": gzip.compress(BOMB, 1),
        "zstd": zstandard.compress(BOMB, 1),
        "zstd, undeclared": streaming,
        "zstd, many frames": frame * 100,
        "zstd, wide window": wide.compress(BOMB) + wide.flush(),
        "zstd, 500,000 empty frames": zstandard.compress(b"") * 500_000,
        "gzip of gzip": gzip.compress(gzip.compress(BOMB, 1), 1),
    }


def _peak_bytes(server: GradwatchServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_compression_bombs_are_refused_in_bounded_memory(server: GradwatchServer, bombs: dict[str, bytes]) -> None:
    assert _store(server, zstandard.compress(GOOD), **{"content-encoding": "zstd"}).json()["samples"] == 1
    assert _store(server, gzip.compress(GOOD), **{"content-encoding": "gzip"}).json()["samples"] == 1
    before = _peak_bytes(server)
    for name, bomb in bombs.items():
        answer = _store(server, bomb, **{"content-encoding": name[:4]})
        status, _, detail = problem(answer)
        assert status in (400, 413), f"{name}: {answer.text}"
        assert status == 400 or "limits.decoded_bytes" in detail
    assert _peak_bytes(server) - before < 100 * 1024 * 1024
    nested = _store(server, gzip.compress(gzip.compress(GOOD)), **{"content-encoding": "gzip, gzip"})
    assert problem(nested)[0] == 415
    cut = zstandard.compress(GOOD * 1_000)[:-20]
    assert problem(_store(server, cut, **{"content-encoding": "zstd"}))[0] == 400


def _claims(count: int) -> bytes:
    """Return the head of a MessagePack array of so many elements."""
    return b"\xdd" + count.to_bytes(4, "big")


def test_what_grows_in_memory_is_refused_before_it_does(server: GradwatchServer) -> None:
    """Eight megabytes of small numbers become 300 as Python objects."""
    pack = msgspec.msgpack.encode
    many = 8_000_000
    head = b"\x82" + pack("id") + pack("b")
    histogram = b"\x91\x83" + pack("step") + b"\x01" + pack("at") + b"\x01" + pack("histograms") + b"\x81" + pack("x")
    bodies = {
        "loose_bytes": head + pack("samples") + histogram + _claims(many) + b"\x01" * many,
        "length <= 10000": head + pack("samples") + _claims(many) + b"\x80" * many,
        "truncated": head + pack("events") + _claims(2**32 - 1),
    }
    before = _peak_bytes(server)
    for reason, body in bodies.items():
        status, _, detail = problem(_store(server, body))
        assert status in (400, 413)
        assert reason in detail
    assert _peak_bytes(server) - before < 100 * 1024 * 1024
    document = b'{"id": "b", "samples": [{"step": 1, "at": 1, "statistics": {"grad_norm": [%s1]}}]}'
    numbers = document % (b"1," * 3_000_000)
    assert problem(_store(server, numbers, **{"content-type": wire.JSON_TYPE}))[0] == 413


def test_wide_answers_use_memory_again_that_others_used(tmp_path: Path) -> None:
    with GradwatchServer(tmp_path / "g.db") as server:
        names = [f"layer{index}" for index in range(300)]
        run = server.register(names)
        for begin in range(0, 1_024, 128):
            samples = [sample(step, *[float(step)] * len(names)) for step in range(begin, begin + 128)]
            assert server.store(run, wire.Batch(id=str(begin), samples=samples)).status_code == 200

        def faults() -> int:
            return int(Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(") ")[2].split()[7])

        def read() -> None:
            assert server.http.get(f"/api/v1/runs/{run}/tile", params={"points": 500}).status_code == 200

        for _ in range(10):
            read()
        counts = []
        for _ in range(11):
            read()
            counts.append(faults())
        fewest = min(after - before for before, after in itertools.pairwise(counts))
        assert fewest < 100  # thousands for each answer where glibc gives memory back in between
