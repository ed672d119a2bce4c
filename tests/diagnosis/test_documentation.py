"""docs/diagnosis.md names every rule and every key, with the default that the code has."""

import re
from pathlib import Path

import msgspec
import pytest

from gradwatch_server.diagnosis import Thresholds
from gradwatch_server.diagnosis.thresholds import Rule

TEXT = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text()
OWN = [
    (rule.name, field.name, field.default)
    for rule in msgspec.structs.fields(Thresholds)
    for field in msgspec.structs.fields(rule.type)
    if field.name not in {common.name for common in msgspec.structs.fields(Rule)}
]


def section(rule: str) -> str:
    """Return what the document says of a rule."""
    found = re.search(rf"^### {rule}\b.*?(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, rule
    return found.group()


@pytest.mark.parametrize(("rule", "key", "default"), OWN)
def test_every_key_is_documented_with_its_default(rule: str, key: str, default: float) -> None:
    text = section(rule)
    assert f"`{key}`" in text
    spelled = {f"{default}", f"{default:g}", f"{default:,}"}
    assert any(re.search(rf"(?<![\d.]){re.escape(form)}(?![\d.]*\d)", text) for form in spelled)


def test_a_missing_key_would_be_found() -> None:
    assert "`no_such_key`" not in section("dead")
