"""Refusals as problem+json."""

from http import HTTPStatus
from typing import Any

import msgspec
import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from gradwatch_server.api.documents import Problem
from gradwatch_server.errors import Refused

PROBLEM_TYPE = "application/problem+json"


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of these refusals."""
    described = {"model": Problem}
    return {
        status: described | {"description": HTTPStatus(status).phrase, "content": {PROBLEM_TYPE: {}}}
        for status in statuses
    }


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
    return made


def install(app: FastAPI) -> None:
    """Make every refusal of the app a problem document."""

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return answer(422, "Invalid request", faults)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        made = answer(error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail))
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(sa.exc.OperationalError)
    async def out_of_reach(_request: Request, error: sa.exc.OperationalError) -> Response:
        return answer(503, "Database out of reach", f"nothing was stored: {error.orig}"[:500], retry_after_seconds=5)

    @app.exception_handler(Exception)
    async def broken(_request: Request, error: Exception) -> Response:
        return answer(500, "Internal error", f"{type(error).__name__}: the server's log says more")
