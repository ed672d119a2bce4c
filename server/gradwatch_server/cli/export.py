"""``gradwatch export``: write the samples of a run as CSV or Parquet, one row for each step and parameter."""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from gradwatch.wire import MISSING, STATISTICS, UNSTEPPED
from gradwatch_server.cli.command import database_parser, open_database, print_line, run_command
from gradwatch_server.errors import GradwatchError
from gradwatch_server.plain_text import table_cell
from gradwatch_server.store import schema
from gradwatch_server.store.parameters import load_parameters
from gradwatch_server.store.rollups.levels import pruned_to
from gradwatch_server.store.vectors import padded

_CHUNK_SAMPLES = 256
Column = list[Any] | NDArray[np.float32]


class ExportError(GradwatchError):
    """The run cannot be exported like this: the text says what to change."""


class Table(Protocol):
    """A file of rows."""

    def write(self, columns: dict[str, Column]) -> None:
        """Append rows, which are given as columns of one length."""

    def close(self) -> None:
        """Write the end of the file."""


class CsvTable:
    """Comma-separated values: NaN and Infinity by name, a missing value as an empty field.

    Names of parameters are written so that neither a terminal nor a spreadsheet acts on them; Parquet keeps them as
    they are.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._writer = csv.writer(file, lineterminator="\n")
        self._has_header = False

    def write(self, columns: dict[str, Column]) -> None:
        """Append rows, the first ones below a line of column names."""
        if not self._has_header:
            self._writer.writerow(columns)
            self._has_header = True
        self._writer.writerows(zip(*map(_to_csv, columns.values()), strict=True))

    def close(self) -> None:
        """Flush the file."""
        self._file.flush()


class ParquetTable:
    """Parquet: NaN and Infinity as floats, a missing value as null."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as pa  # an extra
            from pyarrow import parquet
        except ModuleNotFoundError:
            raise ExportError(
                "Parquet needs pyarrow, which is not installed: pip install 'gradwatch[parquet]'"
            ) from None
        self._pa, self._parquet = pa, parquet
        self._path = path
        self._writer: Any = None

    def write(self, columns: dict[str, Column]) -> None:
        """Append a group of rows."""
        arrays = {name: self._array(column) for name, column in columns.items()}
        table = self._pa.table(arrays)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def _array(self, column: Column) -> Any:
        if isinstance(column, np.ndarray):
            return self._pa.array(column, mask=column <= MISSING)
        return self._pa.array(column)

    def close(self) -> None:
        """Write the footer."""
        if self._writer is not None:
            self._writer.close()


def _to_csv(column: Column) -> list[Any]:
    """Return the fields of a column; a float32 in the fewest digits that are read back as the same number."""
    if not isinstance(column, np.ndarray):
        return [table_cell(entry) if isinstance(entry, str) else entry for entry in column]
    names = {"nan": "NaN", "inf": "Infinity", str(MISSING): "", str(UNSTEPPED): ""}
    return [names.get(text, text) for text in map(str, column)]


def export(connection: sa.Connection, run_id: str, table: Table) -> int:
    """Write every stored sample of a run; return how many.

    Raises:
        ExportError: the run is not known, or has no samples.
    """
    run = connection.execute(sa.select(schema.runs).where(schema.runs.c.id == run_id)).one_or_none()
    if run is None:
        raise ExportError(f"run {run_id!r} is not known in this database: GET /api/v1/runs lists those that are")
    names = [parameter.name for parameter in load_parameters(connection, run_id)]
    statistics = [name for name in STATISTICS if name in run.statistics]
    count = 0
    for rows in _chunks(connection, run_id, statistics):
        table.write(_columns(rows, names, statistics))
        count += len(rows)
    if not count:
        raise ExportError(f"run {run_id!r} has no samples")
    return count


def _chunks(connection: sa.Connection, run_id: str, statistics: Sequence[str]) -> Iterator[Sequence[sa.Row[Any]]]:
    """Yield the samples in the order of their steps, at most ``_CHUNK_SAMPLES`` at a time."""
    table = schema.samples
    wanted = sa.select(*table.c["step", "attempt", "at"], *(table.c[name] for name in statistics))
    after = -1
    while True:
        following = wanted.where(table.c.run == run_id, table.c.level == 0, table.c.step > after)
        rows = connection.execute(following.order_by(table.c.step).limit(_CHUNK_SAMPLES)).all()
        if not rows:
            return
        after = rows[-1].step
        yield rows


def _columns(rows: Sequence[sa.Row[Any]], names: Sequence[str], statistics: Sequence[str]) -> dict[str, Column]:
    width = len(names)
    columns: dict[str, Column] = {
        "step": np.repeat([row.step for row in rows], width).tolist(),
        "attempt": np.repeat([row.attempt for row in rows], width).tolist(),
        "at": np.repeat([row.at for row in rows], width).tolist(),
        "parameter": list(names) * len(rows),
    }
    for place, name in enumerate(statistics, 3):
        columns[name] = np.concatenate([padded(row[place], width) for row in rows])
    return columns


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch export``; return the exit code."""
    parser = database_parser("export", "Write the samples of a run as a table.")
    parser.add_argument("run", metavar="RUN", help="id of the run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="FILE.csv or FILE.parquet (default: CSV to standard output)"
    )
    options = parser.parse_args(arguments)
    return run_command("export", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    with open_database(options) as engine, engine.connect() as connection:
        with _replacing(options.output) as path, ExitStack() as stack:
            table = _open(path, stack)
            stack.callback(table.close)
            count = export(connection, options.run, table)
        pruned = _pruned(connection, options.run)
    print_line(f"gradwatch export: {count} samples of run {options.run}{pruned}", file=sys.stderr)
    return 0


def _pruned(connection: sa.Connection, run_id: str) -> str:
    """Return the words about samples that retention has deleted, if there were any."""
    wanted = sa.select(schema.runs.c.coverage).where(schema.runs.c.id == run_id)
    to = pruned_to(connection.execute(wanted).scalar_one().get("pruned", []), 0)
    return "" if to < 0 else f"; others up to step {to} have been pruned ([retention] level_days)"


@contextmanager
def _replacing(output: Path | None) -> Iterator[Path | None]:
    """Yield the path of a temporary file, which replaces the output file once it is complete; None for standard output.

    Raises:
        ExportError: the output file has another suffix than .csv or .parquet.
    """
    if output is None:
        yield None
        return
    if output.suffix not in (".csv", ".parquet"):
        raise ExportError(f"--output {output}: name a file that ends in .csv or .parquet")
    path = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        yield path
        path.replace(output)
    finally:
        path.unlink(missing_ok=True)


def _open(path: Path | None, stack: ExitStack) -> Table:
    if path is None:
        return CsvTable(sys.stdout)
    if path.suffix == ".parquet":
        return ParquetTable(path)
    return CsvTable(stack.enter_context(path.open("w", newline="", encoding="utf-8")))
