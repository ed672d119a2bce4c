"""Remote write: every sample at full resolution in a real Prometheus and a real VictoriaMetrics."""

import math
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.telemetry.remote_write_protocol import Series, encode
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver
from tests.processes import sample as planned
from tests.prometheus.programs import Program, Prometheus, VictoriaMetrics, until
from tests.prometheus.scraped import scrape

STORES: list[Callable[[Path], Program]] = [Prometheus, VictoriaMetrics]


def _sample(step: int, at: float, *grad_norms: float, **scalars: wire.Number) -> wire.Sample:
    measured = planned(step, *grad_norms)
    return wire.Sample(step=step, at=at, statistics=measured.statistics, scalars=scalars)


def _server(folder: Path, url: str) -> GradwatchServer:
    configuration = folder / "gradwatch.toml"
    configuration.write_text(f'[remote_write]\nurl = "{url}/api/v1/write"\n')
    return GradwatchServer(folder / "gradwatch.db", "--config", str(configuration))


def _count(server: GradwatchServer, name: str) -> float:
    lines = scrape(server.http).splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"gradwatch_remote_write_{name} "))
    return float(value)


def _saved_position(server: GradwatchServer) -> int | None:
    engine = sa.create_engine(f"sqlite:///{server.database}", connect_args={"timeout": PATIENCE_SECONDS})
    with engine.connect() as connection:
        arrival = connection.execute(sa.text("SELECT max(arrival) FROM written")).scalar()
    engine.dispose()
    return None if arrival is None else int(arrival)


def _samples(*steps: int, at: float | None = None) -> list[wire.Sample]:
    return [_sample(step, (time.time() if at is None else at) + step / 1_000, 1.0) for step in steps]


def _arrived_steps(store: WebhookReceiver) -> set[int]:
    """Return the steps in the bodies that a store took; snappy's literals are read, and nothing else is compressed."""
    answers = store.statuses + [store.statuses[-1]] * len(store.requests)
    taken = [body for (_, body), status in zip(store.requests, answers, strict=False) if status == 204]
    found = set()
    for body in taken:
        for match in re.finditer(rb"gradwatch_sample_step.*?(?=gradwatch_sample_|$)", _decompressed(body), re.DOTALL):
            points = re.findall(rb"\x12.\x09(.{8})\x10", match.group(), re.DOTALL)
            found |= {round(struct.unpack("<d", point)[0]) for point in points}
    return found


def _decompressed(body: bytes) -> bytes:
    position = 1 + next(place for place, byte in enumerate(body) if byte < 0x80)
    parts = []
    while position < len(body):
        (length,) = struct.unpack_from("<H", body, position + 1)
        parts.append(body[position + 3 : position + 4 + length])
        position += 4 + length
    return b"".join(parts)


def _all(program: Program, expression: str, count: int) -> list[dict[str, Any]]:
    """Return what is found once all of it is: VictoriaMetrics shows what was written about once a second."""
    found = program.query(expression)
    return found if found and len(found[0]["values"]) >= count else []


@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
def test_every_sample_arrives_at_its_own_time(store: Callable[[Path], Program], tmp_path: Path) -> None:
    start = math.floor(time.time()) - 60
    with store(tmp_path / "store") as program, _server(tmp_path, program.url) as server:
        run_id = server.register(["stem.weight", "head.weight"], name="full", project="p")
        samples = [_sample(step, start + step, step + 0.5, wire.MISSING, loss=2.0) for step in range(1, 51)]
        server.store(run_id, wire.Batch(id="1", samples=samples)).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 50, "50 samples sent")
        labels = f'run="{run_id}",parameter="stem.weight",depth="000"'
        (grad,) = until(lambda: _all(program, f"gradwatch_sample_grad_norm{{{labels}}}[5m]", 50), "written samples")
        assert grad["values"] == [[start + step, f"{step + 0.5:g}"] for step in range(1, 51)]
        (step,) = until(lambda: _all(program, f'gradwatch_sample_step{{run="{run_id}"}}[5m]', 50), "their steps")
        assert step["values"] == [[start + number, str(number)] for number in range(1, 51)]
        until(lambda: program.query(f'gradwatch_sample_scalar{{run="{run_id}",scalar="loss"}}'), "their losses")
        assert not program.query(f'gradwatch_sample_grad_norm{{run="{run_id}",parameter="head.weight"}}')
        assert _count(server, "set_aside_samples_total") == 0


