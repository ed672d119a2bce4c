"""Writes the dashboards as JSON files for Grafana: ``python -m dashboards.build``."""

import json
from pathlib import Path

from dashboards.boards import alerts, fleet, run, server

FOLDER = Path(__file__).parent / "grafana"


def render() -> dict[str, str]:
    """Return the JSON text of each dashboard by its file's name."""
    boards = (fleet.build(), run.build(), alerts.build(), server.build())
    return {
        f"{board['uid']}.json": json.dumps(board, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        for board in boards
    }


if __name__ == "__main__":
    for name, text in render().items():
        (FOLDER / name).write_text(text)
