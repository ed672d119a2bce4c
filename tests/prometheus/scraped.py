"""Texts as Prometheus scrapes them, checked by promtool."""

import subprocess

import httpx

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def scrape(http: httpx.Client, **headers: str) -> str:
    """Return what ``/metrics`` answers."""
    answer = http.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.text


def series(text: str, of: str) -> dict[str, float]:
    """Return the samples whose line holds a text, by name and labels."""
    lines = (line for line in text.splitlines() if of in line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def findings(text: str) -> str:
    """Return what promtool has to say of a scrape; empty: nothing."""
    checked = subprocess.run(
        ["promtool", "check", "metrics", "--extended"], input=text, capture_output=True, text=True, check=False
    )
    return checked.stderr + ("" if checked.returncode == 0 else f"exit code {checked.returncode}")
