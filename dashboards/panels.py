"""The kinds of panels that the dashboards consist of, with one look and one colour scale."""

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import barchart, common, dashboard, prometheus, stat, table, timeseries, trend
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

PROMETHEUS = common_models.DataSourceRef(type_val="prometheus", uid="gradwatch-prometheus")
POSTGRES = common_models.DataSourceRef(type_val="grafana-postgresql-datasource", uid="gradwatch-postgres")

Panel = Builder[models.Panel]
Steps = Sequence[tuple[float | None, str]]
NEUTRAL: Steps = ((None, "blue"),)
NONE_IS_GOOD: Steps = ((None, "green"), (1, "red"))
RATIO: Steps = ((None, "dark-blue"), (1e-6, "blue"), (1e-4, "green"), (1e-1, "orange"), (1, "red"))
"""The one colour scale of gradient to weight ratios: too small, usual, too large."""


class Sql(Builder[Dataquery], Dataquery):
    """A query of PostgreSQL. The SDK has no type for it."""

    def __init__(self, statement: str, ref_id: str = "A", form: str = "table") -> None:
        self._statement, self._ref_id, self._form = statement, ref_id, form

    def build(self) -> Dataquery:
        """Return the query, which is its own builder."""
        return self

    def to_json(self) -> dict[str, object]:
        """Return the query as Grafana stores it."""
        return {
            "refId": self._ref_id,
            "datasource": POSTGRES,
            "editorMode": "code",
            "rawQuery": True,
            "format": self._form,
            "rawSql": self._statement,
        }


def prom(expression: str, legend: str = "", ref_id: str = "A", *, instant: bool = False) -> prometheus.Dataquery:
    """Return a PromQL query."""
    query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(ref_id).datasource(PROMETHEUS)
    return query.instant() if instant else query.range()


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    """Return the absolute thresholds of a panel with their colours."""
    listed = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(listed)


def by_threshold() -> dashboard.FieldColor:
    """Return the setting that colours values by the thresholds."""
    return dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS)


def number(title: str, description: str, unit: str, query: Any, steps: Steps = NEUTRAL) -> stat.Panel:
    """Return a panel with one large number."""
    panel = stat.Panel().title(title).description(description).unit(unit).with_target(query)
    panel = panel.thresholds(thresholds(steps)).color_scheme(by_threshold()).no_value("0")
    return panel.height(4).span(4)


def lines(
    title: str, description: str, unit: str, *queries: Any, logarithmic: bool = False, steps: Steps = NEUTRAL
) -> timeseries.Panel:
    """Return a panel with lines over time."""
    panel = timeseries.Panel().title(title).description(description).unit(unit).thresholds(thresholds(steps))
    panel = panel.scale_distribution(_scale(logarithmic=logarithmic)).legend(_legend()).height(8).span(12)
    for query in queries:
        panel = panel.with_target(query)
    return panel


def over_steps(title: str, description: str, unit: str, query: Any, *, logarithmic: bool = False) -> trend.Panel:
    """Return a panel with lines over steps; the first column of the query is the step."""
    panel = trend.Panel().title(title).description(description).unit(unit).x_field("step").with_target(query)
    panel = panel.thresholds(thresholds(NEUTRAL)).scale_distribution(_scale(logarithmic=logarithmic))
    return panel.legend(_legend()).height(8).span(12)


def listing(title: str, description: str, unit: str, query: Any, steps: Steps = NEUTRAL) -> table.Panel:
    """Return a table over the whole width."""
    panel = table.Panel().title(title).description(description).unit(unit).with_target(query)
    panel = panel.cell_options(common_models.TableAutoCellOptions()).thresholds(thresholds(steps))
    return panel.no_value("nothing").height(9).span(24)


def bars(title: str, description: str, unit: str, query: Any, steps: Steps = NEUTRAL) -> barchart.Panel:
    """Return a panel with a bar for each row, on a logarithmic scale; the first column of the query names the bar."""
    panel = barchart.Panel().title(title).description(description).unit(unit).with_target(query)
    panel = panel.orientation(common_models.VizOrientation.HORIZONTAL).color_scheme(by_threshold())
    return panel.thresholds(thresholds(steps)).scale_distribution(_scale(logarithmic=True)).height(14).span(12)


def matrix(title: str, description: str, unit: str, query: Any, fields: tuple[str, str, str], steps: Steps) -> Any:
    """Return a coloured map; ``fields`` are the columns of the query for its rows, its columns and its values."""
    row, column, value = fields
    turned = models.DataTransformerConfig(
        id_val="groupingToMatrix",
        options={"rowField": row, "columnField": column, "valueField": value, "emptyValue": "null"},
    )
    cell = common_models.TableColoredBackgroundCellOptions(mode=common_models.TableCellBackgroundDisplayMode.BASIC)
    panel = listing(title, description, unit, query, steps).cell_options(cell).color_scheme(by_threshold())
    return panel.with_transformation(turned).min_width(30).height(14).span(24)


def _scale(*, logarithmic: bool) -> common.ScaleDistributionConfig:
    if not logarithmic:
        return common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LINEAR)
    return common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)


def _legend() -> common.VizLegendOptions:
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).show_legend(True)
    return legend.placement(common_models.LegendPlacement.BOTTOM).calcs(["lastNotNull"])
