"""What the server tells an agent of runs that it may go on with, and who of several gets one."""

import httpx
import pytest

from gradwatch import wire
from tests.processes import GradwatchServer, sample

JOB = "0123456789"


def _run(server: GradwatchServer, suffix: str, status: str | None, project: str) -> str:
    run = f"run-{JOB}{suffix}"
    server.register(["a", "b"], id=run, attempt=5, project=project, attributes={"host": "here"})
    end = None if status is None else wire.End(at=1_790_000_000.0, status=status)
    assert server.store(run, wire.Batch(id="b", attempt=5, samples=[sample(7, 1.0, 2.0)], end=end)).is_success
    return run


def test_runs_that_did_not_end_by_themselves_are_listed(shared_server: GradwatchServer) -> None:
    killed, failed, cut_off = (
        _run(shared_server, suffix, status, "jobs")
        for suffix, status in (("00000a", "killed"), ("ffffff", "failed"), ("000000", None))
    )
    _run(shared_server, "00000c", "completed", "jobs")
    _run(shared_server, "00000d", None, "another")
    found = shared_server.get("/api/v1/resumable", project="jobs", job=JOB)
    assert {run["id"]: run["status"] for run in found} == {killed: "killed", failed: "failed", cut_off: None}
    (one,) = shared_server.get("/api/v1/resumable", project="jobs", run=killed)
    assert (one["attempt"], one["last_step"], one["attributes"]) == (5, 7, {"host": "here"})
    assert one["parameters"] == wire.checksum_of_parameters([("b", [4, 4]), ("a", [4, 4])])
    assert 0 <= one["silent_seconds"] < 3600
    assert shared_server.get("/api/v1/resumable", project="jobs", job="9123456789") == []


def test_an_attempt_that_stored_nothing_hides_no_step(shared_server: GradwatchServer) -> None:
    run = _run(shared_server, "0000aa", None, "twice")
    shared_server.register(["a", "b"], id=run, attempt=6, project="twice")
    (one,) = shared_server.get("/api/v1/resumable", project="twice", run=run)
    assert (one["attempt"], one["last_step"]) == (6, 7)


@pytest.mark.parametrize("known", [True, False])
def test_only_one_process_goes_on_with_a_run(shared_server: GradwatchServer, known: bool) -> None:
    run = _run(shared_server, "0000bb", None, "claims") if known else f"run-{JOB}0000dd"
    answers = [
        shared_server.http.post(
            "/api/v1/runs",
            params={"after": 5},
            content=wire.encode(wire.Registration(id=run, project="claims", attempt=attempt, parameters=[])),
            headers={"Content-Type": wire.MESSAGEPACK_TYPE},
        ).status_code
        for attempt in (8, 9)
    ]
    assert answers == ([200, 409] if known else [409, 409])


def test_a_claim_may_be_sent_again_and_tells_nothing_of_another_project(shared_server: GradwatchServer) -> None:
    run = _run(shared_server, "0000cc", None, "mine")

    def claim(project: str, attempt: int, after: int) -> httpx.Response:
        return shared_server.http.post(
            "/api/v1/runs",
            params={"after": after},
            content=wire.encode(wire.Registration(id=run, project=project, attempt=attempt, parameters=[])),
            headers={"Content-Type": wire.MESSAGEPACK_TYPE},
        )

    assert [claim("mine", 8, 5).status_code for _ in range(2)] == [200, 200]
    told = [claim("other", 9, after) for after in (5, 8)]
    assert {answer.status_code for answer in told} == {409}
    assert told[0].json()["detail"] == told[1].json()["detail"]
