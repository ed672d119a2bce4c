"""The page's files: its views, all of which are one HTML file, and what that file loads.

They hold no data. The page reads everything that it shows from the API, with the token of its login.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import Scope

from gradwatch_server.api.authorisation import OPEN, AuthorisedRoute

_FOLDER = Path(__file__).parents[2] / "page"
_CACHE = {"Cache-Control": "no-cache"}
"""A browser asks for a file again before it uses it: after an upgrade it gets the new one."""

router = APIRouter(route_class=AuthorisedRoute, include_in_schema=False)


class PageFiles(StaticFiles):
    """The files that the HTML file loads; everybody may read them."""

    def __init__(self) -> None:
        super().__init__(directory=_FOLDER)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file."""
        response = await super().get_response(path, scope)
        response.headers.update(_CACHE)
        return response


@router.get("/", dependencies=[OPEN])
@router.get("/runs/{run_id}", dependencies=[OPEN])
@router.get("/alerts", dependencies=[OPEN])
@router.get("/server", dependencies=[OPEN])
async def show_view() -> FileResponse:
    """Return the page, which reads from its own address what it is to show."""
    return FileResponse(_FOLDER / "index.html", headers=_CACHE)
