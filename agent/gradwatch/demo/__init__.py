"""``gradwatch demo``: trains four small networks, three of them sick, and prints the alerts as they arrive."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradwatch.demo.show import show


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration; return 0 if each sick run alerted with the expected rule and the healthy one did not."""
    parser = argparse.ArgumentParser(prog="gradwatch demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep the server running afterwards")
    parser.add_argument(
        "--folder", type=Path, default=Path("gradwatch-demo"), help="folder of its data (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    return show(given.folder, keep=given.keep)
