"""The OpenAPI document of the HTTP interface.

FastAPI makes it of the routes; this module adds the documents that agents send, with their bounds, and the refusals
that any route may respond with.
"""

from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from gradwatch import wire
from gradwatch_server.api.authorisation import SECURITY_SCHEMES, AuthorisedRoute, of_any_project, requires
from gradwatch_server.api.documents import Problem
from gradwatch_server.api.problem import problems
from gradwatch_server.ingest.validation import MOST_ENTRIES
from gradwatch_server.settings import Limits

router = APIRouter(route_class=AuthorisedRoute, include_in_schema=False)


@router.api_route("/openapi.json", methods=["GET", "HEAD"], dependencies=[requires("read", of_any_project)])
async def show_openapi(request: Request) -> Response:
    """Return the OpenAPI document."""
    return JSONResponse(request.app.openapi())


def install(app: FastAPI) -> None:
    """Add everything that FastAPI cannot know to the OpenAPI document of an app."""
    made_by_fastapi = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made_by_fastapi())
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(described: dict[str, Any]) -> None:
    schemas = _wire_schemas(Limits()) | {Problem.__name__: Problem.model_json_schema()}
    described["components"]["schemas"] |= schemas
    described["components"]["securitySchemes"] = SECURITY_SCHEMES
    for operations in described["paths"].values():
        for method, operation in operations.items():
            for status, response in problems(*_refusals(method, operation)).items():
                operation["responses"][str(status)] = response


def _refusals(method: str, operation: dict[str, Any]) -> list[int]:
    """Return the statuses with which an operation can be refused whatever its route does."""
    statuses = [403] if method != "get" else []  # another site's page asks
    statuses += [401, 403, 421] if operation["security"] else []
    statuses += [400] if "requestBody" in operation else []
    return statuses + ([422] if "requestBody" in operation or "parameters" in operation else [])


def _wire_schemas(limits: Limits) -> dict[str, Any]:
    """Return the schemas of the documents that agents send, with the bounds of types and of settings."""
    _, schemas = msgspec.json.schema_components(
        [wire.Registration, wire.Batch], schema_hook=_vector_schema, ref_template="#/components/schemas/{name}"
    )
    for (document, field), limit in MOST_ENTRIES.items():
        schema = schemas[document.__name__]["properties"][field]
        schema["maxItems" if schema["type"] == "array" else "maxProperties"] = getattr(limits, limit)
    attributes = schemas[wire.Registration.__name__]["properties"]["attributes"]
    attributes["additionalProperties"]["maxLength"] = limits.attribute_characters
    return schemas


def _vector_schema(_kind: type) -> dict[str, Any]:
    measured = {"type": "number", "format": "float", "minimum": 0, "maximum": float(np.finfo(np.float32).max)}
    missing = {"const": int(wire.MISSING)}
    element = {"anyOf": [measured, missing, {"type": "null"}, {"enum": ["NaN", "Infinity"]}]}
    return {"type": "array", "items": element, "description": "one value for each parameter; null: missing"}
