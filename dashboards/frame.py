"""Makes a dashboard of its panels and adds the parts that all have in common: links, variables, refresh."""

from collections.abc import Iterable
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import POSTGRES

TITLES = {
    "gradwatch-fleet": "gradwatch · Fleet",
    "gradwatch-run": "gradwatch · Run",
    "gradwatch-alerts": "gradwatch · Alerts and deliveries",
    "gradwatch-server": "gradwatch · Server",
}
RUN_LINK = "/d/gradwatch-run?${__url_time_range}&var-project=${__data.fields.project}&var-run=${__data.fields.run}"
_PROJECTS = "SELECT DISTINCT project FROM runs ORDER BY project"
_RUNS = (
    "SELECT name || ' (' || id || ')' AS __text, id AS __value FROM runs "
    "WHERE project IN (${project:sqlstring}) ORDER BY last_seen_at DESC LIMIT 500"
)


def frame(uid: str, description: str) -> dashboard.Dashboard:
    """Return a dashboard without panels, with links to the other dashboards."""
    board = dashboard.Dashboard(TITLES[uid]).uid(uid).description(description).tags(["gradwatch"])
    board = board.refresh("30s").time("now-1h", "now").timezone("browser").readonly()
    for other, title in TITLES.items():
        if other != uid:
            link = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).url(f"/d/{other}")
            board = board.link(link.keep_time(True).include_vars(True))
    return board


def fill(board: dashboard.Dashboard, panels: Iterable[Any]) -> dashboard.Dashboard:
    """Return the dashboard with these panels."""
    for panel in panels:
        board = board.with_panel(panel)
    return board


def project_variable() -> dashboard.QueryVariable:
    """Return the variable by which a reader chooses projects."""
    return _variable("project", "Project", _PROJECTS).multi(True).include_all(True)


def run_variable() -> dashboard.QueryVariable:
    """Return the variable by which a reader chooses a run of the chosen projects; the run seen last comes first."""
    return _variable("run", "Run", _RUNS)


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    variable = dashboard.QueryVariable(name).label(label).query(query).datasource(POSTGRES)
    return variable.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)


def link_to_run() -> dashboard.DashboardLink:
    """Return the link from a row of a table to the dashboard of its run."""
    return dashboard.DashboardLink("Open the run").type(models.DashboardLinkType.LINK).url(RUN_LINK)
