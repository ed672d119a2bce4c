"""Reading ahead for SQLite: the rows of a coarse level lie far apart, and a disk finds several in the time of one."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

_PARTS = 4
_FEWEST_ROWS = 128
_helpers = ThreadPoolExecutor(_PARTS - 1, "gradwatch-readahead")


@contextmanager
def reading_ahead(
    connection: sa.Connection, statement: sa.Select[Any], parameters: Mapping[str, Any], steps: NDArray[np.int64]
) -> Iterator[None]:
    """While the first rows of a range are read, fetch the others to the system's cache, where that may help.

    Args:
        connection: reads the range in the meantime, in the order of the steps.
        statement: touches the rows from ``first`` to ``last``.
        parameters: its others.
        steps: of the rows, ascending.
    """
    tasks = []
    writes = connection.get_execution_options().get("writes", False)  # its engine's other connections would wait for it
    if connection.dialect.name == "sqlite" and len(steps) >= _FEWEST_ROWS and not writes:
        for part in np.array_split(steps, _PARTS)[1:]:
            within = {**parameters, "first": int(part[0]), "last": int(part[-1])}
            tasks.append(_helpers.submit(_touch, connection.engine, statement, within))
    try:
        yield
    finally:
        wait([task for task in tasks if not task.cancel()])


def _touch(engine: sa.Engine, statement: sa.Select[Any], parameters: Mapping[str, Any]) -> None:
    with suppress(sa.exc.SQLAlchemyError), engine.connect() as connection:  # whoever reads the rows meets the error
        connection.execute(statement, parameters).all()
