"""The table of statistics: what derives from it agrees with it, and its reductions agree with plain loops."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import wire
from gradwatch.statistics import (
    JOINED,
    LABELS,
    MEASURED,
    MISSING,
    STATISTICS,
    StatisticSpec,
    Units,
    agc_factors,
    measured_from,
)

ROOT = Path(__file__).parents[1]
AGENT_DOCUMENTATION = ROOT / "docs" / "agent.md"
PAGE = ROOT / "server" / "gradwatch_server" / "page" / "js"


def documented_rows(text: str) -> list[str]:
    """Return the rows of the table of statistics in the agent's documentation."""
    table = re.search(r"\| per parameter \| unit \| meaning \| cost \|\n\|---\|---\|---\|---\|\n((?:\|.*\n)+)", text)
    assert table is not None
    return table[1].splitlines()


def row_of(statistic: StatisticSpec) -> str:
    return f"| `{statistic.name}` | {statistic.unit} | {statistic.meaning} | {statistic.cost} |"


def test_the_documentation_lists_every_statistic_and_no_other() -> None:
    text = AGENT_DOCUMENTATION.read_text(encoding="utf-8")
    assert documented_rows(text) == [row_of(statistic) for statistic in STATISTICS.values()]


def test_this_test_of_the_documentation_can_fail() -> None:
    text = AGENT_DOCUMENTATION.read_text(encoding="utf-8").replace("| `update_norm` |", "| `update_rms` |")
    assert documented_rows(text) != [row_of(statistic) for statistic in STATISTICS.values()]


def test_the_wire_has_the_names_of_the_table() -> None:
    assert tuple(STATISTICS) == wire.STATISTICS
    sample = wire.Sample(step=1, at=0.0, statistics={"removed_norm": np.zeros(1, np.float32)})
    body = wire.encode(wire.Batch(id="b", samples=[sample]))
    with pytest.raises(wire.WireError, match="Invalid enum value 'removed_norm'"):
        wire.decode(body, wire.Batch)


def test_every_statistic_has_a_label_of_its_own() -> None:
    assert list(LABELS) == ["ratio", *STATISTICS]
    assert len(set(LABELS.values())) == len(LABELS)


def shown_labels(source: str) -> dict[str, str]:
    """Return the labels of statistics that the page's sources spell out, by name."""
    return {name: label for name in LABELS for label in re.findall(rf'\b{name}"?[:,] "([A-Z][^"]+)"', source)}


def page_source() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(PAGE.rglob("*.js")))


def test_the_page_shows_every_statistic_under_its_label() -> None:
    assert shown_labels(page_source()) == LABELS


def test_this_test_of_the_page_can_fail() -> None:
    assert shown_labels(page_source().replace("Update norm", "Update")) != LABELS
    assert shown_labels("") != LABELS


numbers = st.floats(1e-6, 1e6) | st.just(0.0)
parameters = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), min_size=1, max_size=4)


def units_of(drawn: list[list[tuple[float, float]]]) -> tuple[Units, list[int]]:
    """Return the unit norms of several parameters, one after the other, and where each parameter's begin."""
    flat = np.array([pair for units in drawn for pair in units])
    starts = np.cumsum([0, *(len(units) for units in drawn)])[:-1].tolist()
    return Units(gradient=flat[:, 0], weight=flat[:, 1], eps=1e-3), starts


@given(parameters)
def test_statistics_of_units_agree_with_loops(drawn: list[list[tuple[float, float]]]) -> None:
    units, starts = units_of(drawn)
    expected = {
        "grad_norm": [math.hypot(*(g for g, _ in several)) for several in drawn],
        "weight_norm": [math.hypot(*(w for _, w in several)) for several in drawn],
        "max_unit_ratio": [max(g / max(w, 1e-3) for g, w in several) for several in drawn],
        "zero_unit_share": [sum(g == 0 for g, _ in several) / len(several) for several in drawn],
        "nonfinite_count": [0.0] * len(drawn),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(MEASURED[name].measure(units, starts), values, rtol=1e-9, err_msg=name)


@given(parameters, st.floats(1e-3, 10.0), st.booleans())
def test_agc_leaves_no_unit_above_its_limit(
    drawn: list[list[tuple[float, float]]], limit: float, tensor_wise: bool
) -> None:
    units, starts = units_of(drawn)
    factors = agc_factors(units, starts, np.full(len(drawn), limit), tensor_wise=tensor_wise)
    for several, begin in zip(drawn, starts, strict=True):
        mine = slice(begin, begin + len(several))
        if tensor_wise:
            norm, most = np.linalg.norm(units.gradient[mine]), limit * (np.linalg.norm(units.weight[mine]) + 1e-3)
            expected = np.full(len(several), min(1.0, most / norm) if norm > 0 else 1.0)
        else:
            expected = np.array([min(1.0, limit * max(w, 1e-3) / g) if g > 0 else 1.0 for g, w in several])
        np.testing.assert_allclose(factors[mine], expected, rtol=1e-9)


@given(st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3), min_size=2, max_size=4))
def test_ranks_that_hold_whole_units_join_to_the_same_as_one_rank(ranks: list[list[tuple[float, float]]]) -> None:
    """One parameter, whose units are spread over the ranks."""
    whole, _ = units_of([[pair for mine in ranks for pair in mine]])
    for statistic in JOINED:
        if statistic.source not in ("gradient", "weight"):
            continue
        counts = np.array([[float(len(mine))] for mine in ranks])
        values = [statistic.measure(units_of([mine])[0], [0]) for mine in ranks]
        parts = [statistic.reduction.to_part(value, count) for value, count in zip(values, counts, strict=True)]
        joined = statistic.reduction.from_parts(statistic.reduction.join.reduce(parts), counts.sum(axis=0))
        np.testing.assert_allclose(joined, statistic.measure(whole, [0]), rtol=1e-9, err_msg=statistic.name)


def test_without_parameters_there_are_no_values() -> None:
    assert all(statistic.measure(Units(), []).shape == (0,) for statistic in measured_from("gradient", "agc", "update"))


def test_a_rank_without_a_gradient_adds_nothing() -> None:
    for statistic in JOINED:
        joined = statistic.reduction.join.reduce([np.array([0.5]), np.array([statistic.reduction.absent])])
        assert joined == 0.5
    assert MISSING < 0 <= min(statistic.reduction.absent for statistic in JOINED if statistic.name != "max_unit_ratio")