def test_a_nan_is_written_as_a_value_and_ends_no_series(tmp_path: Path) -> None:
    now = time.time()
    with Prometheus(tmp_path / "store") as program, _server(tmp_path, program.url) as server:
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=[_sample(1, now, math.nan)])).raise_for_status()
        (found,) = until(lambda: program.query(f'gradwatch_sample_grad_norm{{run="{run_id}"}}'), "the NaN")
        assert found["value"][1] == "NaN"


@pytest.mark.parametrize("ahead", [0, 3600], ids=["out of order", "out of bounds"])
def test_a_refused_sample_is_set_aside_and_the_others_arrive(tmp_path: Path, ahead: float) -> None:
    now = time.time()
    with Prometheus(tmp_path / "store") as program, _server(tmp_path, program.url) as server:
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=[_sample(0, now + ahead, 1.0)])).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 1, "the first sample sent")
        if ahead:
            run_id = server.register(["w"])  # a series without samples: what is out of bounds, not out of order
        later = [_sample(1, now - 1800, 1.0), _sample(2, now + ahead + 1, 1.0)]
        server.store(run_id, wire.Batch(id="2", samples=later)).raise_for_status()
        until(lambda: _count(server, "set_aside_samples_total") == 1, "one sample set aside")
        until(lambda: _count(server, "sent_samples_total") == 2, "the other sent")


def test_a_store_that_is_away_is_tried_again(tmp_path: Path) -> None:
    with WebhookReceiver([503, 429, 204]) as store:
        with _server(tmp_path, store.url.removesuffix("/hook")) as server:
            run_id = server.register(["w"])
            server.store(run_id, wire.Batch(id="1", samples=[_sample(1, time.time(), 1.0)])).raise_for_status()
            bodies = [body for _, body in store.wait(3)]
            until(lambda: _count(server, "sent_samples_total") == 1, "the sample sent")
            assert _count(server, "retries_total") == 2
        assert len(set(bodies)) == 1


def test_an_outage_is_no_refusal_however_long_it_takes(tmp_path: Path) -> None:
    store = WebhookReceiver([500, 500, 500, 502, 204])
    with store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=_samples(*range(30)))).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 30, "every sample sent")
        assert _count(server, "set_aside_samples_total") == 0
        assert _count(server, "retries_total") == 4
    assert _arrived_steps(store) == set(range(30))


def test_samples_that_come_late_arrive(tmp_path: Path) -> None:
    with WebhookReceiver([204]) as store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        run_id, now = server.register(["w"]), time.time()
        server.store(run_id, wire.Batch(id="1", samples=_samples(*range(10, 20), at=now))).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 10, "the samples sent")
        late = _samples(*range(10), at=now - 100_000)
        server.store(run_id, wire.Batch(id="2", samples=late)).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 20, "the late ones sent")
    assert _arrived_steps(store) == set(range(20))


def test_a_run_that_is_resumed_while_the_store_is_away_loses_nothing_uncounted(tmp_path: Path) -> None:
    store = WebhookReceiver([503, 503, 204])
    with store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        run_id = server.register(["w"], id="run", attempt=1)
        first = wire.Batch(id="1", attempt=1, samples=_samples(*range(60)))
        server.store(run_id, first).raise_for_status()
        store.wait(1)  # it carries steps 0 to 19, whatever happens to them meanwhile
        server.register(["w"], id="run", attempt=2)
        server.store(run_id, wire.Batch(id="2", attempt=2, samples=_samples(*range(50, 55)))).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 55, "the samples of both attempts sent")
        until(lambda: _count(server, "skipped_samples_total") == 10, "those that were replaced counted")
    assert _arrived_steps(store) == set(range(55))


