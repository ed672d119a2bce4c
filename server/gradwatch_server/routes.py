"""Which receivers are told of an alert."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sends the alerts that match all three lists to some receivers; patterns may have ``*`` and ``?``."""

    receivers: list[str]
    """Names of receivers."""
    projects: Sequence[str] = ("*",)
    """Patterns of projects."""
    rules: Sequence[str] = ("*",)
    """Patterns of rules."""
    severities: Sequence[str] = ("*",)
    """Patterns of severities: ``warning``, ``critical``."""

    def takes(self, project: str, rule: str, severity: str) -> bool:
        """Return whether an alert goes this way."""
        asked = ((project, self.projects), (rule, self.rules), (severity, self.severities))
        return all(any(fnmatchcase(value, pattern) for pattern in patterns) for value, patterns in asked)


def choose(routes: Sequence[Route], receivers: Sequence[str], project: str, rule: str, severity: str) -> list[str]:
    """Return the receivers of an alert, each once: those of every route that takes it; without routes, all."""
    if not routes:
        return list(receivers)
    named = {name for route in routes if route.takes(project, rule, severity) for name in route.receivers}
    return [name for name in receivers if name in named]
