"""One request to the server and what its answer means."""

import json
import time
from dataclasses import dataclass
from enum import Enum

import urllib3

from gradwatch import wire
from gradwatch.spool import Spool


class Verdict(Enum):
    """What to do with a document after an attempt to deliver it."""

    ACKNOWLEDGED = "the server has it on disk"
    UNKNOWN_RUN = "the server does not know the run: register it, then send again"
    REFUSED = "the server will never take it: set it aside"
    LATER = "send it again later"


@dataclass(frozen=True)
class Reply:
    """The answer to one request."""

    verdict: Verdict
    reason: str = ""
    retry_after_seconds: float | None = None


class Client:
    """Talks to one server; holds one connection."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Content-Type": wire.MESSAGEPACK_TYPE, "User-Agent": "gradwatch-agent"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._http = urllib3.PoolManager(num_pools=1, maxsize=1, retries=False)

    def register(self, body: bytes, timeout_seconds: float) -> Reply:
        """Register a run."""
        return self._post("/api/v1/runs", body, timeout_seconds)

    def store(self, run_id: str, body: bytes, timeout_seconds: float) -> Reply:
        """Send a batch."""
        return self._post(f"/api/v1/runs/{run_id}/samples", body, timeout_seconds)

    def _post(self, path: str, body: bytes, timeout_seconds: float) -> Reply:
        timeout = urllib3.Timeout(total=max(timeout_seconds, 0.1))
        try:
            answer = self._http.request(
                "POST", self.url + path, body=body, headers=self._headers, timeout=timeout, redirect=False
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return Reply(Verdict.LATER, f"{type(error).__name__}: {error}")
        return _read(answer)

    def close(self) -> None:
        """Close the connection."""
        self._http.clear()


def _read(answer: urllib3.BaseHTTPResponse) -> Reply:
    reason = f"HTTP {answer.status}"
    try:
        content = json.loads(answer.data[:65_536])
    except ValueError:
        content = None
    if 200 <= answer.status < 300:
        if isinstance(content, dict) and "id" in content:
            return Reply(Verdict.ACKNOWLEDGED)
        return Reply(Verdict.LATER, f"{reason}, but the answer is not of a gradwatch server")
    if isinstance(content, dict) and "detail" in content:
        reason = f"{reason}: {content['detail']}"
    if answer.status == 404 and isinstance(content, dict) and content.get("title") == "Unknown run":
        return Reply(Verdict.UNKNOWN_RUN, reason)
    if answer.status in (400, 409, 413, 415, 422) and isinstance(content, dict):
        return Reply(Verdict.REFUSED, reason)
    waits = answer.headers.get("Retry-After", "")
    return Reply(Verdict.LATER, reason, float(waits) if waits.isdecimal() else None)


def deliver(spool: Spool, client: Client, deadline: float) -> tuple[int, int, str]:
    """Send what a spool holds, in order.

    Args:
        spool: one that no living agent holds.
        client: of the server that it goes to.
        deadline: monotonic seconds.

    Returns:
        Documents delivered, documents that the server refused, and why the rest stays (empty: nothing does).
    """
    delivered = refused = 0
    while (entry := spool.first()) is not None:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            return delivered, refused, "the time is up"
        if entry.kind == "run":
            reply = client.register(entry.body, seconds)
        else:
            reply = client.store(spool.run_id, entry.body, seconds)
        if reply.verdict not in (Verdict.ACKNOWLEDGED, Verdict.REFUSED):
            return delivered, refused, reply.reason
        delivered += reply.verdict is Verdict.ACKNOWLEDGED
        refused += reply.verdict is Verdict.REFUSED
        spool.remove(entry)
    return delivered, refused, ""
