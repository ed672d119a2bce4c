"""What must never reach the training: dead servers, full disks, forks, signals, errors of the agent's own."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gradwatch
from gradwatch import wire
from gradwatch.agent import Agent
from gradwatch.delivery import flush
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import FIRST_PAUSE_SECONDS, Sender
from gradwatch.delivery.spool import Entry, Kind, Spool, leftovers
from gradwatch.delivery.transport import DeliveryResult, interpret_response
from gradwatch.hooks import torch_hooks
from gradwatch.monitor.guard import Guard
from gradwatch.samples import collector
from gradwatch.settings import spool_directory
from tests.processes import PATIENCE_SECONDS, small_disk

from .conftest import OwnErrors, Server
from .watching import monitor_of


def train(agent: Agent, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    """Train and return what each step of the optimizer took, in seconds."""
    taken = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 5)).sum().backward()
        started = time.perf_counter()
        optimizer.step()
        taken.append(time.perf_counter() - started)
    assert monitor_of(agent).dropped.errors == 0
    return taken


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.fixture
def hanging() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    """The address of nobody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_steps_are_not_delayed_whatever_the_server_does(server: Server, hanging: str, refusing: str) -> None:
    """No step is delayed by more than 50 ms: the fastest of ten tries counts, since the machine is shared."""
    answers = iter([(500, {}, b"no"), (200, {"Content-Type": "text/html"}, b"<html>"), (302, {}, b"")] * 1000)
    server.answer = lambda *_: next(answers)
    for url in (refusing, hanging, server.url):
        model, optimizer = network()
        agent = gradwatch.attach(model, optimizer, url=url, every=1)
        train(agent, model, optimizer)
        assert any(max(train(agent, model, optimizer, 30)) < 0.05 for _ in range(10))
        started = time.monotonic()
        agent.close(timeout_seconds=0.5)
        assert time.monotonic() - started < 8, "a request may take 10 seconds"
    assert not server.samples


def test_closing_gives_up_a_server_that_has_refused_every_connection(refusing: str) -> None:
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=refusing, every=1)
    train(agent, model, optimizer)
    started = time.monotonic()
    agent.close(timeout_seconds=120.0)
    assert time.monotonic() - started < 60.0, "it tries for half a second, and everything is in the spool"


@pytest.mark.usefixtures("patient_collector")
def test_what_a_dead_server_leaves_behind_flush_delivers(
    server: Server, refusing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=refusing, every=1)
    train(agent, model, optimizer)
    agent.close(timeout_seconds=1)
    assert flush.main(["--url", refusing]) == 1
    assert "stay in" in capsys.readouterr().err
    assert flush.main(["--url", server.url]) == 0
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    assert server.registrations[0].id == agent.run_id
    assert flush.main(["--url", server.url]) == 0
    assert len(server.samples) == 5


@pytest.mark.parametrize("mine", [True, False])
def test_flush_tells_the_clock_of_who_made_a_spool_and_no_other(server: Server, tmp_path: Path, mine: bool) -> None:
    left = leave_behind(tmp_path, server.url)
    if not mine:
        with contextlib.closing(sqlite3.connect(left)) as connection:
            connection.execute("PRAGMA user_version = 1")  # the folder is shared with another machine
    for leftover in leftovers(tmp_path):
        assert flush.deliver(leftover, server.url, None).left == 0
    assert {wire.CLOCK_HEADER in headers for _, headers in server.requests} == {mine}


