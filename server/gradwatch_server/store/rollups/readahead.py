"""Readahead for SQLite: the rows of a coarse level lie far apart, and a disk finds several in the time of one."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

_PARTS = 4
_FEWEST_ROWS = 128
_threads = ThreadPoolExecutor(_PARTS - 1, "gradwatch-readahead")


@contextmanager
def reading_ahead(
    connection: sa.Connection, statement: sa.Select[Any], parameters: Mapping[str, Any], steps: NDArray[np.int64]
) -> Iterator[None]:
    """While the first rows of a range are read, have other threads bring the rest into the system's cache.

    They do so only on SQLite, for many rows, and not within a transaction that writes.

    Args:
        connection: reads the range in the meantime, by ascending steps.
        statement: reads the rows from the parameter ``first`` to the parameter ``last``.
        parameters: the other parameters of the statement.
        steps: steps of the rows, ascending.
    """
    tasks = []
    writes = connection.get_execution_options().get("writes", False)  # other connections would wait for it
    if connection.dialect.name == "sqlite" and len(steps) >= _FEWEST_ROWS and not writes:
        for part in np.array_split(steps, _PARTS)[1:]:
            within = {**parameters, "first": int(part[0]), "last": int(part[-1])}
            tasks.append(_threads.submit(_touch, connection.engine, statement, within))
    try:
        yield
    finally:
        wait([task for task in tasks if not task.cancel()])


def _touch(engine: sa.Engine, statement: sa.Select[Any], parameters: Mapping[str, Any]) -> None:
    # An error is not lost: the connection that reads the rows afterwards meets it, too.
    with suppress(sa.exc.SQLAlchemyError), engine.connect() as connection:
        connection.execute(statement, parameters).all()
