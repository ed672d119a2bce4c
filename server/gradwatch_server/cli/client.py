"""A question to a server, and how its refusal is told."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import httpx

from gradwatch.settings import secret
from gradwatch_server.errors import GradwatchError

_TIMEOUT_SECONDS = 30.0


class AskError(GradwatchError):
    """The server could not be asked, or it refused."""


def ask(given: argparse.Namespace, method: str, path: str, **content: Any) -> Any:
    """Return the server's answer.

    Raises:
        AskError: there is none, or it is a refusal.
    """
    url = given.url or secret(os.environ, "GRADWATCH_URL") or "http://127.0.0.1:8321"
    token = secret(os.environ, "GRADWATCH_TOKEN")
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        with httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False) as client:
            answer = client.request(method, f"{url.rstrip('/')}/api/v1{path}", **content)
    except httpx.InvalidURL as error:
        raise AskError(f"{url!r} is not the address of a server ({error}): http://127.0.0.1:8321 is one") from None
    except httpx.HTTPError as error:
        raise AskError(f"{url} does not answer ({error}): is the server running? name another with --url") from None
    if answer.is_success:
        return answer.json() if answer.content else None
    raise AskError(f"{url} answers {answer.status_code}: {_reason(answer)}")


def _reason(answer: httpx.Response) -> str:
    """Return what a problem document says, or else the answer's text."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.text


def parser(command: str, purpose: str) -> argparse.ArgumentParser:
    """Return the options that every command has."""
    made = argparse.ArgumentParser(prog=f"gradwatch {command}", description=purpose)
    made.add_argument("--url", help="the server (default: $GRADWATCH_URL, http://127.0.0.1:8321)")
    return made


def told(work: Callable[[], int], command: str) -> int:
    """Return the exit code of a command; a refusal is printed and is 1."""
    try:
        return work()
    except GradwatchError as error:
        print(f"gradwatch {command}: {error}", file=sys.stderr)
        return 1
