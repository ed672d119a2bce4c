"""Export: what comes out is what was measured, bit by bit, in both forms."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from pyarrow import parquet

from gradwatch import wire
from tests.processes import GradwatchServer, environment, sample

VALUES = [0.1, float("nan"), float("inf"), wire.MISSING]
SAMPLES = 600


def _export(database_url: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradwatch", "export", "--database-url", database_url, *arguments]
    return subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, check=False)


def _number(text: str) -> np.float32:
    return np.float32(wire.MISSING if text == "" else text)


def test_csv_and_parquet_hold_every_sample(shared_server: GradwatchServer, database_url: str, tmp_path: Path) -> None:
    run = shared_server.register(["a", "b", "c", "d"])
    listed = [sample(step, *VALUES[:3], wire.MISSING, weight_norm=step / 3) for step in range(SAMPLES)]
    assert shared_server.store(run, wire.Batch(id="b", samples=listed)).status_code == 200
    printed = _export(database_url, tmp_path, run)
    assert printed.returncode == 0, printed.stderr
    rows = list(csv.DictReader(io.StringIO(printed.stdout)))
    assert list(rows[0]) == ["step", "attempt", "at", "parameter", "grad_norm", "weight_norm"]
    assert [(int(row["step"]), row["parameter"]) for row in rows] == [
        (step, name) for step in range(SAMPLES) for name in "abcd"
    ]
    assert [row["grad_norm"] for row in rows[:4]] == ["0.1", "NaN", "Infinity", ""]
    gradients = np.array([_number(row["grad_norm"]) for row in rows])
    np.testing.assert_array_equal(gradients, np.array(VALUES * SAMPLES, np.float32))
    weights = np.repeat(np.array([step / 3 for step in range(SAMPLES)], np.float32), 4)
    np.testing.assert_array_equal(np.array([_number(row["weight_norm"]) for row in rows]), weights)
    assert _export(database_url, tmp_path, run, "--output", "run.csv").returncode == 0
    assert (tmp_path / "run.csv").read_text() == printed.stdout
    assert _export(database_url, tmp_path, run, "--output", "run.parquet").returncode == 0
    table = parquet.read_table(tmp_path / "run.parquet")
    assert table.column_names == list(rows[0])
    assert table["grad_norm"].null_count == SAMPLES
    np.testing.assert_array_equal(table["grad_norm"].fill_null(wire.MISSING).to_numpy(), gradients)
    np.testing.assert_array_equal(table["weight_norm"].to_numpy(), weights)
    assert table["step"].to_pylist() == [int(row["step"]) for row in rows]


def test_a_table_that_cannot_be_made_leaves_the_one_that_is_there(
    shared_server: GradwatchServer, database_url: str, tmp_path: Path
) -> None:
    for name in ("run.csv", "run.parquet"):
        (tmp_path / name).write_text("mine")
        assert _export(database_url, tmp_path, "typo", "--output", name).returncode == 1
        assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_exported_is_said(shared_server: GradwatchServer, database_url: str, tmp_path: Path) -> None:
    empty = shared_server.register(["a"])
    for arguments, reason in (
        (["nonsense"], "run 'nonsense' is not known"),
        ([empty], "has no samples"),
        ([empty, "--output", "run.xlsx"], "ends in .csv or .parquet"),
    ):
        done = _export(database_url, tmp_path, *arguments)
        assert done.returncode == 1
        assert reason in done.stderr


def test_a_name_that_the_terminals_encoding_lacks(
    shared_server: GradwatchServer, database_url: str, tmp_path: Path
) -> None:
    run = shared_server.register(["größe"])
    assert shared_server.store(run, wire.Batch(id="b", samples=[sample(1, 1.0)])).status_code == 200
    command = [sys.executable, "-m", "gradwatch", "export", "--database-url", database_url, run]
    printed = subprocess.run(command, env=environment(PYTHONIOENCODING="ascii"), cwd=tmp_path, capture_output=True)
    assert (printed.returncode, b"Traceback" in printed.stderr) == (0, False)
    assert b"gr\\xf6\\xdfe" in printed.stdout
