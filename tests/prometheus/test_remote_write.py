"""Remote write: every sample at full resolution in a real Prometheus and a real VictoriaMetrics."""

import math
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


def _kept_step(server: GradwatchServer) -> int | None:
    engine = sa.create_engine(f"sqlite:///{server.database}", connect_args={"timeout": PATIENCE_SECONDS})
    with engine.connect() as connection:
        step = connection.execute(sa.text("SELECT max(step) FROM written")).scalar()
    engine.dispose()
    return None if step is None else int(step)


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


def test_a_batch_that_the_store_fails_on_does_not_hold_up_the_next(tmp_path: Path) -> None:
    store = WebhookReceiver([500, 500, 500, 204])
    with store, _server(tmp_path, store.url.removesuffix("/hook")) as server:
        run_id = server.register(["w"])
        server.store(run_id, wire.Batch(id="1", samples=[_sample(1, time.time(), 1.0)])).raise_for_status()
        until(lambda: _count(server, "set_aside_samples_total") == 1, "the sample set aside")
        server.store(run_id, wire.Batch(id="2", samples=[_sample(2, time.time(), 1.0)])).raise_for_status()
        until(lambda: _count(server, "sent_samples_total") == 1, "the next sample sent")
        assert _count(server, "retries_total") == 2


def test_after_a_restart_it_goes_on_where_it_was(tmp_path: Path) -> None:
    with WebhookReceiver([204]) as store:
        with _server(tmp_path, store.url.removesuffix("/hook")) as server:
            run_id = server.register(["w"])
            old = [_sample(step, time.time() - 7200, 1.0) for step in range(3)]
            fresh = [_sample(step, time.time(), 1.0) for step in range(3, 8)]
            server.store(run_id, wire.Batch(id="1", samples=old + fresh)).raise_for_status()
            until(lambda: _count(server, "sent_samples_total") == 5, "what is in the backlog sent")
            until(lambda: _kept_step(server) == 7, "the position kept")
            server.kill()
            server.start()
            server.store(run_id, wire.Batch(id="2", samples=[_sample(8, time.time() - 7200, 1.0)])).raise_for_status()
            until(lambda: _count(server, "sent_samples_total") == 1, "the next sample sent")
            assert _count(server, "errors_total") == 0
        assert len({body for _, body in store.requests}) == 2, "nothing was sent twice"


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
