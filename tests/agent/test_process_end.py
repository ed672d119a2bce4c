"""A program that ends while an agent still works: its exit code is its own, and what was measured is in the spool."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradwatch import wire
from gradwatch.delivery.spool import leftovers
from tests.processes import environment

STEPS = 200
_PROGRAMS = f"""
import json, os, sys, gradwatch, torch
from gradwatch.lifecycle import shutdown
children = []
while len(children) < int(sys.argv[1]):
    if not (child := os.fork()):
        break
    children.append(child)
else:
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
    sys.exit()
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
agent = gradwatch.attach(model, optimizer, url="http://127.0.0.1:9", every=1)
for _ in range({STEPS}):
    agent.log(**{{f"n{{index}}": torch.tensor(1.0) for index in range(200)}})
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""


def _exit_codes(ending: str, cache: Path, programs: int) -> list[int]:
    """Return the exit codes of some programs that end while their agents have much to write."""
    command = [sys.executable, "-c", _PROGRAMS + ending, str(programs)]
    changed = environment(XDG_CACHE_HOME=str(cache))
    ended = subprocess.run(command, env=changed, capture_output=True, text=True, timeout=300, check=True)
    codes: list[int] = json.loads(ended.stdout)
    return codes


def _left(cache: Path) -> Iterator[wire.Batch]:
    """Yield the batches in the spools."""
    for spool in leftovers(cache / "gradwatch"):
        while entry := spool.first():
            if entry.kind == "batch":
                yield wire.decode(entry.body, wire.Batch)
            spool.forget(entry)


@pytest.mark.parametrize("ending", ["agent.close(0.0)", "agent.close(0.0)\nshutdown.CLOSING_SECONDS = 0.0"])
def test_a_thread_that_is_late_does_not_abort_the_program(ending: str, tmp_path: Path) -> None:
    assert _exit_codes(ending, tmp_path, programs=4) == [0] * 4


def test_the_end_is_in_the_spool_though_there_was_no_time_for_the_steps(tmp_path: Path) -> None:
    assert _exit_codes("agent.close(0.0)\nshutdown.CLOSING_SECONDS = 0.0", tmp_path, programs=1) == [0]
    assert [batch.end.status for batch in _left(tmp_path) if batch.end is not None] == ["completed"]


def test_what_is_written_after_closing_is_in_the_spool(tmp_path: Path) -> None:
    assert _exit_codes("agent.close(0.0)", tmp_path, programs=1) == [0]
    assert [sample.step for batch in _left(tmp_path) for sample in batch.samples] == list(range(1, STEPS + 1))
