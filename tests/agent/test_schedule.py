"""The sampling schedule, with a hand-moved clock."""

import itertools
from collections.abc import Iterator

import pytest

from gradwatch.steps.schedule import (
    AHEAD_STEPS,
    BURST_STEPS,
    LONGEST_GAP_SECONDS,
    RESERVE_SAMPLES,
    Costs,
    OverheadAccount,
    SamplingSchedule,
)
from gradwatch.steps.state import StepRecord


def sampled(
    account: OverheadAccount,
    steps: int,
    *,
    step_seconds: float,
    sample_seconds: float,
    hooks_seconds: float = 0.0,
    threads_ratio: float = 0.0,
) -> list[int]:
    """Return the steps that were sampled."""
    taken = []
    for step in range(steps):
        due = account.due(step + 1)
        cost = sample_seconds if due else 0.0
        account.stepped(step_seconds + cost + hooks_seconds, hooks_seconds, cost if due else None, threads_ratio)
        if due:
            taken.append(step)
    return taken


@pytest.mark.parametrize("sample_seconds", [1e-4, 1e-3, 1e-2])
def test_the_share_of_sampled_steps_is_what_arithmetic_says(sample_seconds: float) -> None:
    account = OverheadAccount(None, 0.01)
    steps = 20_000
    taken = sampled(account, steps, step_seconds=0.1, sample_seconds=sample_seconds)
    right = min(0.01 * steps * (0.1 + sample_seconds * len(taken) / steps) / sample_seconds, steps)
    assert 0.99 * right <= len(taken) <= right + BURST_STEPS
    assert account.overhead_ratio <= 0.0125


@pytest.mark.parametrize("step_seconds", [0.001, 0.005, 0.02, 0.1])
def test_what_sampling_less_would_not_save_is_not_booked(step_seconds: float) -> None:
    """Hooks of 15 microseconds take 1.5% of a step of 1 ms, over the budget; samples have their part all the same."""
    account = OverheadAccount(None, 0.01, burst_steps=0)
    steps = 100_000
    given = {"step_seconds": step_seconds, "sample_seconds": 0.002, "hooks_seconds": 1.5e-5, "threads_ratio": 0.002}
    share = len(sampled(account, steps, **given)) / steps
    right = 0.01 * step_seconds / 0.002
    assert right / 1.5 <= share <= 1.5 * right
    if step_seconds >= 0.005:
        assert (
            share * 0.002 / step_seconds + 2e-5 / step_seconds + 0.002 <= 1.25 * 0.01 * 1.15
        )  # beside them: the floor


def test_it_starts_with_a_burst_and_goes_on_at_once() -> None:
    taken = sampled(OverheadAccount(None, 0.01), 200, step_seconds=0.1, sample_seconds=0.05)
    assert taken[:BURST_STEPS] == list(range(BURST_STEPS))
    assert 2 <= len(taken) - BURST_STEPS <= 4, "the burst is taken from the reserve"


@pytest.mark.parametrize("step_seconds", [1.0, 7.0, 40.0])
def test_a_sample_at_least_every_30_seconds(step_seconds: float) -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    taken = sampled(account, 400, step_seconds=step_seconds, sample_seconds=1e6)
    gaps = [(after - before) * step_seconds for before, after in itertools.pairwise(taken)]
    assert len(gaps) > 5
    assert max(gaps) <= max(LONGEST_GAP_SECONDS, step_seconds)


