"""Long lists, a page at a time: the newest first, and a link to what follows."""

from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Query, Request, Response

Limit = Annotated[int, Query(ge=1, le=10_000, description="most entries in one answer, the newest first")]
Before = Annotated[
    str | None,
    Query(
        pattern=r"^[0-9]{1,12}(\.[0-9]{1,20})?(e-[0-9]{2,3})?,[!-~]{1,300}$",
        description="what is older than an entry, by its time and id: the Link header has the next page's",
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
    """Return a page of a query; where there is more, the answer gets a ``Link`` header of relation ``next``.

    Args:
        connection: to read with.
        query: what is listed, not ordered yet.
        order: when an entry was made, and its id.
        before: time and id of the last entry of the page before, which may be gone by now; none: the first page.
        limit: most entries.
        exchange: the request and its answer.
    """
    (made_at, entry_id), (request, response) = order, exchange
    if before is not None:
        time, _, last_id = before.partition(",")
        last = float(time)
        query = query.where(sa.or_(made_at < last, sa.and_(made_at == last, entry_id < last_id)))
    rows = connection.execute(query.order_by(made_at.desc(), entry_id.desc()).limit(limit + 1)).mappings().all()
    if len(rows) > limit:
        last_row = rows[limit - 1]
        following = request.url.include_query_params(before=f"{last_row[made_at.name]!r},{last_row[entry_id.name]}")
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return rows[:limit]
