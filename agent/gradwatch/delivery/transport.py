"""HTTP requests to the server: proxies, compression, and what a response means for the document that was sent."""

import gzip
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import unquote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from gradwatch import __version__, wire

_log = logging.getLogger("gradwatch")

LONGEST_RETRY_AFTER_SECONDS: Final = 3600.0
"""Longest pause that the server can ask for by Retry-After."""
_REGISTER: Final = "/api/v1/runs"
_COMPRESSED_BYTES: Final = 1 << 16
"""Size from which a registration is compressed: names and shapes repeat, and a proxy may take no more than 1 MB."""

Outcome = Literal["committed", "unknown_run", "rejected", "unauthorized", "unregistered", "retry"]
"""What became of one document:

- ``committed``: it is on the server's disk.
- ``unknown_run``: the server wants the registration first.
- ``rejected``: the server will never take it.
- ``unauthorized``: the server refuses the token; the document waits.
- ``unregistered``: the server refuses the registration; the documents of the run wait.
- ``retry``: the server cannot be reached, or asks to come back later.
"""


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The result of one attempt to deliver a document."""

    outcome: Outcome
    reason: str = ""
    retry_after_seconds: float | None = None
    divisible: bool = False
    """Whether the server may take a part of the document that it rejected."""
    refused: bool = False
    """Whether there was no connection."""

    @property
    def is_final(self) -> bool:
        """Return whether the document can leave the queue."""
        return self.outcome in ("committed", "rejected")


def open_pool(url: str) -> urllib3.PoolManager:
    """Return the connections to a server, through the proxy that the environment names for it.

    ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` mean what they mean to curl and to Python; this
    machine itself is always reached directly.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or _is_this_machine(parts.hostname or "") or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return urllib3.PoolManager(num_pools=1, maxsize=1, retries=False)
    try:
        return _proxied(proxy if "://" in proxy else f"http://{proxy}")
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        kind = type(error).__name__  # the error's text may hold the proxy's password
        _log.warning("gradwatch: the environment's proxy cannot be used (%s), the server is reached without it", kind)
        return urllib3.PoolManager(num_pools=1, maxsize=1, retries=False)


def _proxied(proxy: str) -> urllib3.ProxyManager:
    given = urlsplit(proxy)
    headers = None
    if given.username is not None:
        credentials = f"{unquote(given.username)}:{unquote(given.password or '')}"
        headers = urllib3.make_headers(proxy_basic_auth=credentials)
        proxy = given._replace(netloc=given.netloc.rpartition("@")[2]).geturl()
    return urllib3.ProxyManager(proxy, num_pools=1, maxsize=1, retries=False, proxy_headers=headers)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class HttpTransport:
    """Sends documents over HTTP.

    Args:
        url: root of the server.
        token: bearer token, None where the server wants none.
        tell_clock: whether the documents were made by this machine's clock, which the server then learns.
    """

    def __init__(self, url: str, token: str | None, *, tell_clock: bool = True) -> None:
        self._url = url
        self._tell_clock = tell_clock
        self._pool = open_pool(url)
        self._headers = {
            "Content-Type": wire.MESSAGEPACK_TYPE,
            "Accept": wire.JSON_TYPE,
            "User-Agent": f"gradwatch/{__version__}",
        }
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str, query: Mapping[str, str], timeout_seconds: float) -> Any:
        """Return the JSON document at a path; None if there is none, or no server."""
        address = f"{self._url}{path}?{urlencode(query)}"
        headers = {name: value for name, value in self._headers.items() if name != "Content-Type"}
        timeout = urllib3.Timeout(total=timeout_seconds)
        try:
            response = self._pool.request("GET", address, headers=headers, timeout=timeout, redirect=False)
            return json.loads(response.data) if response.status == 200 else None
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            return None

    def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
        """Send one document; return an error of the network as a result."""
        timeout = urllib3.Timeout(total=max(timeout_seconds, 0.01))
        headers = self._headers | ({wire.CLOCK_HEADER: f"{time.time():.3f}"} if self._tell_clock else {})
        if len(body) >= _COMPRESSED_BYTES and path == _REGISTER:
            body, headers = gzip.compress(body, mtime=0), headers | {"Content-Encoding": "gzip"}
        try:
            response = self._pool.request(
                "POST", self._url + path, body=body, headers=headers, timeout=timeout, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            refused = isinstance(error, urllib3.exceptions.NewConnectionError)
            return DeliveryResult("retry", f"{type(error).__name__}: {error}", refused=refused)
        return interpret_response(response.status, response.headers, response.data)

    def close(self) -> None:
        """Close the connection."""
        self._pool.clear()


def interpret_response(status: int, headers: Mapping[str, str], body: bytes) -> DeliveryResult:
    """Return what an HTTP response means for the document that was sent.

    A 2xx counts only with a JSON object as its body: a captive portal or a wrong server also answers 200.
    """
    reason = f"{status} {_problem(body)}".strip()
    if 200 <= status < 300:
        if _json_object(body) is None:
            return DeliveryResult("retry", f"{status} without a JSON object")
        return DeliveryResult("committed")
    if status in (404, 409):
        return DeliveryResult("unknown_run", reason)
    if status in (401, 403):
        return DeliveryResult("unauthorized", reason)
    if status in (400, 413, 415, 422):
        return DeliveryResult("rejected", reason, divisible=status in (413, 422))
    asked = wire.retry_after_seconds(headers.get("Retry-After"), time.time())
    return DeliveryResult("retry", reason, None if asked is None else min(asked, LONGEST_RETRY_AFTER_SECONDS))


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _problem(body: bytes) -> str:
    """Return the detail or title of a problem document (RFC 9457), else the beginning of the body."""
    content = _json_object(body) or {}
    return str(content.get("detail") or content.get("title") or body[:200].decode("utf-8", "replace"))
