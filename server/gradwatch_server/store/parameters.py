"""The parameter table: every query and every change of it.

Rules, ``/metrics``, series, maps and exports all build on the records that ``load_parameters`` returns, so they cannot
disagree on which parameters are matrices, embeddings or frozen.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch.wire import Parameter
from gradwatch_server.store import schema

_table = schema.parameters
_select = (
    sa.select(
        *_table.c["run", "name"],
        sa.cast(_table.c.shape, sa.Text).label("shape_json"),
        *_table.c["dtype", "depth", "units", "trainable", "kind"],
    )
    .where(_table.c.run.in_(sa.bindparam("runs", expanding=True)))
    .order_by(*_table.c["run", "position"])
)


def load_parameters(connection: sa.Connection, run_id: str) -> list[Parameter]:
    """Return the parameters of a run in the order of its vectors; none if the run is unknown."""
    return load_parameters_of_runs(connection, [run_id])[run_id]


def load_parameters_of_runs(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, list[Parameter]]:
    """Return the parameters of several runs, each in the order of its run's vectors."""
    found: dict[str, list[Parameter]] = {run_id: [] for run_id in run_ids}
    rows: Sequence[Any] = connection.execute(_select, {"runs": run_ids}).all() if run_ids else []
    for run, name, shape, dtype, depth, units, trainable, kind in rows:
        found[run].append(Parameter(name, _decode_shape(shape), dtype, depth, units, trainable, kind))
    return found


def load_depth_order(connection: sa.Connection, run_id: str) -> tuple[list[int], list[str]]:
    """Return the indices of a run's parameters into its vectors, from input to output, and their names likewise."""
    parameters = load_parameters(connection, run_id)
    order = sorted(range(len(parameters)), key=lambda position: parameters[position].depth or 0)
    return order, [parameters[position].name for position in order]


def load_parameter_versions(connection: sa.Connection, run_ids: Sequence[str]) -> dict[str, str]:
    """Return a text for each run that changes whenever the run gains or changes a parameter.

    It holds the depths, with frozen parameters marked: nothing else of a registered parameter may change.
    """
    frozen_mark = sa.case((_table.c.trainable, ""), else_="f")
    ordered = (
        sa.select(_table.c.run, (sa.cast(_table.c.depth, sa.Text) + frozen_mark).label("depth"))
        .where(_table.c.run.in_(run_ids))
        .order_by(_table.c.run, _table.c.position)
        .subquery()
    )
    joined = sa.select(ordered.c.run, sa.func.aggregate_strings(ordered.c.depth, " ")).group_by(ordered.c.run)
    versions = dict.fromkeys(run_ids, "")
    return versions | {row[0]: row[1] for row in connection.execute(joined)}


def insert_parameters(
    connection: sa.Connection, run_id: str, parameters: Sequence[Parameter], first_position: int
) -> None:
    """Append parameters to a run; one without a depth gets its position as depth."""
    rows = [
        msgspec.structs.asdict(parameter)
        | {"run": run_id, "position": position, "depth": position if parameter.depth is None else parameter.depth}
        for position, parameter in enumerate(parameters, first_position)
    ]
    if rows:
        connection.execute(sa.insert(_table), rows)


def changed_parameters(stored: Sequence[Parameter], registered: Sequence[Parameter]) -> dict[int, tuple[int, bool]]:
    """Return position -> (depth, trainable) of the stored parameters that a later registration changes."""
    changes = {}
    for position, (before, after) in enumerate(zip(stored, registered, strict=False)):
        depth = before.depth if after.depth is None else after.depth
        if (depth, after.trainable) != (before.depth, before.trainable):
            changes[position] = (depth or 0, after.trainable)
    return changes


def update_parameters(connection: sa.Connection, run_id: str, changes: Mapping[int, tuple[int, bool]]) -> None:
    """Store changes as ``changed_parameters`` returns them."""
    rows = [{"at": position, "to": depth, "trains": trains} for position, (depth, trains) in changes.items()]
    if rows:
        mine = _table.c.run == run_id, _table.c.position == sa.bindparam("at")
        values: dict[str, Any] = {"depth": sa.bindparam("to"), "trainable": sa.bindparam("trains")}
        connection.execute(sa.update(_table).where(*mine).values(values), rows)


@lru_cache(maxsize=4096)
def _decode_shape(shape: str) -> list[int]:
    """Return a shape from its JSON text. Networks repeat their shapes, so most are decoded only once."""
    return msgspec.json.decode(shape, type=list[int])
