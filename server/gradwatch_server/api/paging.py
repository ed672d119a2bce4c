"""Long lists, a page at a time: the newest first, and a link to what follows."""

from collections.abc import Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Query, Request, Response

from gradwatch_server.errors import Refused

Limit = Annotated[int, Query(ge=1, le=10_000, description="most entries in one answer, the newest first")]
Before = Annotated[
    str | None, Query(max_length=512, description="id of an entry: what is older than it; the Link header has the next")
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
        before: the last entry of the page before; none: the first page.
        limit: most entries.
        exchange: the request and its answer.

    Raises:
        Refused: 404 where ``before`` is not known.
    """
    (made_at, entry_id), (request, response) = order, exchange
    if before is not None:
        last = connection.execute(sa.select(made_at).where(entry_id == before)).scalar_one_or_none()
        if last is None:
            raise Refused(404, "Unknown entry", f"before={before!r} is not known here: begin without it")
        query = query.where(sa.or_(made_at < last, sa.and_(made_at == last, entry_id < before)))
    rows = connection.execute(query.order_by(made_at.desc(), entry_id.desc()).limit(limit + 1)).mappings().all()
    if len(rows) > limit:
        following = request.url.include_query_params(before=rows[limit - 1][entry_id.name])
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return rows[:limit]
