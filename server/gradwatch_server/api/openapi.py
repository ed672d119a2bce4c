"""The OpenAPI document, completed: what agents send with its bounds, who may call, what any operation can answer."""

from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI

from gradwatch import wire
from gradwatch_server.api.documents import Problem
from gradwatch_server.api.problem import problems
from gradwatch_server.ingest.validation import MOST_ENTRIES
from gradwatch_server.settings import Limits

_SCHEMES = {
    "token": {"type": "http", "scheme": "bearer"},
    "password": {"type": "http", "scheme": "basic", "description": "any user name, the token as the password"},
}


def complete(app: FastAPI) -> None:
    """Add to the app's description what FastAPI cannot know."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made())
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(described: dict[str, Any]) -> None:
    _, components = msgspec.json.schema_components(
        [wire.Registration, wire.Batch], schema_hook=_vector_schema, ref_template="#/components/schemas/{name}"
    )
    _add_limits(components, Limits())
    schemas = described["components"]["schemas"]
    described["components"] |= {"schemas": components | schemas, "securitySchemes": _SCHEMES}
    described["security"] = [{name: []} for name in _SCHEMES] + [{}]
    for path, operations in described["paths"].items():
        for operation in operations.values():
            answers = [401, 403, 421] if path.startswith(("/api/", "/metrics")) else []
            answers += [400] if "requestBody" in operation else []
            if operation["responses"].pop("422", None) is not None:  # FastAPI's own document is never sent
                answers.append(422)
            for status, answer in problems(*answers).items():
                problem = {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}
                content = dict.fromkeys(answer["content"], problem)
                operation["responses"].setdefault(
                    str(status), {"description": answer["description"], "content": content}
                )


def _add_limits(components: dict[str, Any], limits: Limits) -> None:
    """Add the bounds that are settings to those of the wire's types."""
    for (document, field), limit in MOST_ENTRIES.items():
        schema = components[document.__name__]["properties"][field]
        schema["maxItems" if schema["type"] == "array" else "maxProperties"] = getattr(limits, limit)
    attributes = components[wire.Registration.__name__]["properties"]["attributes"]
    attributes["additionalProperties"]["maxLength"] = limits.attribute_characters


def _vector_schema(_kind: type) -> dict[str, Any]:
    measured = {"type": "number", "format": "float", "minimum": 0, "maximum": float(np.finfo(np.float32).max)}
    element = {"anyOf": [measured, {"const": int(wire.MISSING)}, {"type": "null"}, {"enum": ["NaN", "Infinity"]}]}
    return {"type": "array", "items": element, "description": "one value for each parameter; null: missing"}