def test_the_samples_of_a_run_that_is_deleted_before_they_were_written_are_counted(tmp_path: Path) -> None:
    store = WebhookReceiver([503, 503, 204])
    with store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        doomed = server.register(["w"])
        server.store(doomed, wire.Batch(id="1", samples=_samples(*range(30)))).raise_for_status()
        store.wait(1)
        server.http.delete(f"/api/v1/runs/{doomed}").raise_for_status()
        until(lambda: _count(server, "skipped_samples_total") == 10, "the samples that nobody can send counted")
        assert _count(server, "sent_samples_total") == 20


def test_after_a_restart_it_goes_on_where_it_was(tmp_path: Path) -> None:
    with WebhookReceiver([204]) as store:
        with _server(tmp_path, store.url.removesuffix("/hook")) as server:
            run_id = server.register(["w"])
            server.store(run_id, wire.Batch(id="1", samples=_samples(*range(8)))).raise_for_status()
            until(lambda: _count(server, "sent_samples_total") == 8, "the samples sent")
            until(lambda: _saved_position(server) == 8, "the position saved")
            server.kill()
            server.start()
            server.store(run_id, wire.Batch(id="2", samples=[_sample(8, time.time() - 7200, 1.0)])).raise_for_status()
            until(lambda: _count(server, "sent_samples_total") == 1, "the next sample sent")
            assert _count(server, "errors_total") == 0
        assert len({body for _, body in store.requests}) == 2, "nothing was sent twice"


def test_the_first_time_that_a_store_is_written_to_the_backlog_limits_what_it_gets(tmp_path: Path) -> None:
    now = time.time()
    with GradwatchServer(tmp_path / "gradwatch.db") as server:
        recent, silent = server.register(["w"]), server.register(["w"])
        old = _samples(*range(3), at=now - 7_200)
        server.store(recent, wire.Batch(id="1", samples=old + _samples(3, 4, at=now))).raise_for_status()
        server.store(silent, wire.Batch(id="1", samples=old)).raise_for_status()
    with WebhookReceiver([204]) as store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        until(lambda: _count(server, "sent_samples_total") == 2, "the samples of the last hour sent")
        server.store(silent, wire.Batch(id="2", samples=_samples(5, at=now - 7_200))).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 3, "a sample that came since sent, however old")
    assert _arrived_steps(store) == {3, 4, 5}


def test_a_store_that_wants_other_credentials_sets_nothing_aside(tmp_path: Path) -> None:
    with WebhookReceiver([401, 403, 404, 204]) as store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=[_sample(1, time.time(), 1.0)])).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 1, "the sample sent")
        assert _count(server, "set_aside_samples_total") == 0


def test_an_error_that_nobody_foresaw_does_not_end_it(tmp_path: Path) -> None:
    with WebhookReceiver([204]) as store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        engine = sa.create_engine(f"sqlite:///{server.database}", connect_args={"timeout": PATIENCE_SECONDS})
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE written RENAME TO away"))
        until(lambda: _count(server, "errors_total") >= 1, "an error counted")
        with engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE away RENAME TO written"))
        engine.dispose()
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=[_sample(1, time.time(), 1.0)])).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 1, "the sample sent")


def test_the_encoding_byte_by_byte() -> None:
    body = encode([Series((("__name__", "a"),), [(300, 1.0)])])
    series = b"\x0a\x0d\x0a\x08__name__\x12\x01a" + b"\x12\x0c\x09\0\0\0\0\0\0\xf0\x3f\x10\xac\x02"
    request = b"\x0a" + bytes([len(series)]) + series
    assert body == bytes([len(request)]) + b"\xf4" + (len(request) - 1).to_bytes(2, "little") + request