@pytest.mark.usefixtures("patient_collector")
def test_a_wrong_address_takes_nothing_away(
    server: Server,
    refusing: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another service answers 404 to a registration: whoever finds the right one later can still make the run known."""
    server.answer = lambda *_: (404, {}, b"not here")
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=refusing, every=1)
    train(agent, model, optimizer)
    agent.close(timeout_seconds=0.1)
    monkeypatch.setenv("GRADWATCH_URL", server.url)
    assert flush.main([]) == 1, "it is for the server that it was meant for"
    assert not server.requests
    assert refusing in capsys.readouterr().err
    for _ in range(2):
        assert flush.main(["--url", server.url]) == 1
        assert str(tmp_path / "spool" / agent.run_id) in capsys.readouterr().err
    unknown = 404, dict[str, str](), b"unknown run"
    server.answer = lambda at, path: None if at.registrations or path == "/api/v1/runs" else unknown
    assert flush.main(["--url", server.url]) == 0
    assert {registration.id for registration in server.registrations} == {agent.run_id}
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    assert not list((tmp_path / "spool").glob("*.spool"))


def test_flush_names_a_setting_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flush.main(["--url", "localhost:8321"])
    assert "url 'localhost:8321' must start with http:// or https://" in capsys.readouterr().err


@pytest.mark.usefixtures("patient_collector")
def test_trouble_with_a_server_is_said_once_of_all_trainings_of_a_process(refusing: str, own_errors: OwnErrors) -> None:
    for _ in range(3):
        model, optimizer = network()
        with gradwatch.attach(model, optimizer, url=refusing, every=1) as agent:
            train(agent, model, optimizer)
            agent.close(timeout_seconds=0.5)
    assert own_errors.warnings == 1


@pytest.mark.usefixtures("patient_collector")
def test_the_next_agent_delivers_what_the_last_one_left(server: Server) -> None:
    server.answer = lambda *_: (503, {}, b"{}")
    model, optimizer = network()
    first = gradwatch.attach(model, optimizer, url=server.url, every=1)
    train(first, model, optimizer)
    first.close(timeout_seconds=0.5)
    assert not server.samples
    server.answer = None
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as second:
        server.wait(lambda: len(server.samples) == 5)
    assert {registration.id for registration in server.registrations} == {first.run_id, second.run_id}


@pytest.mark.parametrize("status", [404, 409, 422])
@pytest.mark.usefixtures("patient_collector")
def test_nothing_of_a_run_is_sent_that_the_server_does_not_register(
    server: Server, own_errors: OwnErrors, status: int
) -> None:
    """Its id may be a run's in another project, which these measurements would hide."""
    server.answer = lambda _server, path: (status, {}, b"{}") if path == "/api/v1/runs" else None
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    train(agent, model, optimizer)
    started = time.monotonic()
    agent.close(timeout_seconds=60.0)
    assert time.monotonic() - started < 30.0, "to ask again changes nothing"
    assert {path for path, _ in server.requests} == {"/api/v1/runs"}
    assert own_errors.warnings == 1
    assert not monitor_of(agent).dropped.bytes
    server.answer = None
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        server.wait(lambda: len(server.samples) == 5)


@pytest.mark.usefixtures("patient_collector")
def test_closing_waits_as_long_as_the_server_asks(server: Server) -> None:
    asked: list[float] = []

    def answer(_server: Server, _path: str) -> tuple[int, dict[str, str], bytes] | None:
        asked.append(time.monotonic())
        return None if len(asked) > 1 else (503, {"Retry-After": "1"}, b"{}")

    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    server.wait(lambda: len(server.registrations) == 1)
    server.answer = answer
    train(agent, model, optimizer)
    agent.close(timeout_seconds=30.0)
    assert len(server.samples) == 5
    assert asked[1] - asked[0] >= 1.0


@pytest.mark.usefixtures("patient_collector")
def test_closing_does_not_wait_for_a_server_that_asks_for_more_time_than_there_is(server: Server) -> None:
    server.answer = lambda *_: (503, {"Retry-After": "100"}, b"{}")
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    train(agent, model, optimizer)
    started = time.monotonic()
    agent.close(timeout_seconds=60.0)
    assert time.monotonic() - started < 30.0
    server.answer = None
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        server.wait(lambda: len(server.samples) == 5)


@pytest.mark.parametrize("kind", ["file instead of a folder", "device"])
def test_a_spool_that_cannot_be_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, own_errors: OwnErrors
) -> None:
    if kind == "device":
        path = Path("/dev/full")
        monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(path))
    else:
        path = tmp_path / "occupied"
        path.write_text("")
        monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(path))
    model, optimizer = network()
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        train(agent, model, optimizer)
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    assert own_errors.warnings == 1


