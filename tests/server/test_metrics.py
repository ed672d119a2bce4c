"""What ``/metrics`` tells: exact texts of a real server."""

import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.settings import Configuration
from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, writing
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, sample
from tests.prometheus.scraped import OPENMETRICS, findings, scrape, series

NAMES = ["stem.weight", "block.weight", "head.weight"]


def _stored(server: GradwatchServer, *samples: wire.Sample, names: list[str] = NAMES, **fields: object) -> str:
    run_id = server.register(names, **fields)
    assert server.store(run_id, wire.Batch(id="1", attempt=1, samples=list(samples))).status_code == 200
    return run_id


RUN_TEXT = """\
gradwatch_run_step{LABELS} 5.0
gradwatch_run_stalled{LABELS} 0.0
gradwatch_run_last_sample_timestamp_seconds{LABELS} 1.790000005e+09
gradwatch_run_loss{LABELS} 0.5
gradwatch_run_learning_rate{LABELS} 0.1
gradwatch_run_step_duration_seconds{LABELS} 0.25
gradwatch_run_agent_overhead_ratio{LABELS} 0.0078125
gradwatch_run_global_grad_norm{LABELS} 1.5
gradwatch_run_clipped_global_grad_norm{LABELS} 1.0
gradwatch_run_global_grad_norm_limit{LABELS} 1.25
gradwatch_run_grad_weight_min_ratio{LABELS} 0.01
gradwatch_run_grad_weight_median_ratio{LABELS} 0.1
gradwatch_run_grad_weight_max_ratio{LABELS} 1.0
gradwatch_run_attenuation_decades_per_layer{LABELS} 1.0
gradwatch_run_clipped_parameters_ratio{LABELS} 0.0
gradwatch_run_parameters{LABELS} 3.0
gradwatch_run_parameters_left_out{LABELS} 0.0
gradwatch_run_nonfinite_parameters{LABELS} 0.0
gradwatch_run_zero_parameters{LABELS} 0.0
gradwatch_run_samples_total{LABELS} 1.0
gradwatch_run_skipped_steps_total{LABELS} 2.0
gradwatch_run_agent_dropped_samples_total{LABELS} 4.0
gradwatch_run_agent_dropped_bytes_total{LABELS} 512.0
gradwatch_run_agent_errors_total{LABELS} 1.0
"""


def test_a_run_is_told_by_its_latest_sample(shared_server: GradwatchServer) -> None:
    run_id = shared_server.register(NAMES, project="vision", name="exact")
    measured = sample(
        5,
        *(0.01, 0.1, 1.0),
        weight_norm=0.999,
        global_grad_norm=1.5,
        clipped_global_grad_norm=1.0,
        global_grad_norm_limit=1.25,
        learning_rate=0.1,
        step_seconds=0.25,
        overhead_ratio=0.0078125,
        skipped_steps=2,
    )
    measured.statistics["clipped_grad_norm"] = measured.statistics["grad_norm"]
    batch = wire.Batch(
        id="1",
        samples=[measured],
        trail={"loss": wire.Trail(steps=[4, 5], values=[0.7, 0.5])},
        dropped=wire.Dropped(samples=4, bytes=512, errors=1),
    )
    assert shared_server.store(run_id, batch).status_code == 200
    lines = [line for line in scrape(shared_server.http).splitlines() if run_id in line and " " in line]
    labels = f'{{name="exact",project="vision",run="{run_id}"}}'
    kept = [line for line in lines if "last_seen" not in line and labels in line]
    assert [_rounded(line) for line in kept] == RUN_TEXT.replace("{LABELS}", labels).splitlines()


def _rounded(line: str) -> str:
    """Return the line with its value to six digits: the samples are float32."""
    name, _, value = line.rpartition(" ")
    number = float(value)
    return line if number > 1e6 else f"{name} {float(f'{number:.6g}')!r}"


