"""What each project takes, on the command line, and the database's size in ``/metrics``."""

import re

import numpy as np
import pytest
import sqlalchemy as sa

from gradwatch import wire
from gradwatch.cli import main
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store.database import size_bytes, writing
from tests.processes import GradwatchServer


def test_projects_are_listed_with_what_they_take(
    engine: sa.Engine, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest = Ingest(Configuration(), "http://localhost")
    parameters = [wire.Parameter(name, [2, 2]) for name in "abcd"]
    vector = np.ones(4, np.float32)
    samples = [wire.Sample(step=step, at=1.0, statistics={"grad_norm": vector}) for step in range(3)]
    with writing(engine) as connection:
        for run, project in [("r1", "large"), ("r2", "large"), ("r3", "small"), ("r4", "em\x1bpty")]:
            ingest.register(connection, run, wire.Registration(parameters=parameters, project=project))
        for run in ("r1", "r2", "r3"):
            ingest.store(connection, run, wire.Batch(id="b", samples=samples))
        end = wire.End(at=2.0, status="completed", exit_code=0)
        ingest.store(connection, "r2", wire.Batch(id="end", samples=[], end=end))
        megabytes = size_bytes(connection) / 1e6
    assert main(["projects", "--database-url", database_url]) == 0
    _, *lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    listed = [(line[-1], *line[:5]) for line in lines]
    assert listed == [
        ("large", "2", "1", "6", "24", "66.7%"),
        ("small", "1", "1", "3", "12", "33.3%"),
        ("em\\x1bpty", "1", "1", "0", "0", "0.0%"),
    ]
    assert sum(float(line[5]) for line in lines) == pytest.approx(megabytes, rel=0.2)


def test_a_database_that_is_not_there_is_not_made(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("none") / "none.db"
    assert main(["projects", "--database-url", f"sqlite:///{path}"]) == 1
    assert not path.exists()


def test_metrics_tell_what_the_database_takes(server: GradwatchServer) -> None:
    found = re.search(r"^gradwatch_database_bytes (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    assert float(found[1]) > 100_000
