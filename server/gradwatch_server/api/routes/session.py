"""Routes of the page's login, which keeps a token in a cookie that no script can read."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from gradwatch_server.api import documents
from gradwatch_server.api.authorisation import (
    OPEN,
    AuthorisedRoute,
    cookie_name,
    is_encrypted,
    presented_token,
    refresh_tokens,
)
from gradwatch_server.api.problem import problems
from gradwatch_server.errors import Refused
from gradwatch_server.services import Services

router = APIRouter(prefix="/api/v1", route_class=AuthorisedRoute, tags=["session"])

_COOKIE_SECONDS = 30 * 86_400


@router.get("/session", dependencies=[OPEN], response_model=documents.Session)
async def show_session(request: Request) -> Any:
    """Show what this request's token allows, and whether one is required."""
    await refresh_tokens(request)
    try:
        return _session(request, presented_token(request))
    except Refused:
        return {"login": True, "scope": None, "project": None}


@router.post("/session", dependencies=[OPEN], response_model=documents.Session, responses=problems(401))
async def log_in(request: Request, response: Response, login: documents.Login) -> Any:
    """Set a read or admin token as a cookie: HttpOnly, SameSite=Strict, Secure over https."""
    await refresh_tokens(request)
    session = _session(request, login.token.strip())
    if session["login"]:
        response.set_cookie(
            cookie_name(request),
            login.token.strip(),
            max_age=_COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=is_encrypted(request),
        )
    return session


@router.delete("/session", dependencies=[OPEN], status_code=204)
async def log_out(request: Request, response: Response) -> None:
    """Delete the cookie; the token itself stays valid until it is revoked."""
    response.delete_cookie(cookie_name(request), httponly=True, samesite="strict", secure=is_encrypted(request))


def _session(request: Request, token: str | None) -> dict[str, Any]:
    tokens = Services.of(request).tokens
    grant = tokens.check(token, "read", time.time())
    return {"login": tokens.required, "scope": grant.scope, "project": grant.project}
