"""``gradwatch demo``: four small networks, three of them sick, and the alerts that follow."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradwatch.demo.show import show


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration; return 0 only if the right runs alerted with the right rules."""
    parser = argparse.ArgumentParser(prog="gradwatch demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server up afterwards, to look around")
    parser.add_argument(
        "--folder", type=Path, default=Path("gradwatch-demo"), help="where its data goes (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    return show(given.folder, keep=given.keep)
