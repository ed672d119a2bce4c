"""Writes the TypeScript types of the HTTP interface, against which the page is checked.

``python -m tests.page.api_types`` makes them from the server's OpenAPI document. Descriptions and error responses are
left out, so that the types change only when the interface does.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.processes import ROOT, GradwatchServer

PAGE = ROOT / "server" / "gradwatch_server" / "page"
TYPES = PAGE / "js" / "data" / "generated" / "openapi.d.ts"
_GENERATOR = ROOT / "node_modules" / ".bin" / "openapi-typescript"
_HEADER = "// Generated from the server's OpenAPI document: python -m tests.page.api_types\n"
_TEXTS = {"title", "description", "summary", "operationId"}
_NAMES = {"properties", "schemas", "paths"}
"""Keys whose values map names to schemas: a property may be called ``title``."""
_REFERENCE = "#/components/schemas/"

Document = dict[str, Any]


def generate(document: Document) -> str:
    """Return the TypeScript types of an OpenAPI document."""
    reduced = json.dumps(_reduce(document))
    command = [str(_GENERATOR), "--alphabetize"]
    return _HEADER + subprocess.run(command, input=reduced, capture_output=True, text=True, check=True).stdout


def _reduce(document: Document) -> Document:
    """Return the part of an OpenAPI document that the page may use: not for agents, successful responses only."""
    paths = {path: _operations(item) for path, item in document["paths"].items() if path.startswith("/api/")}
    reduced: Document = _without_texts({"paths": {path: found for path, found in paths.items() if found}})
    schemas: Document = _without_texts({"schemas": document["components"]["schemas"]})["schemas"]
    used = _used(reduced, schemas)
    info = {"title": document["info"]["title"], "version": "1"}
    components = {"schemas": {name: schema for name, schema in schemas.items() if name in used}}
    return {"openapi": document["openapi"], "info": info, **reduced, "components": components}


def _operations(item: Document) -> Document:
    """Return the operations of a path that are not for agents, each with its 2xx responses."""
    return {
        method: operation
        | {"responses": {status: answer for status, answer in operation["responses"].items() if status[0] == "2"}}
        for method, operation in item.items()
        if "ingest" not in operation["tags"]
    }


def _without_texts(node: Any, names: bool = False) -> Any:
    """Return a part of a document without its texts for people; with ``names``, its keys are names to keep."""
    if isinstance(node, list):
        return [_without_texts(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_texts(value, names=not names and key in _NAMES)
        for key, value in node.items()
        if names or key not in _TEXTS
    }


def _used(node: Any, schemas: Document) -> set[str]:
    """Return the names of the schemas that a part of a document refers to, directly or through another schema."""
    found: set[str] = set()
    nodes = [node]
    while nodes:
        part = nodes.pop()
        if isinstance(part, list):
            nodes += part
        elif isinstance(part, dict):
            nodes += part.values()
            name = str(part.get("$ref", "")).removeprefix(_REFERENCE)
            if name in schemas and name not in found:
                found.add(name)
                nodes.append(schemas[name])
    return found


def main() -> None:
    """Start a server, read its OpenAPI document and write the types."""
    with tempfile.TemporaryDirectory() as folder, GradwatchServer(Path(folder) / "gradwatch.db") as server:
        TYPES.write_text(generate(server.get("/openapi.json")))


if __name__ == "__main__":
    main()
