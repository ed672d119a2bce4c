"""What nobody should send: random documents and bytes find no crash, only refusals; the API is what it says it is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gradwatch import wire
from tests.processes import GradwatchServer, environment, sample
from tests.server.test_tokens import token

TYPES = {wire.MESSAGEPACK_TYPE: msgspec.msgpack.encode, wire.JSON_TYPE: msgspec.json.encode}
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
GOOD = wire.encode(wire.Batch(id="b", samples=[sample(1, 1.0, 2.0)], end=wire.End(at=1.0)))


@pytest.fixture(scope="module")
def run(shared_server: GradwatchServer) -> str:
    return shared_server.register(["a", "b"])


def _offer(server: GradwatchServer, path: str, body: bytes, content_type: str) -> None:
    """Send a body; whatever it is, the answer is a 2xx or a problem that says what is wrong with it."""
    answer = server.http.post(path, content=body, headers={"content-type": content_type})
    assert answer.status_code in (200, 201, 400, 404, 409, 413, 422), answer.text
    if answer.status_code >= 300:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]


@settings(max_examples=150, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.sampled_from(sorted(TYPES)))
def test_random_bytes_are_refused(shared_server: GradwatchServer, run: str, body: bytes, content_type: str) -> None:
    _offer(shared_server, f"/api/v1/runs/{run}/samples", body, content_type)
    _offer(shared_server, "/api/v1/runs", body, content_type)


@settings(max_examples=150, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.data())
def test_damaged_batches_are_stored_or_refused(
    shared_server: GradwatchServer, run: str, changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    body = bytearray(GOOD)
    for place, value in changes:
        body[place] = value
    end = data.draw(st.integers(1, len(body)))
    _offer(shared_server, f"/api/v1/runs/{run}/samples", bytes(body[:end]), wire.MESSAGEPACK_TYPE)


numbers = st.one_of(
    st.integers(-3, 3),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([2**53, 2**53 + 1, 1e300, -1.0, "NaN", "Infinity", "-Infinity", None, True]),
)
names = st.one_of(st.sampled_from(["loss", "", "x" * 600, "nul\0", "ü"]), st.text(max_size=6))
anything = st.recursive(
    st.one_of(numbers, names), lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=6
)
vectors = st.one_of(st.lists(numbers, max_size=3), anything)
samples = st.fixed_dictionaries(
    {"step": numbers, "at": numbers},
    optional={
        "statistics": st.dictionaries(st.sampled_from(wire.STATISTICS), vectors, max_size=3),
        "scalars": st.dictionaries(names, numbers, max_size=3),
        "histograms": st.dictionaries(names, st.lists(numbers, max_size=3), max_size=2),
    },
)
batches = st.fixed_dictionaries(
    {"id": names},
    optional={
        "version": st.sampled_from([1, 1, 1, 2]),
        "rank": numbers,
        "attempt": numbers,
        "samples": st.lists(st.one_of(samples, anything), max_size=3),
        "trail": st.dictionaries(
            names, st.fixed_dictionaries({"steps": st.lists(numbers), "values": st.lists(numbers)}), max_size=2
        ),
        "events": st.lists(
            st.fixed_dictionaries({"step": numbers, "at": numbers, "kind": names}, optional={"parameter": names}),
            max_size=2,
        ),
        "dropped": st.dictionaries(st.sampled_from(["samples", "bytes", "errors", "values"]), numbers),
        "end": st.fixed_dictionaries({"at": numbers}, optional={"status": names, "exit_code": numbers}),
        "unknown": anything,
    },
)
registrations = st.fixed_dictionaries(
    {
        "parameters": st.lists(
            st.fixed_dictionaries(
                {"name": names, "shape": st.lists(numbers, max_size=2)},
                optional={"depth": numbers, "units": numbers, "dtype": names, "kind": names},
            ),
            max_size=3,
        )
    },
    optional={"id": names, "project": names, "attempt": numbers, "started_at": numbers, "attributes": anything},
)


@settings(max_examples=250, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(batches, registrations, st.sampled_from(sorted(TYPES)))
def test_wild_documents_are_stored_or_refused_and_read_back(
    shared_server: GradwatchServer, run: str, batch: Any, registration: Any, content_type: str
) -> None:
    encode = TYPES[content_type]
    _offer(shared_server, f"/api/v1/runs/{run}/samples", encode(batch), content_type)
    _offer(shared_server, "/api/v1/runs", encode(registration), content_type)
    shared_server.get(f"/api/v1/runs/{run}/map", statistic="grad_norm")


def test_a_whole_number_may_be_written_as_a_float(shared_server: GradwatchServer) -> None:
    run_id = shared_server.register(["a"])
    body = b'{"id": "b", "samples": [{"step": 3.0, "at": 1e9, "statistics": {"grad_norm": [1.5]}}]}'
    headers = {"content-type": wire.JSON_TYPE}
    assert shared_server.http.post(f"/api/v1/runs/{run_id}/samples", content=body, headers=headers).status_code == 200
    assert shared_server.get(f"/api/v1/runs/{run_id}")["last_step"] == 3


def test_a_depth_may_be_written_as_a_float(shared_server: GradwatchServer) -> None:
    body = b'{"parameters": [{"name": "a", "shape": [4.0], "depth": 2.0}]}'
    answer = shared_server.http.post("/api/v1/runs", content=body, headers={"content-type": wire.JSON_TYPE})
    assert answer.status_code == 201, answer.text


def test_a_run_without_parameters_can_be_read(shared_server: GradwatchServer) -> None:
    run_id = shared_server.register([])
    shared_server.store(run_id, wire.Batch(id="b", samples=[sample(step, loss=1.0) for step in range(40)]))
    for path in ("", "/map", "/tile", "/profile", "/latest", "/clip-advice", "/series?statistic=loss"):
        answer = shared_server.http.get(f"/api/v1/runs/{run_id}{path}")
        assert answer.status_code == 200, f"{path} {answer.text}"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[GradwatchServer, str]]:
    """A server that asks for tokens, and one that may do everything."""
    database = tmp_path / "guarded.db"
    made = token(database, "create", "--scope", "admin")
    with GradwatchServer(database) as server:
        yield server, made


@pytest.mark.parametrize("shown", [True, False])
def test_the_api_is_what_its_description_says(
    guarded: tuple[GradwatchServer, str], tmp_path: Path, shown: bool
) -> None:
    """All checks of schemathesis, with a token and without."""
    server, made = guarded
    bearer = {"authorization": f"Bearer {made}"}
    body = wire.encode_json(wire.Registration(id="known", parameters=[wire.Parameter("a", [1])]))
    answer = server.http.post("/api/v1/runs", content=body, headers=bearer | {"content-type": wire.JSON_TYPE})
    assert answer.status_code == 201, answer.text
    described = server.http.get("/openapi.json", headers=bearer)
    (tmp_path / "openapi.json").write_text(json.dumps(described.json()))
    command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(CONFIGURATION), "--no-color"]
    command += ["run", "openapi.json"]
    command += ["--url", server.url, "--checks", "all", "--max-examples", "8", "--max-time", "40", "--no-shrink"]
    command += ["--generation-deterministic", "--continue-on-failure", "--suppress-health-check", "all"]
    command += ["-H", f"Authorization: Bearer {made}"] if shown else []
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6_000:]
    assert server.http.get("/healthz").status_code == 200
    assert "Traceback" not in server.log.read_text()