def spool(tmp_path: Path, limit_bytes: int = 1 << 20) -> tuple[Spool, Dropped, list[str]]:
    dropped, warned = Dropped(), list[str]()
    made = Spool(tmp_path, url="http://u", run="run-x", dropped=dropped, warn=warned.append, limit_bytes=limit_bytes)
    return made, dropped, warned


def batch(step: int, count: int = 1) -> bytes:
    samples = [wire.Sample(step=step + place, at=0.0, scalars={"x": 1.0}) for place in range(count)]
    trail = {"loss": wire.Trail(steps=[step], values=[1.0])}
    return wire.encode(wire.Batch(id=str(step), samples=samples, trail=trail))


def test_the_spool_thins_the_oldest_and_counts(tmp_path: Path) -> None:
    made, dropped, _ = spool(tmp_path, limit_bytes=20_000)
    size = len(batch(1000, 10))
    written = 20_000 // size + 30
    for place in range(written):
        made.append("batch", batch(1000 + 10 * place, 10), 10)
        assert made.pending_bytes <= 20_000
    kept: list[wire.Batch] = []
    while (entry := made.first()) is not None:
        kept.append(wire.decode(entry.body, wire.Batch))
        made.forget(entry)
    steps = [sample.step for one in kept for sample in one.samples]
    assert steps == sorted(steps)
    assert len(steps) + dropped.samples == 10 * written
    assert dropped.bytes > 0
    assert kept[-1].id == str(1000 + 10 * (written - 1))
    assert len(kept[-1].samples) == 10
    assert any(one.trail and len(one.samples) < 10 for one in kept)
    counts = [len(one.samples) for one in kept[1:]]  # the first of all may be on its way to the server
    assert all(older <= newer + 1 for older, newer in itertools.pairwise(counts))
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_spool_is_synchronised(tmp_path: Path) -> None:
    made, _, _ = spool(tmp_path)
    pragmas = [made._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert pragmas == ["wal", 2]
    made.close()


def test_the_disk_fills_up_later(tmp_path: Path) -> None:
    made, dropped, warned = spool(tmp_path)
    made.append("batch", batch(1), 1)
    (pages,) = made._connection.execute("PRAGMA page_count").fetchone()
    made._connection.execute(f"PRAGMA max_page_count = {pages}")  # what a full disk looks like to SQLite
    for step in range(2, 60):
        made.append("batch", batch(step, 20), 20)
    assert len(warned) == 1
    assert "full" in warned[0]
    steps = []
    while (entry := made.first()) is not None:
        steps.append(int(wire.decode(entry.body, wire.Batch).id))
        made.forget(entry)
    assert steps == list(range(1, 60))
    assert dropped.samples == 0


def test_a_spool_of_the_living_is_left_alone(tmp_path: Path) -> None:
    made, _, _ = spool(tmp_path)
    made.append("batch", batch(1), 1)
    assert [left.run for left in leftovers(tmp_path)] == []
    made.close()
    assert [(left.run, left.pending) for left in leftovers(tmp_path)] == [("run-x", 1)]


def test_no_other_file_in_the_folder_is_touched(tmp_path: Path) -> None:
    for name in ("gradwatch.db", "mine.spool"):
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as other:
            other.execute("CREATE TABLE mine (x)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert list(leftovers(tmp_path)) == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"} == before


def test_a_spool_that_vanishes_meanwhile_hides_no_other(tmp_path: Path) -> None:
    left = leave_behind(tmp_path, "http://localhost")
    (tmp_path / "0.spool").symlink_to(tmp_path / "delivered")
    assert [(leftover.path, leftover.pending) for leftover in leftovers(tmp_path)] == [(left, 41)]
    assert not (tmp_path / "0.spool.lock").exists()


class Scripted:
    """A transport that answers from a list, and notes what it got."""

    def __init__(self, *answers: DeliveryResult) -> None:
        self.answers = list(answers)
        self.paths: list[str] = []
        self.committed: list[bytes] = []
        self.at: list[float] = []
        self.done = threading.Event()

    def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
        self.paths.append(path)
        self.at.append(time.monotonic())
        answer = self.answers.pop(0) if self.answers else DeliveryResult("committed")
        if answer.outcome == "committed":
            self.committed.append(body)
        if not self.answers:
            self.done.set()
        return answer


class Listed:
    """A queue in a list."""

    run = "run-x"

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)

    def first(self) -> Entry | None:
        return self.entries[0] if self.entries else None

    def forget(self, entry: Entry) -> None:
        self.entries.remove(entry)