def test_parameters_are_told_with_their_depth(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, 0.25, 0.5, 1.0, weight_norm=2.0), name="deep")
    told = series(scrape(shared_server.http), run_id)
    labels = f'{{depth="001",name="deep",parameter="block.weight",project="default",run="{run_id}"}}'
    assert told[f"gradwatch_parameter_grad_norm{labels}"] == 0.5
    assert told[f"gradwatch_parameter_weight_norm{labels}"] == 2.0
    assert told[f"gradwatch_parameter_grad_weight_ratio{labels}"] == pytest.approx(0.5 / 2.001)


def test_labels_are_escaped(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, 1, 1, 1), name='a "quoted" \\ name\nof two lines')
    text = scrape(shared_server.http)
    assert (
        f'gradwatch_run_step{{name="a \\"quoted\\" \\\\ name\\nof two lines",project="default",run="{run_id}"}}' in text
    )
    assert findings(text) == ""


def test_openmetrics_is_told_where_it_is_asked_for(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, 1, 1, 1), name="open")
    answer = shared_server.http.get("/metrics", headers={"accept": OPENMETRICS})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")
    assert "# TYPE gradwatch_run_samples counter" in answer.text
    assert f'gradwatch_run_samples_total{{name="open",project="default",run="{run_id}"}} 1.0' in answer.text


def test_promtool_finds_nothing(shared_server: GradwatchServer) -> None:
    _stored(shared_server, sample(1, math.nan, math.inf, 0.0), name="ill")
    assert findings(scrape(shared_server.http)) == ""


def test_promtool_finds_what_is_wrong() -> None:
    assert "counter" in findings(
        "# HELP gradwatch_samples Samples.\n# TYPE gradwatch_samples counter\ngradwatch_samples 1\n"
    )


def test_a_finished_run_is_gone_at_the_next_scrape(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, 1, 1, 1))
    assert run_id in scrape(shared_server.http)
    assert shared_server.store(run_id, wire.Batch(id="2", attempt=1, end=wire.End(at=time.time()))).status_code == 200
    assert run_id not in scrape(shared_server.http)


def test_a_run_that_was_killed_is_gone_when_it_has_been_silent_for_long(tmp_path: Path) -> None:
    file = tmp_path / "gradwatch.toml"
    file.write_text("[metrics]\nsilent_seconds = 3600\n")
    with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(file)) as server:
        killed, alive = _stored(server, sample(1, math.nan, 1, 1)), _stored(server, sample(1, 1, 1, 1))
        assert killed in scrape(server.http)
        engine = open_engine(f"sqlite:///{server.database}")
        with writing(engine) as connection:
            earlier = sa.update(schema.runs).where(schema.runs.c.id == killed)
            connection.execute(earlier.values(last_seen_at=schema.runs.c.last_seen_at - 3601))
        engine.dispose()
        text = scrape(server.http)
        assert killed not in text
        assert alive in text
        assert 'gradwatch_alerts{rule="nonfinite",severity="critical",state="firing"} 1.0' in text
        assert killed in [run["id"] for run in server.get("/api/v1/runs")]
        server.store(killed, wire.Batch(id="2", attempt=1, samples=[sample(2, 1, 1, 1)])).raise_for_status()
        assert killed in scrape(server.http)


def test_what_is_not_finite_is_told_as_such(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, math.nan, 0.0, wire.MISSING), name="ill")
    told = series(scrape(shared_server.http), run_id)
    labels = f'{{name="ill",project="default",run="{run_id}"}}'
    assert told[f"gradwatch_run_nonfinite_parameters{labels}"] == 1
    assert told[f"gradwatch_run_zero_parameters{labels}"] == 1
    assert math.isnan(told[f"gradwatch_run_global_grad_norm{labels}"])
    assert told[f"gradwatch_run_grad_weight_max_ratio{labels}"] == 0.0
    parameter = f'{{depth="000",name="ill",parameter="stem.weight",project="default",run="{run_id}"}}'
    assert math.isnan(told[f"gradwatch_parameter_grad_norm{parameter}"])
    assert not any("head.weight" in name for name in told), "a missing gradient has no value"
    assert (
        told[f'gradwatch_run_unhealthy_parameters{{name="ill",project="default",rule="nonfinite",run="{run_id}"}}'] == 1
    )
    assert told[f'gradwatch_run_firing_alerts{{name="ill",project="default",run="{run_id}",severity="critical"}}'] == 1


