"""Silences and inhibition: decide which alerts are muted, so that no receiver is notified of them.

A silence mutes alerts for a while by project, run and rule. A rule that fires can inhibit others of the same run.
"""

import secrets
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import sqlalchemy as sa

from gradwatch_server.diagnosis import RULES
from gradwatch_server.errors import Refused
from gradwatch_server.store import schema

INHIBITED_BY = {rule.name: rule.inhibited_by for rule in RULES if rule.inhibited_by}
"""Inhibited rule -> the rule whose firing alert mutes it in the same run, because that alert says the same better."""


class Silence(msgspec.Struct, frozen=True, kw_only=True):
    """Mutes the alerts that match its three patterns, which may have ``*``, ``?`` and ``[...]``."""

    id: str
    project: str
    run: str
    rule: str
    author: str
    comment: str
    created_at: float
    ends_at: float

    def matches(self, project: str, run: str, rule: str) -> bool:
        """Return whether the silence mutes the alert of a rule and a run."""
        asked = ((project, self.project), (run, self.run), (rule, self.rule))
        return all(fnmatchcase(value, pattern) for value, pattern in asked)


def load(connection: sa.Connection, now: float) -> list[Silence]:
    """Return the silences that are active at ``now``, ordered by their ends."""
    table = schema.silences
    rows = connection.execute(sa.select(table).where(table.c.ends_at > now).order_by(table.c.ends_at, table.c.id))
    return [Silence(**row) for row in rows.mappings()]


def add(connection: sa.Connection, now: float, **fields: Any) -> Silence:
    """Add a silence.

    Raises:
        Refused: 409 if its end is not after ``now``.
    """
    silence = Silence(id=secrets.token_hex(6), created_at=now, **fields)
    if silence.ends_at <= now:
        raise Refused(409, "Silence has ended", f"ends_at {silence.ends_at:.0f} is not after now ({now:.0f})")
    connection.execute(sa.insert(schema.silences).values(msgspec.structs.asdict(silence)))
    return silence


def end(connection: sa.Connection, silence_id: str, now: float) -> None:
    """End a silence at ``now``.

    Raises:
        Refused: 404 if no active silence has this id.
    """
    table = schema.silences
    statement = sa.update(table).where(table.c.id == silence_id, table.c.ends_at > now).values(ends_at=now)
    if connection.execute(statement).rowcount == 0:
        raise Refused(404, "Unknown silence", f"no silence {silence_id!r} holds now: GET /api/v1/silences lists them")


def mute_reason(
    silences: Sequence[Silence],
    firing: Sequence[str],
    project: str,
    run: str,
    rule: str,
    acknowledged_by: str | None = None,
) -> str | None:
    """Return why an alert is muted, None if it is not; ``firing``: the rules that fire for the run."""
    if acknowledged_by is not None:
        return f"acknowledged by {acknowledged_by}"
    for inhibiting in INHIBITED_BY.get(rule, ()):
        if inhibiting in firing:
            return f"inhibited by {inhibiting}"
    for silence in silences:
        if silence.matches(project, run, rule):
            return f"silence {silence.id} by {silence.author}"
    return None