class Broken(Listed):
    """A queue that cannot be read at first."""

    left = 2

    def first(self) -> Entry | None:
        if self.left:
            self.left -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return super().first()


REGISTRATION = Entry(1, "registration", 0, b"r")
BATCHES = [Entry(number, "batch", 3, b"bbb") for number in (2, 3)]


def test_closing_waits_for_a_server_that_is_being_restarted() -> None:
    refused = DeliveryResult("retry", refused=True)
    transport, queue = Scripted(DeliveryResult("committed"), *[refused] * 4), Listed(*BATCHES)
    sender = Sender(queue, transport, Dropped(), print)
    sender.start()
    sender.end(time.monotonic() + 60.0)
    sender.join()
    assert not queue.entries


def test_an_unknown_run_is_registered_again_and_the_batch_resent() -> None:
    transport = Scripted(
        DeliveryResult("committed"),
        DeliveryResult("unknown_run"),
        DeliveryResult("committed"),
        DeliveryResult("committed"),
    )
    queue = Listed(REGISTRATION, *BATCHES)
    assert Sender(queue, transport, Dropped(), print).deliver()
    samples = "/api/v1/runs/run-x/samples"
    assert transport.paths == ["/api/v1/runs", samples, "/api/v1/runs", samples, samples]


def test_batches_arrive_in_order_however_often_they_are_resent() -> None:
    batches = [Entry(number, "batch", 1, b"%d" % number) for number in range(2, 8)]
    transport = Scripted(
        *[DeliveryResult("retry"), DeliveryResult("committed"), DeliveryResult("retry"), DeliveryResult("retry")] * 5
    )
    sender = Sender(Listed(REGISTRATION, *batches), transport, Dropped(), lambda _text: None)
    while not sender.deliver():
        pass
    assert transport.committed == [b"r", *(entry.body for entry in batches)]


def test_poison_is_set_aside_counted_and_said_once() -> None:
    said: list[str] = []
    dropped = Dropped()
    transport = Scripted(
        DeliveryResult("committed"), DeliveryResult("rejected", "422 bad"), DeliveryResult("rejected", "413")
    )
    assert Sender(Listed(REGISTRATION, *BATCHES), transport, dropped, said.append).deliver()
    assert (dropped.samples, dropped.bytes, len(said)) == (6, 6, 1)


