"""From a bad step in a real training to the webhook at a receiver: ``python -m benchmarks.alerts`` (50 alerts).

Default settings but ``every=1``. The clock starts before the optimizer's step that sees the bad gradient and stops when
the receiver has read the request. The bar is p95 below 1 s.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from tests.processes import GradwatchServer, WebhookReceiver

import gradwatch

ALERTS = 50
BAR_SECONDS = 1.0
_STEP_SECONDS = 0.005


def measure(server_url: str, receiver: WebhookReceiver, number: int) -> float:
    """Train a small network until its alert arrives; return the seconds that it took."""
    torch.manual_seed(number)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    started = time.perf_counter()
    with gradwatch.attach(model, optimizer, url=server_url, run=f"bench{number:03}", every=1):
        for step in range(100_000):
            bad = step == 20 + number % 7
            inputs = torch.full((4, 8), float("nan")) if bad else torch.randn(4, 8)
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            if bad:
                started = time.perf_counter()
            optimizer.step()
            if any(_fired(body) == f"bench{number:03}" for _, body in receiver.requests):
                return time.perf_counter() - started
            time.sleep(_STEP_SECONDS)
    raise AssertionError("no alert has arrived")


def _fired(body: bytes) -> str | None:
    data = json.loads(body)["data"]
    return str(data["run"]["name"]) if data["state"] == "firing" else None


def main() -> int:
    """Print the figures; return 0 where the bar is met."""
    with (
        tempfile.TemporaryDirectory() as folder,
        WebhookReceiver() as receiver,
        GradwatchServer(Path(folder) / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        seconds = sorted(measure(server.url, receiver, number) for number in range(ALERTS))
    p95 = statistics.quantiles(seconds, n=20)[-1]
    print(f"{ALERTS} alerts: median {statistics.median(seconds):.3f} s, p95 {p95:.3f} s, max {seconds[-1]:.3f} s")
    return 0 if p95 < BAR_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
