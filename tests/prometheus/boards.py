"""The boards as their files hold them, and their SQL run on a PostgreSQL as Grafana runs it."""

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from dashboards.build import render

Board = dict[str, Any]
BOARDS: dict[str, Board] = {name: json.loads(text) for name, text in render().items()}


def panels_of(board: Board) -> Iterator[Board]:
    """Yield the panels of a board, those of closed rows among them, without the rows' headings."""
    for panel in board["panels"]:
        yield from panel["panels"] if panel["type"] == "row" else [panel]


PANELS = {f"{name} {panel['id']}": panel for name, board in BOARDS.items() for panel in panels_of(board)}
_TARGETS = [(f"{name} {target['refId']}", target) for name, panel in PANELS.items() for target in panel["targets"]]
EXPRESSIONS = {name: target["expr"] for name, target in _TARGETS if "expr" in target}
STATEMENTS = {name: target["rawSql"] for name, target in _TARGETS if "rawSql" in target}
VARIABLES = {
    f"{name} variable {variable['name']}": variable["query"]
    for name, board in BOARDS.items()
    for variable in board["templating"]["list"]
    if variable["type"] == "query"
}
ANNOTATIONS = {
    f"{name} annotation {annotation['name']}": annotation["target"]["rawSql"]
    for name, board in BOARDS.items()
    for annotation in board["annotations"]["list"]
}
EVERY_STATEMENT = STATEMENTS | VARIABLES | ANNOTATIONS
CHOICES: dict[str, tuple[list[str], ...]] = {
    "project": ([], ["vision"], ["vision", "o'hara"]),
    "run": ([], ["run-ill"], ["unknown"]),
    "layers": ([], ["all"], ["1-2"], ["2-1"], ["1-999999999"], ["it's none"]),
}
"""What may be chosen of each variable: nothing, one, several, and what is not there."""


def expanded(statement: str, start: float, end: float, **chosen: Sequence[str]) -> str:
    """Return SQL with Grafana's macros and variables in it replaced; ``chosen`` are the values of the variables."""
    first, last = int(start), int(end)
    statement = re.sub(r"\$__unixEpochFilter\(([\w.]+)\)", rf"\1 >= {first} AND \1 <= {last}", statement)
    statement = statement.replace("$__unixEpochFrom()", str(first)).replace("$__unixEpochTo()", str(last))
    for name, values in chosen.items():
        quoted = ",".join("'" + value.replace("'", "''") + "'" for value in values)
        statement = statement.replace(f"${{{name}:sqlstring}}", quoted)
    assert not re.search(r"\$(?=[_a-zA-Z{])", statement), statement
    return statement


def rows(engine: sa.Engine, statement: str, since: float = 1e9, /, **chosen: Sequence[str]) -> list[Any]:
    """Return what a statement yields for the time since then, Unix seconds."""
    values = {"project": ["vision"], "run": ["run-ill"], "layers": ["all"]} | chosen
    text = expanded(statement, since, time.time() + 3600, **values)
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(text.replace("%", "%%")).all())


def calls(engine: sa.Engine, statement: str, since: float = 1e9, /, **chosen: Sequence[str]) -> int:
    """Return how often a statement unnests an array or takes a text apart: what it costs, whatever else is stored."""
    (((plan,),),) = rows(engine, f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", since, **chosen)
    nodes, found = [plan["Plan"]], 0
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node["Node Type"] == "Function Scan" and node.get("Function Name") != "generate_series":
            found += node["Actual Loops"]
    return found


def choices(statement: str) -> Iterator[dict[str, list[str]]]:
    """Yield every combination of choices of the variables in a statement."""
    named = [name for name in CHOICES if f"${{{name}:sqlstring}}" in statement]
    for values in itertools.product(*(CHOICES[name] for name in named)):
        yield dict(zip(named, values, strict=True))