def test_it_backs_off_and_honours_retry_after() -> None:
    transport = Scripted(
        *[DeliveryResult("retry")] * 3, DeliveryResult("retry", retry_after_seconds=0.7), DeliveryResult("committed")
    )
    queue = Listed(REGISTRATION)
    sender = Sender(queue, transport, Dropped(), lambda _text: None, chance=lambda: 1.0)
    sender.start()
    assert transport.done.wait(PATIENCE_SECONDS)
    sender.end(time.monotonic() + PATIENCE_SECONDS)
    sender.join()
    assert not queue.entries
    gaps = [after - before for before, after in zip(transport.at, transport.at[1:], strict=False)]
    for gap, least in zip(gaps, [1, 2, 4], strict=False):
        assert gap >= least * FIRST_PAUSE_SECONDS * 0.99
    assert gaps[3] >= 0.69


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.5), (0.999, 1.0)])
def test_pauses_are_shortened_by_chance(chance: float, share: float) -> None:
    """Agents that lost the same server do not come back at the same moment."""
    transport = Scripted(*[DeliveryResult("retry")] * 3, DeliveryResult("committed"))
    sender = Sender(Listed(REGISTRATION), transport, Dropped(), lambda _text: None, chance=lambda: chance)
    sender.start()
    assert transport.done.wait(PATIENCE_SECONDS)
    sender.end(time.monotonic() + PATIENCE_SECONDS)
    sender.join()
    pauses = [
        (after - before) / (FIRST_PAUSE_SECONDS * 2**number)
        for number, (before, after) in enumerate(itertools.pairwise(transport.at))
    ]
    assert len(pauses) == 3
    assert 0.99 * share <= min(pauses) < share + 0.4, "one of them at least was not held up by the machine"


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b"{}", "committed"),
        (201, b'{"id": "x"}', "committed"),
        (200, b"<html>log in</html>", "retry"),
        (200, b"", "retry"),
        (204, b"", "retry"),
        (302, b"", "retry"),
        (400, b"{}", "rejected"),
        (413, b"{}", "rejected"),
        (422, b"{}", "rejected"),
        (401, b"{}", "unauthorized"),
        (404, b"{}", "unknown_run"),
        (409, b"{}", "unknown_run"),
        (429, b"{}", "retry"),
        (500, b"{}", "retry"),
    ],
)
def test_what_answers_mean(status: int, body: bytes, outcome: str) -> None:
    assert interpret_response(status, {}, body).outcome == outcome


def test_retry_after_as_seconds_date_and_nonsense() -> None:
    assert interpret_response(429, {"Retry-After": "3"}, b"").retry_after_seconds == 3.0
    assert interpret_response(429, {"Retry-After": "soon"}, b"").retry_after_seconds is None
    assert interpret_response(503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"").retry_after_seconds == 0.0
    assert interpret_response(503, {"Retry-After": "1000000000"}, b"").retry_after_seconds == 3600.0


def test_it_disarms_after_three_errors_and_says_why(
    server: Server, monkeypatch: pytest.MonkeyPatch, own_errors: OwnErrors
) -> None:
    monkeypatch.setattr(Guard, "raises_own_errors", False)
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    monitor_of(agent).listener._actions = None  # type: ignore[assignment]
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(4, 5)).sum().backward()
        optimizer.step()
    assert not monitor_of(agent).guard.watching
    assert monitor_of(agent).dropped.errors == 3
    agent.close()
    assert [event.kind for event in server.events] == ["disarmed"]
    assert "NoneType" in server.events[0].message
    assert server.batches[-1].dropped.errors == 3
    assert (own_errors.warnings, len(own_errors.seen)) == (1, 3)
    own_errors.seen.clear()


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(5)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_do_not_disturb_the_agent(server: Server, method: str) -> None:
    model, optimizer = network()
    with gradwatch.attach(model, optimizer, url=server.url, every=1):
        loader = DataLoader(Numbers(), batch_size=2, num_workers=2, multiprocessing_context=method)
        for inputs in loader:
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]
    assert len([batch for batch in server.batches if batch.end]) == 1


def _train_in_child(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 5)).sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_training_is_not_reported_twice(server: Server) -> None:
    torch.set_num_threads(1)
    model, optimizer = network()
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        train(agent, model, optimizer, 2)
        child = multiprocessing.get_context("fork").Process(target=_train_in_child, args=(model, optimizer))
        child.start()
        child.join(2 * PATIENCE_SECONDS)
        assert child.exitcode == 0
        train(agent, model, optimizer, 1)
    assert [sample.step for sample in server.samples] == [1, 2, 3]


def _attach_in_child(url: str, ending: BaseException | None) -> None:
    torch.set_num_threads(1)
    model, optimizer = network()
    train(gradwatch.attach(model, optimizer, url=url, every=1), model, optimizer)
    if ending is not None:
        raise ending


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [(None, "completed", None), (SystemExit(3), "failed", 3), (ValueError("ended"), "failed", None)],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_training_in_a_child_that_is_never_closed(
    server: Server, ending: BaseException | None, status: str, code: int | None
) -> None:
    child = multiprocessing.get_context("fork").Process(target=_attach_in_child, args=(server.url, ending))
    child.start()
    child.join(2 * PATIENCE_SECONDS)
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == (status, code)