def test_the_share_of_clipped_parameters_is_told(shared_server: GradwatchServer) -> None:
    measured = sample(1, 1.0, 2.0, wire.MISSING)
    measured.statistics["clipped_grad_norm"] = np.array([1.0, 0.5, wire.MISSING], np.float32)
    run_id = _stored(shared_server, measured)
    told = series(scrape(shared_server.http), run_id)
    (share,) = (value for name, value in told.items() if name.startswith("gradwatch_run_clipped_parameters_ratio"))
    assert share == 0.5


CONSPICUOUS = "[metrics]\nconspicuous_parameters = 3\n"


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        (CONSPICUOUS, {"nan", "zero", "high"}),
        ('[metrics]\nparameters = "all"\n', {"usual1", "usual2", "usual3", "high", "zero", "nan"}),
        ('[metrics]\nparameters = "all"\nmost_parameters = 2\n', {"nan", "zero"}),
        ("[metrics]\nmost_parameters = 0\n", set()),
    ],
)
def test_the_most_conspicuous_parameters_are_told_under_a_cap(
    tmp_path: Path, configuration: str, expected: set[str]
) -> None:
    file = tmp_path / "gradwatch.toml"
    file.write_text(configuration)
    with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(file)) as server:
        names = ["usual1", "usual2", "usual3", "high", "zero", "nan"]
        run_id = _stored(server, sample(1, 0.1, 0.11, 0.1, 100.0, 0.0, math.nan), names=names)
        text = scrape(server.http)
    assert set(re.findall(r'gradwatch_parameter_grad_norm\{.*parameter="(\w+)"', text)) == expected
    (left_out,) = (value for name, value in series(text, run_id).items() if "left_out" in name)
    assert left_out == len(names) - len(expected)


