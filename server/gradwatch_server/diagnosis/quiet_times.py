"""For how long each parameter has been without a gradient while an optimizer held it."""

import numpy as np

from gradwatch.wire import MISSING
from gradwatch_server.diagnosis.history import IDLE_SHARE, Counts, History, QuietTimes
from gradwatch_server.diagnosis.run_parameters import Flags, RunParameters, any_in_set
from gradwatch_server.diagnosis.sample import Profile, Sample, extended

_MOST_QUIET_STEPS = 3
"""Most steps between two samples for which a parameter counts as quiet."""


def quiet_times(parameters: RunParameters, history: History, sample: Sample, profile: Profile) -> QuietTimes:
    """Return for how long each parameter has been without a gradient, this sample included.

    - A sample at which no parameter has a gradient does not count.
    - A parameter whose weight has changed since the last sample is not quiet: its module steps, but not at the sampled
      steps. This holds where the gradient is missing. If samples lie apart, it also holds for a parameter that never
      had a gradient at a sample and whose weight grew. (A weight that only follows momentum after its last gradient,
      or shrinks by weight decay, is not being trained.)
    - A parameter that no optimizer holds, or whose optimizer does not step, is used but not trained: it is not quiet.
    - A parameter whose weight has not changed at all between samples that lie apart was quiet at the steps between
      them, too: it counts up to three times.
    """
    size = len(parameters.names)
    quiet, longest = history.counts("quiet", size), history.counts("longest_quiet", size)
    idle, trained = history.counts("idle", size), history.counts("trained_steps", size)
    since = extended(history.loud_steps, size, history.began_at(sample))
    if not profile.nonzero.any():
        return QuietTimes(quiet, longest, idle, np.zeros(size, np.bool_), since, trained)
    loud = profile.nonzero
    if not profile.nonzero.all():
        loud, steps = _changes(parameters, history, sample, profile)
        longest = np.where(loud, np.maximum(longest, quiet), longest)
        # A frozen parameter is not quiet, nor one that no optimizer holds: its time would set a rhythm for later.
        counted = parameters.trainable & ~_unheld(history, sample, profile)
        quiet = np.where(loud | ~parameters.trainable, 0, np.where(counted, quiet + steps, quiet))
        since = np.where(~counted, sample.step, since)
    elif quiet.any():
        longest, quiet = np.maximum(longest, quiet), np.zeros_like(quiet)
    silent = sample.vector("zero_unit_share", size) >= IDLE_SHARE
    if silent.any() or idle.any():
        idle = np.where(profile.nonzero, np.where(silent, idle + 1, 0), idle)
    return QuietTimes(quiet, longest, idle, loud, np.where(loud, sample.step, since), trained)


def _unheld(history: History, sample: Sample, profile: Profile) -> Flags:
    """Return which parameters no optimizer has stepped at this sample, with a gradient or without.

    The agent reports a change of 0 of those that an optimizer holds and left alone. Where it never reports changes (of
    sharded parameters, for instance), every parameter counts as held.
    """
    if not history.knows_holders and "update_norm" not in sample.statistics:
        return np.zeros(len(profile.gradient), np.bool_)
    unheld: Flags = ~profile.present & (sample.vector("update_norm", len(profile.gradient)) == MISSING)
    return unheld


def _changes(parameters: RunParameters, history: History, sample: Sample, profile: Profile) -> tuple[Flags, Counts]:
    """Return which parameters are not quiet, and by how many samples the quiet time of the others grows."""
    size = len(parameters.names)
    before = extended(history.weights, size, np.nan)
    gap = sample.step - history.growths[-1][0] if history.growths else 1
    change, little = profile.weight - before, 1e-6 * before
    moved = np.where(profile.present, change, np.abs(change)) > little
    elsewhere = ~profile.present if gap == 1 else ~profile.present | ~extended(history.ever, size, False)
    loud = profile.nonzero | any_in_set(parameters.modules, moved & elsewhere)
    still = np.abs(change) <= little
    return loud, np.where(still, min(max(gap, 1), _MOST_QUIET_STEPS), 1)
