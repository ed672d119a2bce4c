"""Routing: which receivers are notified of an alert."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from gradwatch_server.settings import Route


def choose(routes: Sequence[Route], receivers: Sequence[str], project: str, rule: str, severity: str) -> list[str]:
    """Return the receivers of an alert, each once: those of every route that matches it; without routes, all."""
    if not routes:
        return list(receivers)
    named = {name for route in routes if _matches(route, project, rule, severity) for name in route.receivers}
    return [name for name in receivers if name in named]


def _matches(route: Route, project: str, rule: str, severity: str) -> bool:
    asked = ((project, route.projects), (rule, route.rules), (severity, route.severities))
    return all(any(fnmatchcase(value, pattern) for pattern in patterns) for value, patterns in asked)
