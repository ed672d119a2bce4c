"""The sampling schedule, with a hand-moved clock."""

import itertools

import pytest

from gradwatch.steps.schedule import BURST_STEPS, OverheadAccount


def sampled(
    account: OverheadAccount, steps: int, *, step_seconds: float, sample_seconds: float, rest_seconds: float = 0.0
) -> list[int]:
    """Return the steps that were sampled."""
    taken = []
    for step in range(steps):
        due = account.due(step + 1)
        cost = sample_seconds if due else rest_seconds
        account.stepped(step_seconds + cost, cost, 0.0, sampled=due)
        if due:
            taken.append(step)
    return taken


@pytest.mark.parametrize("sample_seconds", [1e-4, 1e-3, 1e-2])
def test_the_share_stays_within_the_budget(sample_seconds: float) -> None:
    account = OverheadAccount(None, 0.01)
    steps = 20_000
    taken = sampled(account, steps, step_seconds=0.1, sample_seconds=sample_seconds)
    assert len(taken) * sample_seconds <= 0.01 * steps * 0.1 + BURST_STEPS * sample_seconds
    assert len(taken) * sample_seconds >= 0.9 * min(0.01 * steps * 0.1, steps * sample_seconds)
    assert account.overhead_ratio <= 0.0125


def test_it_starts_with_a_burst() -> None:
    taken = sampled(OverheadAccount(None, 0.01), 200, step_seconds=0.1, sample_seconds=0.05)
    assert taken[:BURST_STEPS] == list(range(BURST_STEPS))
    assert len(taken) == BURST_STEPS


def test_a_sample_at_least_every_30_seconds() -> None:
    taken = sampled(OverheadAccount(None, 0.01, burst_steps=0), 1000, step_seconds=1.0, sample_seconds=100.0)
    gaps = [after - before for before, after in itertools.pairwise(taken)]
    assert set(gaps) == {31}


def test_trouble_brings_a_burst_but_not_for_ever() -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    sampled(account, 2000, step_seconds=0.1, sample_seconds=0.01)
    while not account.due(1):
        account.stepped(0.1, 0.0, 0.0, sampled=False)
    account.start_burst()
    burst = sampled(account, 50, step_seconds=0.1, sample_seconds=0.01)
    assert burst == list(range(BURST_STEPS))
    account.start_burst()
    assert sampled(account, 50, step_seconds=0.1, sample_seconds=0.01) == []


def test_a_fixed_interval_is_kept() -> None:
    assert sampled(OverheadAccount(4, 0.01), 13, step_seconds=0.1, sample_seconds=9.0) == [0, 4, 8, 12]


def test_a_long_pause_buys_nothing() -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    sampled(account, 100, step_seconds=0.1, sample_seconds=0.01)
    account.stepped(3600.0, 0.0, 0.0, sampled=False)
    taken = sampled(account, 100, step_seconds=0.1, sample_seconds=0.01)
    assert len(taken) <= 12


def test_the_time_of_other_threads_counts() -> None:
    account = OverheadAccount(None, 0.01, burst_steps=0)
    taken = 0
    for step in range(10_000):
        due = account.due(step + 1)
        taken += due
        account.stepped(0.1, 0.001 * due, 0.004 * due, sampled=due)
    assert taken * 0.005 <= 0.01 * 1000 + 0.005


def test_ranks_that_decide_for_themselves_sample_the_same_steps() -> None:
    fast = sampled(OverheadAccount(None, 0.01, aligned=True), 2000, step_seconds=0.1, sample_seconds=0.004)
    slow = sampled(OverheadAccount(None, 0.01, aligned=True), 2000, step_seconds=0.1, sample_seconds=0.0052)
    assert fast[:BURST_STEPS] == slow[:BURST_STEPS] == list(range(BURST_STEPS))
    assert [step + 1 for step in fast[BURST_STEPS:]] == list(range(24, 2001, 4))
    assert [step + 1 for step in slow[BURST_STEPS:]] == list(range(24, 2001, 8))
