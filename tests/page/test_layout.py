"""The folders of the page's modules: arrows between them point one way, and every module is used."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.page.api_types import PAGE

LAYERS = ({""}, {"pages"}, {"controls"}, {"charts/map"}, {"charts"}, {"data", "dom"}, {"data/generated", "data/stream"})
"""From top to bottom; a folder imports from itself and from the layers below it."""
MOST_AT_THE_ROOT, MOST_IN_A_FOLDER = 9, 12
ANY_NUMBER = {"pages"}
"""One file a page."""
ENTRY, GLOBALS = "main.js", {"uplot"}
_IMPORT = re.compile(r'\b(?:from\s+|import\s+|import\(|SharedWorker\(new URL\()"([^"]+)"')
"""Static and dynamic imports, workers, exports from elsewhere, and types that a comment imports."""


def modules(js: Path) -> dict[str, list[str]]:
    """Return the imports of every module, by its path within ``js``; a type's file stands for its module."""
    found = sorted([*js.rglob("*.js"), *js.rglob("*.d.ts")])
    return {_name(file, js): _IMPORT.findall(file.read_text()) for file in found}


def _name(file: Path, js: Path) -> str:
    return file.relative_to(js).as_posix().replace(".d.ts", ".js")


def faults(js: Path) -> list[str]:
    """Return what is wrong with the layout of a folder of modules."""
    listed = modules(js)
    return [*_wrong_imports(listed), *_unused(listed), *_crowded(listed)]


def _wrong_imports(listed: dict[str, list[str]]) -> Iterator[str]:
    for name, imports in listed.items():
        for given in imports:
            target = _target(name, given)
            if given in GLOBALS:
                continue
            if target not in listed:
                yield f"{name} imports {given}, which is not there"
            elif not _allowed(_folder(name), _folder(target)):
                yield f"{name} must not import {target}"


def _allowed(folder: str, target: str) -> bool:
    if folder == target:
        return folder != "pages"  # what two pages share is a control
    layer = {name: index for index, names in enumerate(LAYERS) for name in names}
    return layer.get(folder, -1) < layer.get(target, -1)


def _unused(listed: dict[str, list[str]]) -> Iterator[str]:
    reached, waiting = {ENTRY}, [ENTRY]
    while waiting:
        name = waiting.pop()
        for given in listed.get(name, []):
            target = _target(name, given)
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    yield from (f"{name} is imported by no module" for name in listed if name not in reached)


def _crowded(listed: dict[str, list[str]]) -> Iterator[str]:
    for folder in {_folder(name) for name in listed}:
        count = sum(_folder(name) == folder for name in listed)
        most = MOST_IN_A_FOLDER if folder else MOST_AT_THE_ROOT
        if count > most and folder not in ANY_NUMBER:
            yield f"{folder or 'the root'} holds {count} modules, more than {most}"


def _target(name: str, given: str) -> str:
    """Return the path of a module that another one imports by a relative path."""
    return posixpath.normpath(posixpath.join(_folder(name), given))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def test_arrows_between_the_pages_folders_point_one_way() -> None:
    assert faults(PAGE / "js") == []


SOUND = {
    "main.js": 'import { ROUTES } from "./routes.js";',
    "routes.js": 'export const ROUTES = [import("./pages/runs.js")];',
    "pages/runs.js": 'import { line } from "../charts/line.js";\nimport "../dom/elements.js";',
    "charts/line.js": 'import {\n  get,\n} from "../data/api.js";\n/** @typedef {import("uplot")} Plot */',
    "data/api.js": '/** @typedef {import("./openapi.js").paths} Paths */',
    "data/openapi.d.ts": "export interface paths {}",
    "dom/elements.js": "",
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"data/api.js": 'import { line } from "../charts/line.js";'}, "data/api.js must not import charts/line.js"),
        ({"data/api.js": '/** @type {import("../main.js").App} */'}, "data/api.js must not import main.js"),
        ({"data/api.js": 'export * from "../dom/elements.js";'}, "data/api.js must not import dom/elements.js"),
        ({"charts/line.js": 'await import("../pages/runs.js");'}, "charts/line.js must not import pages/runs.js"),
        (
            {"pages/run.js": 'import "./runs.js";', "routes.js": 'import("./pages/run.js"), import("./pages/runs.js")'},
            "pages/run.js must not import pages/runs.js",
        ),
        ({"pages/run.js": ""}, "pages/run.js is imported by no module"),
        (
            {"dom/elements.js": 'new SharedWorker(new URL("./gone.js", import.meta.url));'},
            "dom/elements.js imports ./gone.js, which is not there",
        ),
        ({"dom/elements.js": 'import "./gone.js";'}, "dom/elements.js imports ./gone.js, which is not there"),
        (
            {"main.js": 'import "./routes.js"; import "./other/x.js";', "other/x.js": ""},
            "main.js must not import other/x.js",
        ),
        (
            {
                "dom/elements.js": "\n".join(f'import "./e{index}.js";' for index in range(12)),
                **{f"dom/e{index}.js": "" for index in range(12)},
            },
            "dom holds 13 modules, more than 12",
        ),
    ],
)
def test_a_wrong_layout_is_found(tmp_path: Path, changes: dict[str, str], fault: str | None) -> None:
    """The twin: each of these small sites has one fault, and the first has none."""
    for name, text in (SOUND | changes).items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    found = faults(tmp_path)
    assert fault in found if fault else found == []
