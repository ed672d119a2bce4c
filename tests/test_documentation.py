"""What the documentation names is there: paths, links, ``make`` targets, modules, commands, tests, variables."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

from gradwatch.cli import COMMANDS
from tests.processes import ROOT

DOCUMENTS: Final = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGES: Final = {"gradwatch": ROOT / "agent" / "gradwatch", "gradwatch_server": ROOT / "server" / "gradwatch_server"}
FOLDERS: Final = (ROOT, *PACKAGES.values(), PACKAGES["gradwatch_server"] / "page" / "js")
"""Where a path may begin."""
CODE_FOLDERS: Final = ("agent", "server", "dashboards", "benchmarks", "tests", "docs", "examples")
USERS_FILES: Final = {"train.py", "gradwatch.toml", "gradwatch.db", "gradwatch.dump", "gradwatch-demo/"}
"""Files that a user has, and no repository."""

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
_PATH = re.compile(
    r"(?<![\w/.:~+-])((?:[\w.-]+/)*[\w-]+\.(?:py|js|ts|sh|yml|md)|(?:{})/[\w/.-]+)\b".format("|".join(CODE_FOLDERS))
)
_FOLDER = re.compile(r"^(?:[\w.-]+/)+$")
_TARGET = re.compile(r"\bmake ((?:\w+=\S+ )*)([a-z][\w-]*)")
_MODULE_RUN = re.compile(r"\bpython -m ([\w.]+)")
_DOTTED = re.compile(r"(?<![\w/.])(gradwatch(?:_server)?(?:\.[A-Za-z_]\w*)+)")
_COMMAND = re.compile(r"^(?:\$ )?gradwatch ([a-z]+)\b", re.MULTILINE)
_TEST = re.compile(r"(?:([\w/]+\.py)::)?\b(test_\w+)\b(?!\.py)")
_VARIABLE = re.compile(r"\bGRADWATCH_[A-Z_]*[A-Z]\b")


def faults(document: Path, text: str) -> list[str]:
    """Return what a document names that is not there."""
    links = (link for link in _LINK.findall(text) if not (document.parent / link).exists())
    return [*(f"link {link}" for link in links), *(fault for code in _code(text) for fault in _faults_of_code(code))]


def _code(text: str) -> Iterator[str]:
    """Yield the pieces of code: what stands in backticks, and blocks of commands and of Python."""
    yield from (block for language, block in _FENCED.findall(text) if language in ("console", "sh", "python"))
    yield from _INLINE.findall(_FENCED.sub("", text))


def _faults_of_code(code: str) -> Iterator[str]:
    yield from (f"path {path}" for path in _paths(code) if not _exists(path))
    yield from (f"make target {name}" for _, name in _TARGET.findall(code) if name not in _targets())
    yield from (f"module {name}" for name in _MODULE_RUN.findall(code) if find_spec(name) is None)
    yield from (f"name {name}" for name in _DOTTED.findall(code) if name not in USERS_FILES and not _is_defined(name))
    yield from (f"command {name}" for name in _COMMAND.findall(code) if name not in COMMANDS)
    yield from (f"test {name}" for path, name in _TEST.findall(code) if name not in _tests_of(path))
    yield from (f"variable {name}" for name in _VARIABLE.findall(code) if not _is_read(name))


def _paths(code: str) -> list[str]:
    found = [code] if _FOLDER.match(code) else _PATH.findall(code)
    return [path for path in found if path not in USERS_FILES]


def _exists(path: str) -> bool:
    """Return whether a path exists below one of the folders, or a file of this name anywhere."""
    return any((folder / path).exists() for folder in FOLDERS) or ("/" not in path and bool(_named(path)))


@cache
def _named(name: str) -> list[Path]:
    return [file for folder in CODE_FOLDERS for file in (ROOT / folder).rglob(name)]


@cache
def _targets() -> set[str]:
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    return set(phony[1].replace("\\\n", " ").split())


def _is_defined(dotted: str) -> bool:
    """Return whether a dotted name is a module of one of the packages, or is defined at the top of one."""
    package, *parts = dotted.split(".")
    module = PACKAGES[package]
    for place, part in enumerate(parts):
        if (module / part).is_dir() or (module / f"{part}.py").is_file():
            module = module / part
            continue
        return place == len(parts) - 1 and part in _top_names(module)
    return True


def _top_names(module: Path) -> set[str]:
    source = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
    names: set[str] = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            listed = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in listed if isinstance(target, ast.Name)}
            names |= set(re.findall(r"'(\w+)'", ast.unparse(node))) if "__all__" in names else set()
    return names


@cache
def _tests_of(path: str) -> set[str]:
    """Return the tests of a module, or of all modules."""
    files = _named(Path(path or "test_*.py").name)
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}


def _is_read(variable: str) -> bool:
    """Return whether a variable is read; one that ends in ``_FILE`` names a file with the value of another."""
    return variable in _sources() or variable.removesuffix("_FILE") in _sources()


@cache
def _sources() -> str:
    files = [file for package in PACKAGES.values() for file in package.rglob("*.py")]
    return "\n".join(file.read_text() for file in [*files, ROOT / "docker-compose.yml"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_everything_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    assert sum(1 for _ in _code(text)) > 5
    assert faults(document, text) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("See [there](docs/gone.md).", "link docs/gone.md"),
        ("In `agent/gradwatch/steps/gone.py`.", "path agent/gradwatch/steps/gone.py"),
        ("In `steps/gone.py`.", "path steps/gone.py"),
        ("In `gone.py` there.", "path gone.py"),
        ("In `gone/`.", "path gone/"),
        ("Run `make chekc`.", "make target chekc"),
        ("```console\n$ make check\n$ make TESTS=tests/agent tset\n```\n", "make target tset"),
        ("Run `make check TESTS=tests/gone`.", "path tests/gone"),
        ("`python -m gradwatch.steps.gone FILE`", "module gradwatch.steps.gone"),
        ("`gradwatch.detach`", "name gradwatch.detach"),
        ("```python\nfrom gradwatch.integrations.keras import Callback\n```\n", "name gradwatch.integrations.keras"),
        ("```console\n$ gradwatch sevre\n```\n", "command sevre"),
        ("`tests/agent/test_steps.py::test_gone`", "test test_gone"),
        ("`GRADWATCH_GONE`", "variable GRADWATCH_GONE"),
    ],
)
def test_a_name_that_is_gone_is_found(text: str, fault: str) -> None:
    assert fault in faults(ROOT / "README.md", text)
