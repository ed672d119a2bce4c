"""What holds of the step core whatever a training does."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from .steps import HERE, Training

Event = tuple[Any, ...]

OPTIMIZERS = st.sampled_from("ABC")
PARAMETERS = st.frozensets(st.integers(0, 4), min_size=1)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.tuples(st.just("backward"), PARAMETERS, st.booleans()),
    st.tuples(st.just("clip"), PARAMETERS, st.booleans()),
    st.tuples(st.just("value_clip"), PARAMETERS),
    st.tuples(st.just("clear"), PARAMETERS),
    st.tuples(st.just("step"), OPTIMIZERS, st.sampled_from(["plain", "closure", "uncalled"])),
    st.tuples(st.just("nested"), OPTIMIZERS, OPTIMIZERS),
    st.tuples(st.just("within"), OPTIMIZERS),
    st.tuples(st.just("skip"), OPTIMIZERS),
    st.tuples(st.just("gone"), OPTIMIZERS),
)
TRAININGS = st.tuples(
    st.sampled_from([None, "A", "AB", "ABC"]), st.sampled_from([1, 3, 1000]), st.lists(EVENTS, max_size=60)
)


class Drawn:
    """A training that does what was drawn, and keeps which losses it has differentiated."""

    def __init__(self, given: str | None, every: int) -> None:
        self.training = Training(given, every, A=(0, 1), B=(2,), C=(3, 4))
        self.made: list[str] = []

    def do(self, event: Event) -> None:
        kind, *arguments = event
        getattr(self, kind)(*arguments)

    def backward(self, changed: frozenset[int], bad: bool, during: Callable[[], object] = int) -> None:
        loss = f"{'bad ' if bad else ''}loss {len(self.made)}"
        self.made.append(loss)
        self.training.backward(loss, *changed, during=during)

    def clip(self, indices: frozenset[int], finite: bool) -> None:
        self.training.clip(*sorted(indices), finite=finite)

    def value_clip(self, indices: frozenset[int]) -> None:
        self.training.core.value_clipped(indices, sorted(indices))

    def clear(self, indices: frozenset[int]) -> None:
        self.training.core.gradients_cleared(indices)

    def step(self, optimizer: str, closure: str) -> None:
        record = self.training.begin(optimizer, closure=closure != "plain").record
        if closure == "closure":
            self.backward(self.training.parts[optimizer], bad=False)
            self.training.core.closure_left()
            self.training.core.closure_returned(self.training.key(optimizer), record)
        self.training.made(optimizer)

    def nested(self, outer: str, inner: str) -> None:
        if outer == inner:
            return
        self.training.begin(outer)
        self.training.step(inner, outer=outer)
        self.training.made(outer)

    def within(self, optimizer: str) -> None:
        self.backward(self.training.parts[optimizer], bad=False, during=lambda: self.training.step(optimizer))

    def skip(self, optimizer: str) -> None:
        self.training.skip(optimizer)

    def gone(self, optimizer: str) -> None:
        self.training.core.optimizer_gone(self.training.key(optimizer))


def drawn(what: tuple[str | None, int, list[Event]]) -> Drawn:
    named, every, events = what
    training = Drawn(named, every)
    for event in events:
        training.do(event)
    training.training.end()
    return training


@settings(max_examples=300, deadline=None)
@given(TRAININGS)
def test_no_loss_belongs_to_two_steps_and_none_is_made_up(what: tuple[str | None, int, list[Event]]) -> None:
    training = drawn(what)
    waiting = training.training.core.state.losses
    counted = Counter(loss for losses in training.training.losses for loss in losses) + Counter(waiting)
    assert set(counted) <= set(training.made)
    assert set(counted.values()) <= {1}


@settings(max_examples=300, deadline=None)
@given(TRAININGS)
def test_steps_are_counted_one_by_one_and_no_optimizer_makes_two_in_one(
    what: tuple[str | None, int, list[Event]],
) -> None:
    training = drawn(what).training
    assert [record.step for record in training.ended] == list(range(1, len(training.ended) + 1))
    assert training.core.state.number == len(training.ended)
    assert all(record.stepped for record in training.ended)
    begun = sum(event[0] == "step" for event in what[2])
    assert sum(len(record.stepped) for record in training.ended) >= (begun > 0)


@settings(max_examples=300, deadline=None)
@given(TRAININGS)
def test_nothing_of_the_past_waits_once_the_steps_are_over(what: tuple[str | None, int, list[Event]]) -> None:
    training = drawn(what)
    core = training.training.core
    assert core.state.open is None
    assert not core.state.under_way
    training.backward(frozenset(range(5)), bad=False)
    for optimizer in "ABC":
        training.training.step(optimizer)
    training.training.end()
    assert not core.state.losses
    assert not core.state.clips
    assert core.state.coming is None


@settings(max_examples=300, deadline=None)
@given(TRAININGS)
def test_a_skipped_step_has_no_measurement_and_a_clipping_waits_for_one_step(
    what: tuple[str | None, int, list[Event]],
) -> None:
    training = drawn(what).training
    for record in training.ended:
        assert not (record.skipped and (record.sampled or record.measurements))
    clips = [id(clip) for record in training.ended for clip in record.clips]
    assert len(clips) == len(set(clips))
    assert not set(clips) & {id(clip) for clip in training.core.state.clips}


@settings(max_examples=100, deadline=None)
@given(TRAININGS)
def test_the_thread_that_trains_is_the_one_that_steps(what: tuple[str | None, int, list[Event]]) -> None:
    assert drawn(what).training.core.state.thread == HERE
