"""``gradwatch silence``: list, add or end silences."""

import argparse
import getpass
import re
import time
from collections.abc import Sequence

from gradwatch_server.cli.client import ask, parser, told

_UNITS = {"m": 60.0, "h": 3_600.0, "d": 86_400.0}


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 30m, 2h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 30m, 2h or 7d")
    return float(found[1]) * _UNITS[found[2]]


def main(arguments: Sequence[str]) -> int:
    """List, add or end silences."""
    options = parser("silence", "Have alerts not told for a while; without options, list the silences that hold.")
    options.add_argument("--for", dest="duration", type=seconds, metavar="30m|2h|7d", help="add a silence so long")
    for name in ("project", "run", "rule"):
        options.add_argument(f"--{name}", default="*", help="pattern with * and ? (default: all)")
    options.add_argument("--author", default=getpass.getuser(), help="(default: %(default)s)")
    options.add_argument("--comment", default="", help="why")
    options.add_argument("--end", metavar="ID", help="end this silence now")
    given = options.parse_args(arguments)
    return told(lambda: _silence(given), "silence")


def _silence(given: argparse.Namespace) -> int:
    if given.end:
        ask(given, "DELETE", f"/silences/{given.end}")
        print(f"silence {given.end} has ended")
        return 0
    if given.duration is not None:
        wanted = {name: getattr(given, name) for name in ("project", "run", "rule", "author", "comment")}
        listed = [ask(given, "POST", "/silences", json=wanted | {"ends_at": time.time() + given.duration})]
    else:
        listed = ask(given, "GET", "/silences")
    for each in listed:
        ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["ends_at"]))
        covers = f"project {each['project']}  run {each['run']}  rule {each['rule']}"
        print(f"{each['id']}  until {ends}  {covers}  by {each['author']}  {each['comment']}".rstrip())
    if not listed:
        print("no silences")
    return 0
