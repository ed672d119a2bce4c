"""Pages of long lists, the newest entries first, each with a link to the next page."""

from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Query, Request, Response

Limit = Annotated[int, Query(ge=1, le=10_000, description="most entries in one response, the newest first")]
Before = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9]{1,12}(\.[0-9]{1,20})?(e-[0-9]{2,3})?,[!-~]{1,300}$",
        description="only entries that are older than this one, given by its time and id, as in the Link header",
    ),
]


def read_page(
    connection: sa.Connection,
    query: sa.Select[Any],
    order: tuple[sa.Column[float], sa.Column[str]],
    before: str | None,
    limit: int,
    exchange: tuple[Request, Response],
) -> Sequence[sa.RowMapping]:
    """Return a page of a query; if there is another one, the response gets a ``Link`` header of relation ``next``.

    Args:
        connection: reads the page.
        query: selects all entries of the list, unordered.
        order: the columns of an entry's time and of its id.
        before: time and id of the last entry of the page before, which may be deleted by now; None: the first page.
        limit: most entries.
        exchange: the request and its response.
    """
    (made_at, entry_id), (request, response) = order, exchange
    if before is not None:
        query = query.where(_is_older(order, before))
    rows = connection.execute(query.order_by(made_at.desc(), entry_id.desc()).limit(limit + 1)).mappings().all()
    if len(rows) > limit:
        last = rows[limit - 1]
        following = request.url.include_query_params(before=f"{last[made_at.name]!r},{last[entry_id.name]}")
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return rows[:limit]


def _is_older(order: tuple[sa.Column[float], sa.Column[str]], before: str) -> sa.ColumnElement[bool]:
    """Return the condition of entries that come after an entry in the list, which is ordered by time, then id."""
    (made_at, entry_id), (time, _, last_id) = order, before.partition(",")
    return sa.or_(made_at < float(time), sa.and_(made_at == float(time), entry_id < last_id))
