"""The demonstration from beginning to end: server, receiver, four trainings, summary."""

import base64
import json
import os
import secrets
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import urllib3

import gradwatch
from gradwatch.demo.networks import CASES, Case, train
from gradwatch.demo.receiver import Alert, Receiver
from gradwatch.demo.server import Server

_ALERT_SECONDS = 60.0
_RED, _YELLOW, _GREEN, _DIM, _BOLD, _PLAIN = "\033[31m", "\033[33m", "\033[32m", "\033[2m", "\033[1m", "\033[0m"


@dataclass
class _Terminal:
    """The terminal output: permanent lines, and below them one line of progress that is overwritten."""

    live: bool = field(default_factory=sys.stdout.isatty)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _progress: str = ""

    def colour(self, code: str, text: str) -> str:
        return f"{code}{text}{_PLAIN}" if self.live else text

    def print(self, text: str = "") -> None:
        """Print a permanent line above the line of progress."""
        with self._lock:
            erased = "\r\033[K" if self.live and self._progress else ""
            print(f"{erased}{text}", flush=True)
            if erased:
                print(self._progress, end="", flush=True)

    def progress(self, text: str) -> None:
        """Overwrite the line of progress; without a terminal nothing is printed."""
        with self._lock:
            if self.live:
                self._progress = text
                print(f"\r\033[K{text}", end="", flush=True)

    def settle(self, text: str) -> None:
        """Replace the line of progress by a permanent line."""
        with self._lock:
            print(f"\r\033[K{text}" if self.live else text, flush=True)
            self._progress = ""


@dataclass
class _Outcome:
    """The result of one training."""

    case: Case
    run_id: str
    overhead_ratio: float | None = None
    rules: list[str] = field(default_factory=list)

    @property
    def as_expected(self) -> bool:
        expected = self.case.expected_rule
        return not self.rules if expected is None else expected in self.rules


def show(folder: Path, *, keep: bool) -> int:
    """Run the demonstration; return 0 if each sick run alerted with the expected rule and the healthy one did not."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["GRADWATCH_SPOOL_DIR"] = str(folder / "spool")
    terminal = _Terminal()
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    started = time.monotonic()
    with (
        Receiver(secret, lambda alert: terminal.print(_line(terminal, alert))) as receiver,
        Server(folder, receiver.url, secret) as server,
    ):
        terminal.print(f"gradwatch server on {server.url}, data in {folder}/, webhooks to {receiver.url}\n")
        outcomes = [_train(case, server.url, terminal) for case in CASES]
        _wait_for_alerts(server.url, outcomes)
        terminal.print()
        for outcome in outcomes:
            outcome.overhead_ratio = _overhead_ratio(server.url, outcome.run_id)
            terminal.print(_summary(terminal, outcome))
        firing = sum(len(outcome.rules) for outcome in outcomes)
        terminal.print(f"\n{len(outcomes)} runs, {firing} alerts, {receiver.deliveries} signed webhooks delivered,")
        terminal.print(f"{time.monotonic() - started:.0f} s in all; the server's log is {folder / 'server.log'}")
        passed = all(outcome.as_expected for outcome in outcomes) and not receiver.refused
        verdict = "as expected" if passed else "NOT as expected"
        terminal.print(terminal.colour(_GREEN if passed else _RED, f"The outcome is {verdict}."))
        terminal.print(f"\npage     {server.url}/\nmetrics  {server.url}/metrics")
        if keep:
            _keep_running(server, terminal)
        else:
            terminal.print(terminal.colour(_DIM, "(they are gone now: make demo KEEP=1 leaves the server up)"))
    return 0 if passed else 1


def _keep_running(server: Server, terminal: _Terminal) -> None:
    terminal.print("\nThe server stays up; Ctrl-C ends it.")
    try:
        server.wait()
    except KeyboardInterrupt:
        terminal.print()


def _train(case: Case, url: str, terminal: _Terminal) -> _Outcome:
    torch.set_num_threads(1)  # several threads only slow down networks as small as these
    torch.manual_seed(0)
    model, optimizer = case.build()
    last = 0.0
    with gradwatch.attach(model, optimizer, url=url, project="demo", run=case.name, every=1) as agent:

        def progress(step: int, loss: float) -> None:
            nonlocal last
            last = loss
            if step % 5 == 0:
                terminal.progress(f"  {case.name:<24} step {step:>4}/{case.steps}  loss {loss:<12.4g}")

        train(case, model, optimizer, progress)
        agent.close(timeout_seconds=_ALERT_SECONDS, status="completed")
    terminal.settle(f"  {case.name:<24} {case.steps} steps, last loss {last:.4g}")
    return _Outcome(case, agent.run_id)


def _line(terminal: _Terminal, alert: Alert) -> str:
    resolved = alert["state"] == "resolved"
    colour = _GREEN if resolved else _RED if alert["severity"] == "critical" else _YELLOW
    mark = terminal.colour(colour, f"{'resolved' if resolved else alert['severity']:>10} {alert['rule']}")
    return f"{mark}  {alert['run']['name']}, step {alert['step']}: {alert['resolution' if resolved else 'summary']}"


def _wait_for_alerts(url: str, outcomes: list[_Outcome]) -> None:
    """Wait until every expected alert has fired and every webhook is delivered, for a minute at most."""
    deadline = time.monotonic() + _ALERT_SECONDS
    while time.monotonic() < deadline:
        for outcome in outcomes:
            alerts = _get(url, f"/api/v1/alerts?run={outcome.run_id}")
            outcome.rules = sorted({alert["rule"] for alert in alerts if alert["fired_step"] is not None})
        finished = all(_get(url, f"/api/v1/runs/{outcome.run_id}")["state"] == "finished" for outcome in outcomes)
        if finished and all(outcome.as_expected for outcome in outcomes) and not _undelivered(url):
            return
        time.sleep(0.2)


def _undelivered(url: str) -> int:
    return sum(receiver["due"] for receiver in _get(url, "/api/v1/server")["receivers"])


def _overhead_ratio(url: str, run_id: str) -> float | None:
    ratio = _get(url, f"/api/v1/runs/{run_id}")["scalars"].get("overhead_ratio")
    return ratio if isinstance(ratio, float) else None


def _summary(terminal: _Terminal, outcome: _Outcome) -> str:
    mark = terminal.colour(_GREEN, "ok  ") if outcome.as_expected else terminal.colour(_RED, "FAIL")
    found = ", ".join(outcome.rules) or "no alert"
    overhead = "" if outcome.overhead_ratio is None else f"agent {outcome.overhead_ratio:.1%} of the step (every=1)"
    return f"{mark} {outcome.case.name:<24} {found:<24} {terminal.colour(_DIM, overhead)}"


def _get(url: str, path: str) -> Any:
    """Return a document of the API; waits for a server that is being restarted."""
    deadline = time.monotonic() + _ALERT_SECONDS
    while True:
        try:
            return json.loads(urllib3.request("GET", url + path, timeout=5.0, retries=False).data)
        except urllib3.exceptions.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
