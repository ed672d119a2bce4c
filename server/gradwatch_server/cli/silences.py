"""``gradwatch silence``: list silences, add one, or end one."""

import argparse
import getpass
import re
import time
from collections.abc import Sequence
from typing import Any

from gradwatch_server.cli.client import send_request
from gradwatch_server.cli.command import print_line, run_command, server_parser

_UNITS = {"m": 60.0, "h": 3_600.0, "d": 86_400.0}


def _seconds(text: str) -> float:
    """Return the seconds of a duration such as 30m, 2h or 7d."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 30m, 2h or 7d")
    return float(found[1]) * _UNITS[found[2]]


def main(arguments: Sequence[str]) -> int:
    """Run ``gradwatch silence``; return the exit code."""
    parser = server_parser("silence", "Mute alerts for a while; without --for or --end, list the silences in force.")
    parser.add_argument("--for", dest="duration", type=_seconds, metavar="30m|2h|7d", help="add a silence this long")
    for name in ("project", "run", "rule"):
        parser.add_argument(f"--{name}", default="*", help=f"{name}s to mute: a pattern with * and ? (default: all)")
    parser.add_argument("--author", default=getpass.getuser(), help="who adds it (default: %(default)s)")
    parser.add_argument("--comment", default="", help="why")
    parser.add_argument("--end", metavar="ID", help="end this silence now")
    options = parser.parse_args(arguments)
    work = _end if options.end else _list_silences if options.duration is None else _add
    return run_command("silence", lambda: work(options))


def _end(options: argparse.Namespace) -> int:
    send_request(options, "DELETE", "silences", options.end)
    print_line(f"silence {options.end} has ended")
    return 0


def _add(options: argparse.Namespace) -> int:
    silence = {name: getattr(options, name) for name in ("project", "run", "rule", "author", "comment")}
    silence["ends_at"] = time.time() + options.duration
    print_line(_line(send_request(options, "POST", "silences", json=silence)))
    return 0


def _list_silences(options: argparse.Namespace) -> int:
    silences = send_request(options, "GET", "silences")
    for silence in silences:
        print_line(_line(silence))
    if not silences:
        print_line("no silences")
    return 0


def _line(silence: dict[str, Any]) -> str:
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(silence["ends_at"]))
    mutes = f"project {silence['project']}  run {silence['run']}  rule {silence['rule']}"
    return f"{silence['id']}  until {ends}  {mutes}  by {silence['author']}  {silence['comment']}".rstrip()
