"""The types that the page is checked against (``make page``) are those of the server's OpenAPI document."""

import copy
import subprocess
from pathlib import Path

from tests.page.api_types import PAGE, TYPES, generate
from tests.processes import ROOT, GradwatchServer

TSC = ROOT / "node_modules" / ".bin" / "tsc"


def test_the_types_are_those_of_the_server(server: GradwatchServer) -> None:
    assert TYPES.read_text() == generate(server.get("/openapi.json")), "run: python -m tests.page.api_types"


def test_a_change_of_the_interface_changes_the_types_and_one_of_its_texts_does_not(server: GradwatchServer) -> None:
    document = server.get("/openapi.json")
    written = generate(document)
    document["paths"]["/api/v1/runs"]["get"]["description"] = "Other words."
    document["paths"]["/api/v1/runs"]["post"]["responses"]["299"] = {"description": "for agents"}
    assert generate(document) == written

    changed = copy.deepcopy(document)
    changed["components"]["schemas"]["Run"]["properties"]["title"] = {"type": "string"}
    assert generate(changed) != written
    changed = copy.deepcopy(document)
    changed["paths"]["/api/v1/alerts"]["get"]["parameters"].pop()
    assert generate(changed) != written


def test_a_module_that_asks_for_something_else_does_not_pass_the_check(tmp_path: Path) -> None:
    """A field, a parameter and a statistic that the server does not have, and a document without what it needs."""
    misuse = tmp_path / "misuse.js"
    misuse.write_text(
        f'import * as api from "{PAGE / "js" / "data" / "api.js"}";\n'
        "(await api.run('1')).no_such_field;\n"
        "api.series('1', { statistic: 'loss', no_such_parameter: 1 });\n"
        "api.tile('1', { statistic: 'no_such_statistic' });\n"
        "api.addSilence({ author: 'Ada' });\n"
    )
    options = ["--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "ES2023", "--module", "ES2022"]
    found = subprocess.run([str(TSC), *options, str(misuse)], capture_output=True, text=True).stdout
    faults = [line for line in found.splitlines() if "misuse.js" in line]
    assert [int(line.partition("(")[2].partition(",")[0]) for line in faults] == [2, 3, 4, 5], found
