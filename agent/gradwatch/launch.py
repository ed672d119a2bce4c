"""``gradwatch run -- python train.py``: the agent attached to a training whose code is left as it is.

The command runs in place of this process, with a folder in front of PYTHONPATH whose ``sitecustomize`` waits for torch:
signals, standard streams and the exit code are the command's own.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

SITE = Path(__file__).parent / "site"


def main(arguments: Sequence[str]) -> int:
    """Replace this process by the command; return only if it cannot be started."""
    program, command, environment = _prepared(arguments)
    if program is None:
        print(f"gradwatch run: {command[0]!r} is not a program on the PATH", file=sys.stderr)
        return 127
    sys.stdout.flush()
    return os.execve(program, command, environment)  # noqa: S606  # no shell: the user's own command, as given


def _prepared(arguments: Sequence[str]) -> tuple[str | None, list[str], dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog="gradwatch run", usage="gradwatch run [options] -- COMMAND ...", description="Watch a training command."
    )
    parser.add_argument("--url", help="address of the server (default: $GRADWATCH_URL or http://127.0.0.1:8321)")
    parser.add_argument("--project", help="project of the run")
    parser.add_argument("--run", help="name of the run (default: that of the script)")
    parser.add_argument("--every", type=int, help="steps between samples (default: by the overhead budget)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("name the command to run: gradwatch run -- python train.py")
    if given.every is not None and given.every < 1:
        parser.error(f"--every {given.every}: the number of steps between samples is at least 1")
    environment = os.environ | {"GRADWATCH_ATTACH": "1"}
    for name, value in (("URL", given.url), ("PROJECT", given.project), ("RUN", given.run), ("EVERY", given.every)):
        if value is not None:
            environment[f"GRADWATCH_{name}"] = str(value)
    package = str(Path(__file__).parent.parent)
    paths = [str(SITE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), package]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return shutil.which(command[0]), command, environment
