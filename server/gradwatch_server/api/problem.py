"""Refusals as problem+json."""

import re
import sqlite3
from http import HTTPStatus
from typing import Any

import msgspec
import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gradwatch_server.api.documents import Problem
from gradwatch_server.errors import Refused

PROBLEM_TYPE = "application/problem+json"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of these refusals."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def answer(status: int, title: str, detail: str, retry_after_seconds: int | None = None) -> Response:
    """Return a problem document."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
    return Response(msgspec.json.encode(body), status, headers, PROBLEM_TYPE)


def refuse(error: Refused) -> Response:
    """Return the problem document of a refusal; it never asks for ``Basic``: a browser would open a window for that."""
    made = answer(error.status, error.title, error.detail, error.retry_after_seconds)
    if error.status == 401:
        made.headers["WWW-Authenticate"] = 'Bearer realm="gradwatch"'
    if error.status == 408:
        made.headers["Connection"] = "close"  # the rest of the body would be taken for a request
    return made


def out_of_reach(error: sa.exc.OperationalError | sa.exc.TimeoutError) -> Response:
    """Return the problem document of a database that does not answer, is full, or has no connection left."""
    if not isinstance(error, sa.exc.OperationalError):
        return answer(503, "Database busy", f"nothing was stored: {error}"[:500], retry_after_seconds=5)
    if _is_full(error):
        detail = f"nothing was stored: {error.orig}; make room on the database's disk, then send it again"
        return answer(507, "Disk full", detail[:500], retry_after_seconds=30)
    return answer(503, "Database out of reach", f"nothing was stored: {error.orig}"[:500], retry_after_seconds=5)


def _is_full(error: sa.exc.OperationalError) -> bool:
    """Return whether the database has no more room: SQLITE_FULL, or PostgreSQL's disk_full."""
    full = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return full or getattr(error.orig, "sqlstate", None) == "53100"


def _methods_of(app: FastAPI, path: str) -> list[str]:
    """Return the methods that a path of the API takes, whichever routes they are on."""
    for template, operations in app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            return sorted(method.upper() for method in operations)
    return []


def install(app: FastAPI) -> None:
    """Make every refusal of the app a problem document."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return answer(422, "Invalid request", faults)

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return answer(400, "Body cut off", "the client hung up before it had sent the body")  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        made = answer(error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail))
        made.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _methods_of(app, request.url.path)):
            made.headers["Allow"] = ", ".join(methods)
        return made

    @app.exception_handler(sa.exc.OperationalError)
    @app.exception_handler(sa.exc.TimeoutError)
    async def unreached(_request: Request, error: sa.exc.OperationalError | sa.exc.TimeoutError) -> Response:
        return out_of_reach(error)

    @app.exception_handler(sa.exc.DataError)
    async def unkept(_request: Request, error: sa.exc.DataError) -> Response:
        return answer(422, "Invalid value", f"the database cannot hold this: {error.orig}"[:500])

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> Response:
        return answer(500, "Internal error", f"{type(error).__name__}: the server's log says more")
