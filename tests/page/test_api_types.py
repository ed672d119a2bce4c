"""The types that the page is checked against (``make page``) are those of the server's OpenAPI document."""

import copy

from tests.page.api_types import TYPES, generate
from tests.processes import GradwatchServer


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