def test_trouble_brings_bursts_at_once_but_not_for_ever() -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    sampled(account, 200, step_seconds=0.1, sample_seconds=1.0)
    bursts = []
    for _ in range(2 * RESERVE_SAMPLES // BURST_STEPS):
        account.start_burst()
        bursts.append(len(sampled(account, BURST_STEPS, step_seconds=0.1, sample_seconds=1.0)))
    assert bursts[: RESERVE_SAMPLES // BURST_STEPS - 1] == [BURST_STEPS] * (RESERVE_SAMPLES // BURST_STEPS - 1)
    assert bursts[-2:] == [0, 0], "the reserve is used up"
    sampled(account, 400_000, step_seconds=0.1, sample_seconds=1.0)
    account.start_burst()
    burst = sampled(account, BURST_STEPS, step_seconds=0.1, sample_seconds=1.0)
    assert burst == list(range(BURST_STEPS)), "a part of the pay has filled it up again"


def test_a_fixed_interval_is_kept() -> None:
    assert sampled(OverheadAccount(4, 0.01), 13, step_seconds=0.1, sample_seconds=9.0) == [0, 4, 8, 12]


def test_a_long_pause_buys_nothing() -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    sampled(account, 100, step_seconds=0.1, sample_seconds=0.01)
    account.stepped(3600.0, 0.0, None, 0.0)
    taken = sampled(account, 100, step_seconds=0.1, sample_seconds=0.01)
    assert len(taken) <= 13


def test_ranks_that_decide_for_themselves_sample_the_same_steps() -> None:
    fast = sampled(OverheadAccount(None, 0.01, aligned=True), 2000, step_seconds=0.1, sample_seconds=0.004)
    slow = sampled(OverheadAccount(None, 0.01, aligned=True), 2000, step_seconds=0.1, sample_seconds=0.0062)
    assert fast[:BURST_STEPS] == slow[:BURST_STEPS] == list(range(BURST_STEPS))
    assert [step + 1 for step in fast[BURST_STEPS:]] == list(range(24, 2001, 4))
    assert [step + 1 for step in slow[BURST_STEPS:]] == list(range(24, 2001, 8))


def test_a_fixed_interval_begins_with_one_sample_on_one_process_and_on_several() -> None:
    taken = [
        sampled(OverheadAccount(100, 0.01, aligned=aligned), 350, step_seconds=0.1, sample_seconds=0.01)
        for aligned in (False, True)
    ]
    assert taken == [[0, 100, 200, 300], [0, 99, 199, 299]], "several ranks sample multiples of the interval"


def records(schedule: SamplingSchedule) -> Iterator[StepRecord]:
    """Yield steps of 0.1 s, of which a sample takes 10 ms on the training thread and 10 ms of the threads."""
    now, costs = 0.0, Costs()
    for number in itertools.count(1):
        record = StepRecord(number, now, schedule.due)
        yield record
        now += 0.1
        costs = Costs(costs.hooks + 1e-5, costs.samples + 0.01 * record.sampled, 0.002 * now, 0.01)
        schedule.ended(record, now, costs)


def test_what_a_sample_costs_the_threads_belongs_to_its_cost() -> None:
    taken = [
        record.sampled for record in itertools.islice(records(SamplingSchedule(OverheadAccount(None, 0.01))), 9000)
    ]
    assert sum(taken[1000:]) == pytest.approx(8000 * 0.01 * 0.1 / 0.02, rel=0.1)


def test_of_several_signs_of_trouble_in_a_row_the_first_is_sampled_and_a_worse_one() -> None:
    schedule = SamplingSchedule(OverheadAccount(1_000_000, 0.01))
    answers, forced = [], []
    for record in itertools.islice(records(schedule), 50):
        if record.step > 10:
            answers.append(schedule.alarm(record, set(), finite=record.step < 30))
            forced.append(record.sampled)
    assert [step for step, answer in enumerate(answers, start=11) if answer] == [11, 30]
    assert [step for step, sampled in enumerate(forced, start=11) if sampled] == [11, 30]


def test_a_step_that_is_not_finite_is_sampled_whatever_was_taken_before() -> None:
    schedule = SamplingSchedule(OverheadAccount(None, 0.01))
    forced = {True: 0, False: 0}
    for record in itertools.islice(records(schedule), 4000):
        if record.step > 100 and record.step % 2 and not record.sampled:
            finite = record.step % 8 != 1
            schedule.alarm(record, set(), finite=finite)
            forced[finite] += record.sampled
    assert forced[False] > 450
    assert forced[True] < 120, "signs of another kind are sampled as long as the reserve lasts"


def test_ranks_that_read_the_same_names_sample_the_same_steps() -> None:
    """A burst that begins within another is left out, and nobody asks while one is asked for or goes on."""
    schedule, asked = SamplingSchedule(OverheadAccount(10**6, 0.01, aligned=True)), list[int]()
    schedule.ask = asked.append
    taken = []
    for step in range(1, 201):
        if schedule.due:
            taken.append(step)
        if step in (40, 42, 50, 70):
            schedule.want_burst()
        if asked == [40 + AHEAD_STEPS] and step == 45:
            schedule.sample_from(asked[0])
            schedule.sample_from(asked[0] + 5)
        schedule.ended(StepRecord(step, 0.0, sampled=schedule.due), step * 0.1, Costs(samples=0.001 * len(taken)))
    assert asked == [40 + AHEAD_STEPS]
    assert taken[1:] == list(range(56, 76))