_PROGRAM = """
import os, signal, sys, torch, gradwatch
from torch import nn
model = nn.Linear(5, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
agent = gradwatch.attach(model, optimizer, every=1)
for _ in range(5):
    optimizer.zero_grad(); model(torch.ones(4, 5)).sum().backward(); optimizer.step()
"""


def program(url: str, ending: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "GRADWATCH_URL": url}
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM + ending],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


_CAUGHT = """
try: sys.exit(3)
except SystemExit: pass
"""


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("", "completed", 0),
        ("raise ValueError", "failed", 1),
        ("raise KeyboardInterrupt", "failed", -2),
        ("import sys; sys.exit()", "completed", 0),
        ("import sys; sys.exit(3)", "failed", 3),
        ("import sys; sys.exit('out of data')", "failed", 1),
        ("import sys" + _CAUGHT + "optimizer.step()", "completed", 0),
    ],
)
def test_the_interpreters_end_delivers(server: Server, ending: str, status: str, code: int) -> None:
    running = program(server.url, ending)
    running.communicate(timeout=300)
    assert running.returncode == code
    assert [sample.step for sample in server.samples][:5] == [1, 2, 3, 4, 5]
    end = server.batches[-1].end
    assert end is not None
    assert end.status == status
    assert end.exit_code == (code if "sys.exit(" in ending and "except" not in ending else None)


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        (None, "completed", None),
        (ValueError("ended"), "failed", None),
        (SystemExit(), "completed", 0),
        (SystemExit(0), "completed", 0),
        (SystemExit(3), "failed", 3),
        (SystemExit("out of data"), "failed", 1),
    ],
)
def test_what_leaves_the_context_says_how_the_run_ended(
    server: Server, ending: BaseException | None, status: str, code: int | None
) -> None:
    model, optimizer = network()
    with contextlib.suppress(ValueError, SystemExit), gradwatch.attach(model, optimizer, url=server.url):
        if ending is not None:
            raise ending
    (end,) = [batch.end for batch in server.batches if batch.end is not None]
    assert (end.status, end.exit_code) == (status, code)


_OTHERS = """
from gradwatch.session import running_sessions
from gradwatch.lifecycle import shutdown
shutdown.CLOSING_SECONDS = 5.0
models = [nn.Linear(5, 3) for _ in range(3)]
agents = [gradwatch.attach(model, every=1) for model in models]
optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.0)
for _ in range(5):
    for model in models: model(torch.ones(4, 5)).sum().backward()
    optimizer.step()
import atexit, time
started = time.monotonic()
atexit.unregister(shutdown.close_all)
atexit.register(lambda: print(time.monotonic() - started))
atexit.register(shutdown.close_all, running_sessions)
"""


def test_at_the_interpreters_end_several_agents_share_one_timeout(server: Server, hanging: str) -> None:
    out, _ = program(hanging, _OTHERS).communicate(timeout=300)
    assert 4 < float(out) < 15, "one after the other they would take 20 seconds"
    assert flush.main(["--url", server.url]) == 0
    assert len({registration.id for registration in server.registrations}) == 4
    assert [sample.step for sample in server.samples] == sorted([1, 2, 3, 4, 5] * 4)
    assert len([batch for batch in server.batches if batch.end is not None]) == 4


