"""The event log of a step core: written by a training, replayed without it.

``GRADWATCH_STEP_LOG=FILE python train.py`` writes the events that the agent receives, one JSON document a line; tensors
are named and never read. ``python -m gradwatch.steps.event_log FILE`` replays it and prints the action that the core
returns for each event. A log of some steps is all that is needed to find why a loss, a clipping or an optimizer was
counted to the wrong step.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_type_hints

import msgspec

from gradwatch.steps.core import StepCore
from gradwatch.steps.schedule import OverheadAccount, SamplingSchedule
from gradwatch.steps.state import NormClip, StepRecord

MOST_EVENTS: Final = 100_000
"""Events that are written; then the log ends, so that a forgotten variable fills no disk."""
EVENTS: Final = (
    "logged",
    "training_moved",
    "backward_began",
    "backward_ended",
    "gradients_changed",
    "gradients_cleared",
    "losses_dropped",
    "losses_replaced",
    "norm_clipped",
    "value_clipped",
    "optimizer_gone",
    "steps_counted",
    "other_stepped",
    "step_began",
    "closure_left",
    "closure_returned",
    "step_made",
    "scaler_stepped",
    "step_ended",
)
"""The methods of ``StepCore`` that are events."""


class Line(msgspec.Struct, frozen=True):
    """One line of a log."""

    event: str
    """``start``, or one of ``EVENTS``."""
    arguments: dict[str, Any]
    """By name; a tensor is written as a text that stands for it, a step record as its number."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """An event, and the action that the core returned for it."""

    line: Line
    answer: Any
    """What the event returned."""
    ended: StepRecord | None
    """The record of the step that the event ended."""


def write_events(core: StepCore, account: OverheadAccount, write: Callable[[bytes], object]) -> None:
    """Write all events that ``core`` gets from now on.

    Args:
        core: a step core that has had no event yet.
        account: the overhead account of the core's schedule.
        write: writes one line, which ends with a newline.
    """
    left = [MOST_EVENTS]

    def put(event: str, arguments: dict[str, Any]) -> None:
        if left[0]:
            left[0] -= 1
            try:
                write(msgspec.json.encode(Line(event, arguments), enc_hook=_name) + b"\n")
            except (OSError, ValueError):  # a full disk, or the log of a session that is over: the training goes on
                left[0] = 0

    core.quiet.allowed = False  # every step has its events
    state = core.state
    put(
        "start",
        {
            "steps_made": state.number,
            "number_is_open": state.number_is_open,
            "thread": state.thread,
            "expected": core.expected.keys,
            "every_steps": account.every_steps,
            "budget_ratio": account.budget_ratio,
            "aligned": account.aligned,
        },
    )
    for name in EVENTS:
        setattr(core, name, _writing(getattr(core, name), name, put))


def _writing(event: Any, name: str, put: Callable[[str, dict[str, Any]], None]) -> Callable[..., Any]:
    signature = inspect.signature(event)

    @functools.wraps(event)
    def writing(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        put(name, {key: _written(value) for key, value in arguments.items()})
        return event(*args, **kwargs)

    return writing


def _written(value: Any) -> Any:
    if isinstance(value, StepRecord):
        return value.step
    if isinstance(value, NormClip):
        repeated = {str(index): times for index, times in value.repeated.items()}
        return {**{key: getattr(value, key) for key in NormClip.__slots__}, "repeated": repeated}
    return value


def _name(value: Any) -> str:
    """Return a name of a tensor, which differs from those of all tensors that live at the same time."""
    return f"{type(value).__name__} {id(value):x}"


def replay(lines: Iterable[bytes]) -> Iterator[Replayed]:
    """Replay a log; yield each event with the action that the core returns for it.

    Args:
        lines: the lines of the log.

    Raises:
        ValueError: a line is not a line of an event log.
    """
    core: StepCore | None = None
    names: dict[Any, str] = {}
    for number, text in enumerate(lines, start=1):
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number} is none of an event log: {error}") from error
        if line.event == "start":
            core = _started(line.arguments)
            continue
        if core is None or line.event not in EVENTS:
            raise ValueError(f"line {number}: {line.event!r} is no event here; a log begins with 'start'")
        open_step = core.state.open
        answer = getattr(core, line.event)(**_read(line, core, names))
        yield Replayed(line, answer, open_step if core.state.open is not open_step else None)


def _started(arguments: dict[str, Any]) -> StepCore:
    given = dict(arguments)
    account = OverheadAccount(given.pop("every_steps"), given.pop("budget_ratio"), aligned=given.pop("aligned"))
    return StepCore(given.pop("steps_made"), SamplingSchedule(account), given.pop("expected"), **given)


def _read(line: Line, core: StepCore, names: dict[Any, str]) -> dict[str, Any]:
    """Return the arguments of an event as the core takes them."""
    hints = get_type_hints(getattr(StepCore, line.event))
    arguments: dict[str, Any] = {}
    for key, value in line.arguments.items():
        if key == "record":
            arguments[key] = None if value is None else core.state.open
        elif key == "clip":
            clip = msgspec.convert(value, NormClip, strict=False)
            arguments[key] = replace(clip, indices=frozenset(clip.indices))
        elif key == "losses":
            # Losses are told apart by identity: one object for each name.
            arguments[key] = [names.setdefault(loss, loss) for loss in value]
        else:
            arguments[key] = msgspec.convert(value, hints[key])
    return arguments


def main(arguments: list[str]) -> int:
    """Replay a log file, and print the action that the core returns for each event."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m gradwatch.steps.event_log FILE\n")
        return 2
    with Path(arguments[0]).open("rb") as log:
        for replayed in replay(log):
            told = ", ".join(f"{key}={value!r}" for key, value in replayed.line.arguments.items())
            sys.stdout.write(f"{replayed.line.event}({told})\n")
            if replayed.answer is not None:
                sys.stdout.write(f"    -> {replayed.answer!r}\n")
            if replayed.ended is not None:
                sys.stdout.write(f"    = {replayed.ended!r}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
