"""Writes what derives from the list of rules: ``python -m tests.diagnosis.rule_documents``.

These are the section of docs/diagnosis.md on the rules, and the page's knowledge of where a rule's limit belongs on a
chart. A test fails while one of them is out of step with the rules.
"""

import ast
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import msgspec

from gradwatch_server.diagnosis import RULES, SAMPLE_RULES
from gradwatch_server.diagnosis.rule import Limits, Rule

Rules = Sequence[Rule[Any, Any]]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diagnosis.md"
CHART_LIMITS = ROOT / "server" / "gradwatch_server" / "page" / "js" / "data" / "generated" / "chart-limits.js"

_COMMAND = "python -m tests.diagnosis.rule_documents"
_BEGIN, _END = f"<!-- Generated: {_COMMAND} -->\n", "<!-- End of what is generated -->\n"
_SCRIPT_HEADER = f"""\
// On which chart the limit of a rule is drawn. Generated from the rules: {_COMMAND}

/**
 * Rule -> the statistics that it may have judged; the evidence of an alert tells which of them it was. Where of_rms is
 * true, the limit is of a root mean square: the norm's limit is that times the root of the number of elements.
 * @type {{Record<string, {{evidence: string, statistic: string, of_rms: boolean}}[]>}}
 */
export const CHART_LIMITS = """


def describe(rules: Rules) -> str:
    """Return the part of docs/diagnosis.md on the rules."""
    common = "### All rules\n\nEvery rule has these keys, some with another default.\n\n" + _table(Limits)
    return "\n".join([common, *map(_describe_rule, rules)])


def replace_description(page: str, rules: Rules) -> str:
    """Return the page with a new part on the rules."""
    before, after = page.partition(_BEGIN)[0], page.partition(_END)[2]
    return f"{before}{_BEGIN}\n{describe(rules)}\n{_END}{after}"


def chart_limits(rules: Rules) -> str:
    """Return the script that tells the page where the rules' limits belong."""
    limits = {rule.name: [limit._asdict() for limit in rule.chart_limits] for rule in rules if rule.chart_limits}
    return f"{_SCRIPT_HEADER}{json.dumps(limits, indent=2)};\n"


def documented_keys(limits: type[Limits]) -> dict[str, str]:
    """Return the docstring of each limit that the class itself documents."""
    (definition,) = ast.parse(dedent(inspect.getsource(limits))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = re.sub(r"\s+", " ", str(text.value.value))
    return texts


def _describe_rule(rule: Rule[Any, Any]) -> str:
    limits = rule.limits()
    sentences = [inspect.cleandoc(rule.limits.__doc__ or "")]
    if rule in SAMPLE_RULES:
        first = "at the first sample" if limits.hold_samples == 1 else f"after {limits.hold_samples} samples in a row"
        sentences.append(f"It fires {first} and resolves after {limits.clear_samples} samples without it.")
    sentences.append(f"It is {'a warning' if limits.highest_severity == 'warning' else 'critical at most'}.")
    if rule.inhibited_by:
        named = " or ".join(f"`{name}`" for name in rule.inhibited_by)
        sentences.append(f"Nobody is notified of it while {named} fires for the same run.")
    parts = [f"### {rule.name}\n\n{' '.join(sentences)}\n", _table(rule.limits), rule.notes]
    return "\n".join(part for part in parts if part)


def _table(limits: type[Limits]) -> str:
    """Return a Markdown table of the limits that the class documents; empty if there are none."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(limits)}
    rows = [f"| `{key}` | {_spelled(defaults[key])} | {text} |\n" for key, text in documented_keys(limits).items()]
    return "".join(["| key | default | meaning and reason |\n|---|---|---|\n", *rows]) if rows else ""


def _spelled(default: object) -> str:
    if isinstance(default, bool | str):
        return json.dumps(default)
    return f"{default:,}"


if __name__ == "__main__":
    PAGE.write_text(replace_description(PAGE.read_text(), RULES))
    CHART_LIMITS.write_text(chart_limits(RULES))
