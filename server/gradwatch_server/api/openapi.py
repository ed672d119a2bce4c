"""The OpenAPI document, completed: what agents send with its bounds, who may call, what any operation can answer."""

from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI

from gradwatch import wire
from gradwatch_server.api.documents import Problem
from gradwatch_server.api.problem import problems
from gradwatch_server.settings import Limits

_WHOLE = {"minimum": 0, "maximum": 2**53}
_TIME = {"minimum": 0, "maximum": 1e11}
_TEXT = {"maxLength": Limits().name_characters, "pattern": "^[^\\u0000]*$"}
_NAMES = {"propertyNames": _TEXT, "maxProperties": Limits().scalar_names}
_VALUE = {"type": "string", "maxLength": Limits().attribute_characters, "pattern": _TEXT["pattern"]}
_EXIT_CODE = {"minimum": -(2**31), "maximum": 2**31 - 1}
_BOUNDS: dict[str, dict[str, dict[str, Any]]] = {
    "Registration": {
        "version": {"const": wire.VERSION},
        "id": {"pattern": "^[A-Za-z0-9][A-Za-z0-9_-]{2,63}$"},
        "project": {**_TEXT, "minLength": 1},
        "name": _TEXT,
        "started_at": _TIME,
        "attempt": _WHOLE,
        "attributes": {**_NAMES, "additionalProperties": _VALUE},
        "parameters": {"maxItems": Limits().parameters, "uniqueItems": True},
    },
    "Parameter": {
        "name": _TEXT,
        "shape": {"items": {"type": "integer", **_WHOLE}, "maxItems": 64},
        "dtype": _TEXT,
        "depth": {"minimum": 0, "maximum": 2**31 - 1},
        "units": _WHOLE,
        "kind": _TEXT,
    },
    "Batch": {
        "version": {"const": wire.VERSION},
        "id": {**_TEXT, "minLength": 1},
        "rank": {"minimum": 0, "maximum": 2**31 - 1},
        "attempt": _WHOLE,
        "samples": {"maxItems": Limits().samples_per_batch},
        "trail": _NAMES,
        "events": {"maxItems": Limits().events_per_batch},
    },
    "Sample": {
        "step": _WHOLE,
        "at": _TIME,
        "statistics": {"propertyNames": {"enum": list(wire.STATISTICS)}},
        "scalars": {**_NAMES, "maxProperties": Limits().scalar_names // 2},
        "histograms": {
            **_NAMES,
            "maxProperties": Limits().scalar_names // 2,
            "additionalProperties": {"type": "array", "items": {"type": "number"}, "maxItems": 1_000},
        },
    },
    "Trail": {"steps": {"items": {"type": "integer", **_WHOLE}}},
    "Event": {"step": _WHOLE, "at": _TIME, "kind": _TEXT, "message": {"pattern": _TEXT["pattern"]}, "parameter": _TEXT},
    "Dropped": {"samples": _WHOLE, "bytes": _WHOLE, "errors": _WHOLE},
    "End": {"at": _TIME, "status": _TEXT, "exit_code": _EXIT_CODE},
}
"""What ``ingest/validation.py`` checks, as far as a schema can say it, with the default limits."""
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
    for name, bounds in _BOUNDS.items():
        for field, bound in bounds.items():
            _bind(components[name]["properties"][field], bound)
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


def _bind(schema: dict[str, Any], bound: dict[str, Any]) -> None:
    """Add a bound to a field's schema, or to that of its value where the field may be null."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    (options[0] if options else schema).update(bound)


def _vector_schema(_kind: type) -> dict[str, Any]:
    measured = {"type": "number", "minimum": 0, "maximum": float(np.finfo(np.float32).max)}
    element = {"anyOf": [measured, {"const": -1}, {"type": "null"}, {"enum": ["NaN", "Infinity"]}]}
    return {"type": "array", "items": element, "description": "one value for each parameter; null: missing"}
