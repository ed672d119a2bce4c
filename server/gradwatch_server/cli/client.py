"""The client of the HTTP interface that the subcommands use."""

import argparse
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx

from gradwatch.settings import secret
from gradwatch_server.errors import GradwatchError

_TIMEOUT_SECONDS = 30.0


class RequestError(GradwatchError):
    """The server did not respond, or it refused a request; the text says what to do."""


def send_request(options: argparse.Namespace, method: str, *path: str, **content: Any) -> Any:
    """Send a request to the server that the options name; return the JSON of its response, None if it is empty.

    Args:
        options: options that a ``server_parser`` has parsed.
        method: HTTP method.
        path: segments of the path below ``/api/v1``, such as the id of an alert; they are quoted.
        content: ``params`` or ``json``, as httpx takes them.

    Raises:
        RequestError: there is no response, or it is not a success.
    """
    return _exchange(options, method, "/".join(["api", "v1", *(quote(part, safe="") for part in path)]), content)


def check_health(options: argparse.Namespace) -> str:
    """Return the state that a running server reports; it needs no token.

    Raises:
        RequestError: there is no response, or the server is not ready; the text says why.
    """
    return str(_exchange(options, "GET", "readyz", {})["status"])


def _exchange(options: argparse.Namespace, method: str, path: str, content: Mapping[str, Any]) -> Any:
    url = options.url or secret(os.environ, "GRADWATCH_URL") or "http://127.0.0.1:8321"
    token = secret(os.environ, "GRADWATCH_TOKEN")
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        with httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            response = client.request(method, f"{url.rstrip('/')}/{path}", **content)
    except httpx.InvalidURL as error:
        raise RequestError(f"{url!r} is not the address of a server ({error}): http://127.0.0.1:8321 is one") from None
    except httpx.HTTPError as error:
        raise RequestError(f"{url} does not answer ({error}): is the server running? name another with --url") from None
    if not response.is_success:
        raise RequestError(f"{url} answers {response.status_code}: {_detail(response)}")
    return response.json() if response.content else None


def _detail(response: httpx.Response) -> str:
    """Return the detail of a problem document, or the text of any other response."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text
