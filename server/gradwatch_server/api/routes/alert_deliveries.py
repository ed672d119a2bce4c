"""Route of an alert's deliveries: which of its transitions reached which receiver, and every attempt."""

from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import AuthorisedRoute, of_alert, requires
from gradwatch_server.api.dependencies import Engine
from gradwatch_server.api.problem import problems
from gradwatch_server.errors import Refused
from gradwatch_server.store import schema

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["alerts"])

AlertId = Annotated[str, Path(alias="id", max_length=64)]


class AlertDelivery(BaseModel):
    """Delivery of one transition to one receiver."""

    id: str
    receiver: str
    transition: str = Field(description="the state that the receiver is notified of: firing or resolved")
    step: int
    state: str = Field(description="due, delivered or dead")
    created_at: float
    due_at: float
    delivered_at: float | None
    attempts: list[documents.Attempt]


@router.get(
    "/alerts/{id}/deliveries",
    dependencies=[requires("read", of_alert)],
    response_model=list[AlertDelivery],
    responses=problems(404),
)
def list_alert_deliveries(engine: Engine, alert_id: AlertId) -> Any:
    """List an alert's deliveries in the order of its transitions, with their attempts."""
    alerts, attempts = schema.alerts, schema.attempts
    with engine.connect() as connection:
        if connection.execute(sa.select(alerts.c.id).where(alerts.c.id == alert_id)).first() is None:
            raise Refused(
                404, "Unknown alert", f"alert {alert_id!r} is not known here: GET /api/v1/alerts lists those that are"
            )
        listed = _load_deliveries(connection, alert_id)
        of_these = sa.select(attempts).where(attempts.c.delivery.in_(list(listed)))
        for attempt in connection.execute(of_these.order_by(attempts.c.delivery, attempts.c.number)).mappings():
            listed[attempt["delivery"]]["attempts"].append(dict(attempt))
    return list(listed.values())


def _load_deliveries(connection: sa.Connection, alert_id: str) -> dict[str, dict[str, Any]]:
    """Return the deliveries of an alert by their ids, without attempts, in the order of its transitions."""
    deliveries, transitions = schema.deliveries, schema.transitions
    rows = connection.execute(
        sa.select(deliveries, transitions.c.state.label("transition_state"), transitions.c.step)
        .join(transitions, transitions.c.id == deliveries.c.transition)
        .where(deliveries.c.alert == alert_id)
        .order_by(deliveries.c.number, deliveries.c.receiver)
    ).mappings()
    return {row["id"]: dict(row) | {"transition": row["transition_state"], "attempts": []} for row in rows}
