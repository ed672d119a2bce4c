"""What reads many runs: pages of bounded size, and a scrape whose cost is bounded."""

import os
import re
import threading
import time
from pathlib import Path

import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, writing
from tests.processes import GradwatchServer, sample


def copy_run(url: str, run_id: str, count: int) -> list[str]:
    """Store a run many times, each second time seen at the same time; return all ids in the order of a list."""
    engine = open_engine(url)
    with writing(engine) as connection:
        row = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id)).mappings().one()
        now = time.time()
        copies = [dict(row) | {"id": f"copy-{one:05}", "last_seen_at": now - one // 2} for one in range(count)]
        connection.execute(sa.insert(schema.runs), copies)
        newest = (schema.runs.c.last_seen_at.desc(), schema.runs.c.id.desc())
        listed = list(connection.execute(sa.select(schema.runs.c.id).order_by(*newest)).scalars())
    engine.dispose()
    return listed


def peak_megabytes(server: GradwatchServer) -> float:
    """Return the most memory that a server has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def processor_seconds(server: GradwatchServer) -> float:
    """Return the processor time of a server's process so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_runs_come_a_page_at_a_time(tmp_path: Path, own_database_url: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        run = server.register(["a"], project="paged")
        server.store(run, wire.Batch(id="b", samples=[sample(1, float("nan"), loss=0.5)]))
        ids = copy_run(own_database_url, run, 1_200)
        assert [one["id"] for one in server.get("/api/v1/runs")] == ids[:1_000]
        found, address = [], "/api/v1/runs?project=paged&state=running&limit=500"
        while address:
            answer = server.http.get(address)
            found += answer.json()
            address = answer.links.get("next", {}).get("url", "")
        assert [one["id"] for one in found] == ids
        (ill,) = (one for one in found if one["id"] == run)
        assert (ill["firing"], ill["worst_rule"], ill["scalars"]) == (1, "nonfinite", {"loss": 0.5})
        assert server.get("/api/v1/runs", state="finished") == server.get("/api/v1/runs", project="other") == []
        assert server.http.get("/api/v1/runs", params={"limit": 1_001}).status_code == 422
        text = server.http.get("/metrics").text
        assert "\ngradwatch_runs_left_out 201.0" in text
        assert text.count("\ngradwatch_run_step{") == 1_000


def test_a_list_reads_no_attributes_and_few_scalars(server: GradwatchServer) -> None:
    attributes = {f"k{number}": "v" * 4_096 for number in range(256)}
    run = server.register(["a"], attributes=attributes)
    many = {f"{'s' * 200}{number}": 1.0 for number in range(200)}
    assert server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0, **many)])).status_code == 200
    copy_run(f"sqlite:///{server.database}", run, 60)
    before = peak_megabytes(server)
    readers = [threading.Thread(target=server.http.get, args=[path]) for path in ("/api/v1/runs", "/metrics") * 3]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert peak_megabytes(server) - before < 60, "60 runs with a megabyte each"
    assert all(one["scalars"] == {} for one in server.get("/api/v1/runs"))
    assert server.get(f"/api/v1/runs/{run}")["scalars"].keys() == many.keys()
    assert server.get(f"/api/v1/runs/{run}")["attributes"] == attributes


def test_a_scrape_keeps_no_more_layouts_than_fit(server: GradwatchServer) -> None:
    """Six networks of 40,000 parameters: a piece of a scrape holds two, and no piece is lost."""
    runs = [server.register([f"{number}.{one}" for one in range(40_000)]) for number in range(6)]
    for run in runs:
        assert server.store(run, wire.Batch(id="b", samples=[sample(1, *[1.0] * 40_000)])).status_code == 200
    text = server.http.get("/metrics").text
    for run in runs:
        of_run = rf'{{[^}}]*run="{run}"[^}}]*}}'
        assert re.findall(rf"\ngradwatch_run_parameters{of_run} (\S+)", text) == ["40000.0"]
        assert len(re.findall(rf"\ngradwatch_parameter_grad_norm{of_run}", text)) == 10


def test_as_many_parameters_as_a_run_may_have_are_taken_in_without_holding_up_others(server: GradwatchServer) -> None:
    """Each in a part of the model of its own: comparing every part with every other one took 80 s of the writer."""
    started = processor_seconds(server)
    server.register([f"{one}.weight" for one in range(100_000)])
    assert processor_seconds(server) - started < 10.0


def test_a_project_has_only_so_many_runs(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text("[limits]\nruns_per_project = 2\n")
    with GradwatchServer(tmp_path / "gradwatch.db", "--config", str(config)) as server:
        first, _ = [server.register(["a"], project="full") for _ in range(2)]
        beyond = server.post("/api/v1/runs", wire.Registration(project="full", parameters=[]))
        assert (beyond.status_code, beyond.headers["retry-after"]) == (429, "30")
        assert "limits.runs_per_project" in beyond.text
        server.register(["a"], id=first, project="full", attempt=2)
        server.register(["a"], project="other")
        assert server.http.delete(f"/api/v1/runs/{first}").status_code == 204
        server.register(["a"], project="full")
