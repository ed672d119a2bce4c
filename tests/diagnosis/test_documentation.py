"""docs/diagnosis.md and the page's chart limits derive from the rules, and every key of a rule is documented."""

from typing import Any

import msgspec
import pytest

from gradwatch_server.diagnosis import RULES, Observation
from gradwatch_server.diagnosis.rule import ChartLimit, Limits, Rule
from tests.diagnosis.rule_documents import CHART_LIMITS, PAGE, chart_limits, documented_keys, replace_description

TEXT = PAGE.read_text()


class UndocumentedLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits with a key that has no docstring."""

    hold_samples: int = 7
    documented: float = 0.5
    """A key with a docstring."""
    undocumented: float = 1.0


OTHER: Rule[Observation, Any] = Rule(
    name="other",
    subject=Observation,
    limits=UndocumentedLimits,
    find=lambda _observation, _limits: None,
    colour="text",
    chart_limits=(ChartLimit("size", "ratio"),),
)


def undocumented(limits: type[Limits]) -> set[str]:
    """Return the keys of a rule's own that have no documentation."""
    common = {field.name for field in msgspec.structs.fields(Limits)}
    return {field.name for field in msgspec.structs.fields(limits)} - common - set(documented_keys(limits))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_key_is_documented(rule: Rule[Any, Any]) -> None:
    assert undocumented(rule.limits) == set()


def test_a_key_without_documentation_is_found() -> None:
    assert undocumented(UndocumentedLimits) == {"undocumented"}


def test_the_page_is_in_step_with_the_rules() -> None:
    assert replace_description(TEXT, RULES) == TEXT, "run: python -m tests.diagnosis.rule_documents"
    assert chart_limits(RULES) == CHART_LIMITS.read_text(), "run: python -m tests.diagnosis.rule_documents"


def test_another_rule_would_be_missed() -> None:
    page = replace_description(TEXT, [*RULES, OTHER])
    assert "### other\n\nLimits with a key" in page
    assert "| `documented` | 0.5 | A key with a docstring. |" in page
    assert page != TEXT
    assert '"evidence": "size"' in chart_limits([OTHER])