def test_an_error_while_closing_does_not_keep_the_rest_from_ending(
    server: Server, own_errors: OwnErrors, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = network(), network()
    both = nn.ModuleList([model[0], other[0]])
    agent = gradwatch.attach(both, [model[1], other[1]], url=server.url, every=1)
    for _ in range(2):
        both[0](torch.ones(4, 5)).sum().backward()
        model[1].step()  # the other has not stepped: the second round is open
    monkeypatch.setattr(monitor_of(agent).steps, "schedule", None)
    agent.close()
    assert not monitor_of(agent).guard.watching
    assert not torch_hooks.listeners()
    assert [sample.step for sample in server.samples] == [1]
    assert server.batches[-1].end is not None
    assert len(own_errors.seen) == 1
    own_errors.seen.clear()


_WRITTEN = """
import glob, os, sqlite3, time
def written():
    for path in glob.glob(os.environ["GRADWATCH_SPOOL_DIR"] + "/*.spool"):
        with sqlite3.connect(path) as spool:
            yield from (samples for (samples,) in spool.execute("SELECT samples FROM entry"))
deadline = time.monotonic() + 60
while sum(written()) < 5 and time.monotonic() < deadline: time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_kills_as_ever_and_the_spool_has_it_all(server: Server, refusing: str, number: signal.Signals) -> None:
    running = program(refusing, _WRITTEN + "print('ready', flush=True); signal.pause()")
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(number)
    running.communicate(timeout=300)
    assert running.returncode == -number
    assert flush.main(["--url", server.url]) == 0
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("now", [0.0, 4e9])
def test_a_clock_that_jumps_does_not_disturb(server: Server, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    model, optimizer = network()
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        train(agent, model, optimizer, 2)
        monkeypatch.setattr(time, "time", lambda: now)
        train(agent, model, optimizer, 2)
    monkeypatch.undo()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]


def test_close_is_idempotent_and_leaves_torch_as_it_was(server: Server) -> None:
    from torch.nn.utils import clip_grad
    from torch.optim import optimizer as optimizer_module

    def state() -> list[object]:
        cells = [cell.cell_contents for cell in clip_grad.clip_grad_value_.__closure__ or ()]
        return [torch.autograd.backward, torch.optim.Optimizer.zero_grad, torch.amp.GradScaler.step, *cells]

    before = state()
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    assert state() != before
    agent.close()
    agent.close()
    assert state() == before
    assert not optimizer_module._global_optimizer_pre_hooks


_KILLED = """
import os, signal, sys
from pathlib import Path
from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.spool import Spool
run = "run-" + "0" * 16
left = Spool(Path(sys.argv[1]), url=sys.argv[2], run=run, dropped=Dropped(), warn=print)
left.append("registration", wire.encode(wire.Registration(parameters=[], id=run)))
for number in range(40):
    left.append("batch", wire.encode(wire.Batch(id=f"b{number}", events=[wire.Event(step=0, at=0.0, kind="x" * 500)])))
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(directory: Path, url: str) -> Path:
    """Leave a spool as a process that was killed does, write-ahead log and all."""
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(directory), url], check=False)
    assert killed.returncode == -signal.SIGKILL
    return next(directory.glob("*.spool"))


def deliver_beside_what_was_left(server: Server, looked_at: Callable[[], bool]) -> Agent:
    """Train until what was left has been looked at, and on."""
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    train(agent, model, optimizer, 3)
    server.wait(lambda: len(server.samples) == 3)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not looked_at():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    train(agent, model, optimizer, 3)
    agent.close()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5, 6]
    assert any(batch.end is not None for batch in server.batches)
    return agent


