"""The measures of the code: short functions, small modules, and names that people of the field would search for."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("agent", "server", "dashboards")

PRIVATE_WORDS = frozenset(
    [
        "taps",
        "tap",
        "marks",
        "others",
        "round",
        "rounds",
        "pace",
        "governor",
        "meter",
        "binding",
        "composer",
        "halves",
        "endings",
        "inspection",
        "trainings",
        "lane",
        "lanes",
        "shelf",
        "ledger",
        "memories",
        "examiner",
        "examination",
        "room",
        "fading",
        "untold",
        "told",
        "untell",
        "letter",
        "spell",
        "spelled",
    ]
)
"""Words that nobody would search for; what they once stood for has the field's names now."""
PRIVATE_MODULES = PRIVATE_WORDS | frozenset(
    [
        "held",
        "pending",
        "report",
        "mirrors",
        "search",
        "provenance",
        "automatic",
        "losses",
        "book",
        "share",
        "stalls",
        "clock",
        "feed",
        "answer",
        "post",
        "bounds",
        "reading",
        "memory",
    ]
)
"""Words that are fine within a name, and say nothing as the name of a module."""
PRIVATE_CLASSES = PRIVATE_MODULES | frozenset(["watched"])


class Name(NamedTuple):
    """A module, a class or a public function."""

    kind: str
    name: str
    path: str

    @property
    def words(self) -> list[str]:
        return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", self.name)]

    @property
    def is_private_language(self) -> bool:
        if PRIVATE_WORDS.intersection(self.words):
            return True
        whole = self.name.lower()
        return (self.kind == "module" and whole in PRIVATE_MODULES) or (
            self.kind == "class" and whole.strip("_") in PRIVATE_CLASSES
        )


def _modules() -> Iterator[tuple[Path, str]]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "versions" not in path.parts:
                yield path, path.read_text(encoding="utf-8")


def _names(path: Path, text: str) -> Iterator[Name]:
    place = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    yield Name("module", path.stem, place)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            yield Name("class", node.name, place)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield Name("function", node.name, place)


def _lengths(text: str) -> list[int]:
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]


@pytest.mark.parametrize("folder", CODE)
def test_functions_are_short(folder: str) -> None:
    lengths = sorted(
        length for path, text in _modules() if path.is_relative_to(ROOT / folder) for length in _lengths(text)
    )
    assert len(lengths) > 20
    assert lengths[int(len(lengths) * 0.9)] <= 20
    assert lengths[-1] <= 60


def test_modules_are_small() -> None:
    assert [str(path) for path, text in _modules() if len(text.splitlines()) > 400] == []


def test_names_are_words_of_the_field() -> None:
    named = [name for path, text in _modules() for name in _names(path, text)]
    assert len(named) > 1000
    assert [name for name in named if name.is_private_language] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class Ledger: ...", "Ledger"),
        ("def untold_alerts(): ...", "untold_alerts"),
        ("class Reading: ...", "Reading"),
        ("class ReadingOrder: ...\ndef search(): ...\ndef _spell(): ...", None),
    ],
)
def test_a_name_of_the_private_language_is_found(text: str, found: str | None) -> None:
    names = [name.name for name in _names(Path("good.py"), text) if name.is_private_language]
    assert names == ([] if found is None else [found])


def test_a_long_function_is_measured() -> None:
    assert _lengths("def long():\n" + "    pass\n" * 70) == [71]
