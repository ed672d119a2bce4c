"""Writes the dashboards as JSON files for Grafana: ``python -m dashboards.build``."""

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import alerts, fleet, run, server

FOLDER = Path(__file__).parent / "grafana"


def render() -> dict[str, str]:
    """Return the JSON text of each dashboard by its file's name."""
    boards = (fleet.build(), run.build(), alerts.build(), server.build())
    encoder = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False)
    texts = {}
    for board in (board.build() for board in boards):
        document = json.loads(encoder.encode(board))
        _strip(document)
        texts[f"{board.uid}.json"] = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    return texts


def _strip(document: dict[str, Any]) -> None:
    """Remove the fields that the SDK adds and that Grafana's types do not have."""
    for variable in document["templating"].get("list", []):
        for key in ("auto", "auto_count", "auto_min"):  # they belong to variables of another type
            variable.pop(key, None)
    for panel in document["panels"]:
        if panel["type"] == "table":
            panel["options"].pop("footer", None)


if __name__ == "__main__":
    for name, text in render().items():
        (FOLDER / name).write_text(text)
