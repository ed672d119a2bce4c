"""Arrows between the folders of a package or of the page: which imports which, and whether all point one way.

A folder here is the first part of a module's path below the root: ``store/rollups/levels.py`` belongs to ``store``; a
module in the root is a folder of its own.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

Layers = Sequence[Sequence[str]]
"""Folders from top to bottom. A folder imports only from layers below its own; those of one layer know nothing of each
other.
"""

_SCRIPT_IMPORT = re.compile(r"""(?:\bfrom|\bimport)\s*\(?\s*["'](\.{1,2}/[^"']+)["']""")


class Arrow(NamedTuple):
    """One module imports another; both paths are relative to the root."""

    source: Path
    target: Path


def python_arrows(root: Path) -> set[Arrow]:
    """Return the imports between the modules of a Python package, those within functions too."""
    arrows = set()
    for path in root.rglob("*.py"):
        for name in _imported(ast.parse(path.read_text())):
            target = _module(root, name)
            if target is not None:
                arrows.add(Arrow(path.relative_to(root), target))
    return arrows


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a module imports: for ``from a import b`` this is ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno} imports relatively: write the package's name")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module(root: Path, name: str) -> Path | None:
    """Return the file of the innermost module that a dotted name passes through, None outside the package."""
    package, *parts = name.split(".")
    if package != root.name:
        return None
    for count in range(len(parts), -1, -1):
        path = Path(*parts[:count])
        for file in (path.with_suffix(".py") if parts[:count] else path / "__init__.py", path / "__init__.py"):
            if (root / file).is_file():
                return file
    raise ValueError(f"{name} is no module of {root}")


def script_arrows(root: Path) -> set[Arrow]:
    """Return the imports between the JavaScript modules below a folder."""
    return {
        Arrow(path.relative_to(root), (path.parent / name).resolve().relative_to(root.resolve()))
        for path in root.rglob("*.js")
        for name in _SCRIPT_IMPORT.findall(path.read_text())
    }


def upward(arrows: set[Arrow], layers: Layers) -> list[str]:
    """Return the arrows between folders that do not point downwards, as ``source -> target``, sorted.

    Raises:
        KeyError: a folder is in no layer.
    """
    depth = {folder: place for place, folders in enumerate(layers) for folder in folders}
    return sorted(
        f"{source} -> {target}"
        for source, target in arrows
        if _folder(source) != _folder(target) and depth[_folder(target)] <= depth[_folder(source)]
    )


def _folder(module: Path) -> str:
    return module.parts[0] if len(module.parts) > 1 else module.stem


def crowded(root: Path, suffix: str, *, most_in_root: int, most: int, exempt: Sequence[str]) -> dict[str, int]:
    """Return how many modules each folder has that has too many, by its path; folders with an exempt name are not."""
    counts = Counter(path.parent.relative_to(root) for path in root.rglob(f"*{suffix}"))
    return {
        str(folder): count
        for folder, count in counts.items()
        if folder.name not in exempt and count > (most if folder.parts else most_in_root)
    }
