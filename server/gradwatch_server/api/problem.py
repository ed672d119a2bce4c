"""Problem documents (RFC 9457): the response to every request that is refused or fails."""

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
from gradwatch_server.errors import Refused, RetryAfter

PROBLEM_TYPE = "application/problem+json"
DATABASE_SILENT = "the database does not respond: the server's log says more"
_MOST_CHARACTERS = 500
"""Of a database's message in a problem document."""


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the responses of an OpenAPI operation that are problem documents, by their status."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem_response(status: int, title: str, detail: str, retry_after: RetryAfter | None = None) -> Response:
    """Return the response with a problem document."""
    headers = {} if retry_after is None else {"Retry-After": str(int(retry_after))}
    return Response(msgspec.json.encode(problem_document(status, title, detail)), status, headers, PROBLEM_TYPE)


def problem_document(status: int, title: str, detail: str) -> dict[str, Any]:
    """Return a problem document."""
    return {"type": "about:blank", "title": title, "status": status, "detail": detail}


def refusal_response(refusal: Refused) -> Response:
    """Return the problem document of a refusal.

    A 401 does not offer the scheme ``Basic``: a browser would open a window for a password.
    """
    response = problem_response(refusal.status, refusal.title, refusal.detail, refusal.retry_after)
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="gradwatch"'
    if refusal.status == 408:
        response.headers["Connection"] = "close"  # the rest of the body would be taken for a request
    return response


def _database_response(request: Request, error: sa.exc.OperationalError | sa.exc.TimeoutError) -> Response:
    """Return the problem document of a database that does not respond, is full, or has no connection left.

    The words of the database, which name its host, are for callers alone whose token was accepted.
    """
    authorised = hasattr(request.state, "grant")
    if not isinstance(error, sa.exc.OperationalError):
        detail = f"nothing was stored: {error if authorised else 'no connection to the database is free'}"
        return problem_response(503, "Database busy", detail[:_MOST_CHARACTERS], RetryAfter.DATABASE)
    if _is_full(error):
        cause = error.orig if authorised else "the disk is full"
        detail = f"nothing was stored: {cause}; make room on the database's disk, then send it again"
        return problem_response(507, "Disk full", detail[:_MOST_CHARACTERS], RetryAfter.DISK_FULL)
    detail = f"nothing was stored: {error.orig if authorised else DATABASE_SILENT}"
    return problem_response(503, "Database out of reach", detail[:_MOST_CHARACTERS], RetryAfter.DATABASE)


def _is_full(error: sa.exc.OperationalError) -> bool:
    """Return whether the database has no more room: SQLITE_FULL, or PostgreSQL's disk_full."""
    full = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return full or getattr(error.orig, "sqlstate", None) == "53100"


def failure_response(error: Exception) -> Response:
    """Return the problem document of an error that is no refusal: 500."""
    return problem_response(500, "Internal error", f"{type(error).__name__}: the server's log says more")


def _allowed_methods(app: FastAPI, path: str) -> list[str]:
    """Return the methods that a path of the API takes, whichever routes they are on."""
    for template, operations in app.openapi()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            allowed = {method.upper() for method in operations}
            return sorted(allowed | {"HEAD"} if "GET" in allowed else allowed)
    return []


def install(app: FastAPI) -> None:
    """Make the response to every exception of the app's routes a problem document."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return refusal_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return problem_response(422, "Invalid request", faults)

    @app.exception_handler(ClientDisconnect)
    async def client_left(_request: Request, _error: ClientDisconnect) -> Response:
        detail = "the client hung up before it had sent the body"  # nobody reads it
        return problem_response(400, "Body cut off", detail)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = problem_response(error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail))
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _allowed_methods(app, request.url.path)):
            response.headers["Allow"] = ", ".join(methods)
        return response

    @app.exception_handler(sa.exc.OperationalError)
    @app.exception_handler(sa.exc.TimeoutError)
    async def database_failed(request: Request, error: sa.exc.OperationalError | sa.exc.TimeoutError) -> Response:
        return _database_response(request, error)

    @app.exception_handler(sa.exc.DataError)
    async def invalid_value(_request: Request, error: sa.exc.DataError) -> Response:
        detail = f"the database cannot hold this: {error.orig}"
        return problem_response(422, "Invalid value", detail[:_MOST_CHARACTERS])
