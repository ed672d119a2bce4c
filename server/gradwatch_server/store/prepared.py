"""Prepared statements: those of every batch, compiled once and executed with the driver's own cursor.

SQLAlchemy takes about ten times as long for a small statement as SQLite does: it looks the compiled statement up and
makes an execution context and a result for each. Transactions, types and errors stay SQLAlchemy's.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.sql.compiler import SQLCompiler

Parameters = Mapping[str, Any]
_Processor = Callable[[Any], Any]


@dataclass
class _Compiled:
    """A statement for one engine."""

    text: str
    binds: Sequence[tuple[str, _Processor | None]]
    """Name and conversion of each parameter, in the statement's order."""
    fixed: Parameters
    """Those that the statement sets itself."""
    by_position: bool
    row: Callable[[Sequence[Any]], Any]
    """Returns a named tuple of a row."""
    conversion: Callable[[int, object], _Processor | None]
    """Returns the conversion of a column for the type that the driver names."""
    results: Sequence[tuple[int, _Processor]] | None = None
    """Column and conversion of those values that the driver does not return as they are wanted; known with the first
    rows."""


class Prepared:
    """A statement whose parameters have the same names each time.

    Args:
        statement: returns the statement for an engine, ``sqlite`` or ``postgresql``.
        names: the parameters' names, if it is an INSERT or UPDATE that does not name its columns itself.
    """

    def __init__(self, statement: Callable[[str], sa.Executable], names: Sequence[str] | None = None) -> None:
        self._statement = statement
        self._names = names
        self._compiled: WeakKeyDictionary[sa.Dialect, _Compiled] = WeakKeyDictionary()

    def execute(self, connection: sa.Connection, *rows: Parameters) -> int:
        """Execute the statement once for each row of parameters; return how many database rows it changed.

        Raises:
            sqlalchemy.exc.DBAPIError: the database refuses, as from SQLAlchemy itself.
        """
        return cast("int", self._run(connection, rows, lambda cursor, _: cursor.rowcount))

    def all(self, connection: sa.Connection, parameters: Parameters) -> list[sa.Row[Any]]:
        """Return the rows that the statement selects or returns; raises as ``execute`` does."""
        return cast("list[sa.Row[Any]]", self._run(connection, [parameters], _fetch))

    def one_or_none(self, connection: sa.Connection, parameters: Parameters) -> sa.Row[Any] | None:
        """Return the only row, or None if there is none; raises as ``execute`` does."""
        found = self.all(connection, parameters)
        return found[0] if found else None

    def _run(
        self, connection: sa.Connection, rows: Sequence[Parameters], read: Callable[[DBAPICursor, _Compiled], Any]
    ) -> Any:
        if not connection.in_transaction():
            connection.begin()  # as its own statements do
        dialect = connection.dialect
        compiled = self._compiled.get(dialect)
        if compiled is None:
            compiled = self._compiled[dialect] = _compile(self._statement(dialect.name), dialect, self._names)
        values = [_bind(compiled, row) for row in rows]
        driver = connection.connection
        cursor = driver.cursor()
        try:
            if len(values) == 1:
                cursor.execute(compiled.text, values[0])
            else:
                cursor.executemany(compiled.text, values)
            return read(cursor, compiled)
        except dialect.loaded_dbapi.Error as error:
            lost = dialect.is_disconnect(error, cast("Any", driver.dbapi_connection), cursor)
            if lost:
                connection.invalidate(error)
            raise sa.exc.DBAPIError.instance(
                compiled.text, None, error, dialect.loaded_dbapi.Error, True, lost, dialect
            ) from error
        finally:
            cursor.close()


def _bind(compiled: _Compiled, row: Parameters) -> Any:
    given = {**compiled.fixed, **row}
    values = [given[name] if convert is None else convert(given[name]) for name, convert in compiled.binds]
    return values if compiled.by_position else dict(zip((name for name, _ in compiled.binds), values, strict=True))


def _fetch(cursor: DBAPICursor, compiled: _Compiled) -> list[Any]:
    rows = cursor.fetchall()
    if compiled.results is None:
        described = enumerate(cursor.description or ())
        converted = [(place, compiled.conversion(place, column[1])) for place, column in described]
        compiled.results = [(place, convert) for place, convert in converted if convert is not None]
    if compiled.results:
        rows = [list(row) for row in rows]
        for row in rows:
            for place, convert in compiled.results:
                row[place] = convert(row[place])
    return [compiled.row(row) for row in rows]


def _compile(statement: sa.Executable, dialect: sa.Dialect, names: Sequence[str] | None) -> _Compiled:
    """Compile a statement for an engine; its parameters are those that it needs each time."""
    compiled = cast("SQLCompiler", cast("sa.ClauseElement", statement).compile(dialect=dialect, column_keys=names))
    if compiled.insert_prefetch or compiled.update_prefetch or compiled.literal_execute_params:
        raise TypeError(f"a statement with values of SQLAlchemy's own cannot be prepared: {compiled}")
    processors = cast("Mapping[str, _Processor]", compiled._bind_processors)  # noqa: SLF001  # no public name
    order = list(compiled.params) if compiled.positiontup is None else compiled.positiontup
    fixed = {name: bind.effective_value for name, bind in compiled.binds.items() if not bind.required}
    columns = compiled._result_columns  # noqa: SLF001  # likewise

    def conversion(place: int, driver_type: object) -> _Processor | None:
        return columns[place].type._cached_result_processor(dialect, driver_type)  # noqa: SLF001

    row = namedtuple("Row", [column.keyname for column in columns], rename=True)  # type: ignore[misc]
    return _Compiled(
        compiled.string,
        [(name, processors.get(name)) for name in order],
        fixed,
        compiled.positiontup is not None,
        row._make,
        conversion,
    )
