"""Alerts: what is or was wrong, where, since when, why and what to do."""

from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query

from gradwatch_server import schema
from gradwatch_server.api import documents
from gradwatch_server.api.problem import problems
from gradwatch_server.api.reading import Reader

router = APIRouter(prefix="/api/v1", tags=["alerts"])

Text = Annotated[str | None, Query(max_length=512)]


@router.get("/alerts", response_model=list[documents.Alert], responses=problems(422))
def list_alerts(
    connection: Reader,
    run: Text = None,
    project: Text = None,
    rule: Text = None,
    state: Literal["pending", "firing", "resolved"] | None = None,
) -> Any:
    """List alerts, the newest first."""
    table = schema.alerts
    query = sa.select(table).order_by(table.c.first_at.desc(), table.c.id)
    for column, wanted in ((table.c.run, run), (table.c.rule, rule), (table.c.state, state)):
        if wanted is not None:
            query = query.where(column == wanted)
    if project is not None:
        query = query.join(schema.runs, schema.runs.c.id == table.c.run).where(schema.runs.c.project == project)
    return [dict(row) for row in connection.execute(query).mappings()]