def test_the_server_tells_what_it_does(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        _stored(server, sample(1, math.nan, 1, 1))
        receiver.wait(1)
        told_of = 'gradwatch_delivery_attempts_total{receiver="webhook",result="delivered"} 1.0'
        text = _scrape_until(server, told_of)  # it is counted once it is recorded
    told = series(text, "gradwatch_")
    assert told["gradwatch_ingest_batches_total"] == 1
    assert told["gradwatch_ingest_samples_total"] == 1
    assert told["gradwatch_ingest_values_total"] == 6
    assert told["gradwatch_queue_refusals_total"] == 0
    assert told["gradwatch_queue_limit_batches"] == 1000
    assert told["gradwatch_held_bytes"] == 0
    assert told["gradwatch_held_limit_bytes"] == 64 * 1024 * 1024
    assert told["gradwatch_delivery_lag_seconds"] == 0
    assert told["gradwatch_commit_duration_seconds_count"] >= 2
    assert told['gradwatch_delivery_attempts_total{receiver="webhook",result="delivered"}'] == 1
    assert told['gradwatch_alerts{rule="nonfinite",severity="critical",state="firing"}'] == 1
    stored = 'method="POST",route="/api/v1/runs/{run_id}/samples",status="200"'
    assert told[f"gradwatch_http_request_duration_seconds_count{{{stored}}}"] == 1
    assert told[f'gradwatch_http_request_duration_seconds_bucket{{le="+Inf",{stored}}}'] == 1
    buckets = [value for name, value in told.items() if "_bucket{le=" in name and name.endswith(f"{stored}}}")]
    assert len(buckets) == 7
    assert buckets == sorted(buckets)
    assert "process_resident_memory_bytes" in text


def _scrape_until(server: GradwatchServer, line: str) -> str:
    """Scrape until a line is there: a delivery is recorded after its receiver has answered."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while line not in (text := scrape(server.http)):
        assert time.monotonic() < deadline, text
    return text


def test_wrong_settings_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "gradwatch.toml"
    file.write_text('[metrics]\nparameters = "most"\n')
    with pytest.raises(ConfigurationError, match=r"'most'.*metrics\.parameters"):
        Configuration.load(file)


def test_a_run_that_moves_or_gains_a_parameter_is_told_as_it_is_now(shared_server: GradwatchServer) -> None:
    run_id = _stored(shared_server, sample(1, 0.1, 0.2, 0.3))
    assert _depth(shared_server, run_id) == {"stem.weight": "000", "block.weight": "001", "head.weight": "002"}
    moved = [wire.Parameter(name, [4, 4], units=4, depth=depth) for name, depth in zip(NAMES, (2, 0, 1), strict=True)]
    shared_server.post("/api/v1/runs", wire.Registration(id=run_id, parameters=moved)).raise_for_status()
    assert _depth(shared_server, run_id) == {"stem.weight": "002", "block.weight": "000", "head.weight": "001"}
    gained = [*moved, wire.Parameter("adapter.weight", [4, 4], units=4, depth=3)]
    shared_server.post("/api/v1/runs", wire.Registration(id=run_id, parameters=gained)).raise_for_status()
    later = wire.Batch(id="2", attempt=1, samples=[sample(2, 0.1, 0.2, 0.3, 0.4)])
    shared_server.store(run_id, later).raise_for_status()
    assert _depth(shared_server, run_id)["adapter.weight"] == "003"


def _depth(server: GradwatchServer, run_id: str) -> dict[str, str]:
    lines = [line for line in scrape(server.http).splitlines() if line.startswith("gradwatch_parameter_grad_norm{")]
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines if f'run="{run_id}"' in line]
    return {each["parameter"]: each["depth"] for each in labels}


def test_attenuation_is_that_of_the_alert(shared_server: GradwatchServer) -> None:
    layers = [wire.Parameter(f"layers.{place}.weight", [64, 64], units=64, kind="Linear") for place in range(8)]
    embedding = wire.Parameter("embedding.weight", [1_000, 64], units=1_000, kind="Embedding")
    registration = wire.Registration(parameters=[embedding, *layers], name="fading")
    run_id = shared_server.post("/api/v1/runs", registration).json()["id"]
    gradients = [0.1 * 10 ** (0.9 * place + 0.1 * (place % 3) - 7) for place in range(8)]
    samples = [sample(step, 1.0, *gradients, loss=2.0) for step in range(1, 6)]
    assert shared_server.store(run_id, wire.Batch(id="1", samples=samples)).status_code == 200
    (alert,) = shared_server.get("/api/v1/alerts", run=run_id, rule="vanishing")
    labels = f'{{name="fading",project="default",run="{run_id}"}}'
    told = series(scrape(shared_server.http), run_id)
    assert told[f"gradwatch_run_attenuation_decades_per_layer{labels}"] == alert["evidence"]["decades_per_layer"]


def test_attenuation_leaves_embeddings_out_as_the_rules_do(shared_server: GradwatchServer) -> None:
    layers = [wire.Parameter(f"layers.{place}.weight", [64, 64], units=64, kind="Linear") for place in range(3)]
    embedding = wire.Parameter("embedding.weight", [1_000, 64], units=1_000, kind="Embedding")
    registration = wire.Registration(parameters=[embedding, *layers], name="embedded")
    run_id = shared_server.post("/api/v1/runs", registration).json()["id"]
    faint = 10**-9.6 * math.sqrt(1_000 * 64)
    samples = [sample(step, faint, 0.064, 0.064, 0.064, loss=2.0) for step in range(1, 41)]
    assert shared_server.store(run_id, wire.Batch(id="1", samples=samples)).status_code == 200
    labels = f'{{name="embedded",project="default",run="{run_id}"}}'
    told = series(scrape(shared_server.http), run_id)
    assert shared_server.get("/api/v1/alerts", run=run_id) == []
    assert told[f"gradwatch_run_attenuation_decades_per_layer{labels}"] == pytest.approx(0.0, abs=1e-6)