def test_a_damaged_spool_of_another_process_does_not_hold_up_this_one(
    server: Server, tmp_path: Path, own_errors: OwnErrors, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "spool"
    path = leave_behind(directory, server.url)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    path.write_bytes(whole[: 4 * 4096] + os.urandom(len(whole) - 4 * 4096))
    sound = leave_behind(tmp_path / "sound", server.url)
    for part in sound.parent.iterdir():
        part.rename(directory / f"sound{part.name}")

    def looked_at() -> bool:
        left = sum(batch.id.startswith("b") and not batch.samples for batch in server.batches)
        return left >= 40 and own_errors.warnings == 1

    deliver_beside_what_was_left(server, looked_at)
    assert own_errors.warnings == 1
    assert flush.main(["--url", server.url]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_what_is_left_on_a_full_disk_is_delivered_and_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch, own_errors: OwnErrors
) -> None:
    """A real small disk: what was delivered cannot be removed, and will be sent again."""
    with small_disk(1) as disk:
        monkeypatch.setenv("GRADWATCH_SPOOL_DIR", str(disk / "spool"))
        leave_behind(disk / "spool", server.url)
        with contextlib.suppress(OSError), (disk / "rest").open("wb", 0) as rest:
            while True:
                rest.write(b"x" * 1024)
        left = {f"b{number}" for number in range(40)}
        agent = deliver_beside_what_was_left(server, lambda: left <= {batch.id for batch in server.batches})
        assert monitor_of(agent).dropped.samples == 0
        assert own_errors.warnings <= 2
        (disk / "rest").unlink()
        assert flush.main(["--url", server.url]) == 0
        assert not list((disk / "spool").glob("*.spool"))


def test_a_sender_goes_on_after_an_error_of_its_own() -> None:
    queue = Broken(REGISTRATION)
    transport, failed = Scripted(DeliveryResult("committed")), list[Exception]()
    sender = Sender(queue, transport, Dropped(), print, failed=failed.append)
    sender.start()
    assert transport.done.wait(PATIENCE_SECONDS)
    sender.end(time.monotonic() + PATIENCE_SECONDS)
    sender.join()
    assert not queue.entries
    assert len(failed) == 2


def test_what_a_collector_that_is_held_up_cannot_take_is_counted(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk holds the collector up: the numbers of steps that are not sampled are lost, too."""
    held, free = threading.Event(), threading.Event()
    append = Spool.append

    def slow(self: Spool, kind: Kind, body: bytes, samples: int = 0) -> None:
        held.set()
        assert free.wait(60)
        append(self, kind, body, samples)

    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1000)
    train(agent, model, optimizer, 1)
    server.wait(lambda: bool(server.samples))
    monkeypatch.setattr(collector, "LONGEST_QUEUE", 10)
    monkeypatch.setattr(Spool, "append", slow)
    train(agent, model, optimizer, 1)
    assert held.wait(PATIENCE_SECONDS)
    for _ in range(30):
        agent.log(accuracy=0.5)
        train(agent, model, optimizer, 1)
    free.set()
    agent.close()
    kept = len(server.trail("loss"))
    assert kept < 32
    assert server.batches[-1].dropped.values == 2 * (32 - kept)
    assert server.batches[-1].dropped.samples == 0


def test_a_disk_that_stalls_costs_a_fast_training_no_sample(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps of a tiny model take less time than some disks need for one write."""
    held, free = threading.Event(), threading.Event()
    append = Spool.append

    def slow(self: Spool, kind: Kind, body: bytes, samples: int = 0) -> None:
        held.set()
        assert free.wait(60)
        append(self, kind, body, samples)

    monkeypatch.setattr(Spool, "append", slow)
    model, optimizer = network()
    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        train(agent, model, optimizer, 1)
        assert held.wait(PATIENCE_SECONDS)
        train(agent, model, optimizer, 999)
        free.set()
    assert [sample.step for sample in server.samples] == list(range(1, 1001))
    assert monitor_of(agent).dropped.samples == 0


def test_closing_does_not_wait_for_a_disk_that_hangs(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    write, hangs, held = Spool._write, threading.Event(), threading.Event()

    def hanging(self: Spool, change: Callable[[], object]) -> None:
        if hangs.is_set():
            held.set()
            assert free.wait(60)
        write(self, change)

    monkeypatch.setattr(Spool, "_write", hanging)
    model, optimizer = network()
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    train(agent, model, optimizer, 3)
    server.wait(lambda: len(server.samples) == 3)
    hangs.set()
    train(agent, model, optimizer, 3)
    assert held.wait(PATIENCE_SECONDS)
    started = time.monotonic()
    agent.close(timeout_seconds=1.0)
    took = time.monotonic() - started
    free.set()
    for thread in threading.enumerate():
        if thread.name.startswith("gradwatch"):
            thread.join(PATIENCE_SECONDS)
    assert took < 20, "the disk hangs for a minute"


def test_a_user_without_a_home_has_a_spool_among_the_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any uid."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert spool_directory({}) == Path(tempfile.gettempdir()) / f"gradwatch-{os.getuid()}"
    assert spool_directory({"GRADWATCH_SPOOL_DIR": "~/spool"}) == Path("~/spool").absolute()
