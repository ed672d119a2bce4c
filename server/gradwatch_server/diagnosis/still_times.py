"""For how long each parameter has had a gradient while its weight did not change."""

from typing import NamedTuple

import numpy as np

from gradwatch_server.diagnosis.history import Counts, History
from gradwatch_server.diagnosis.run_parameters import Floats
from gradwatch_server.diagnosis.sample import Profile, Sample, extended

_LEAST_RATIO = 1e-6
"""Ratio of gradient to weight below which plain SGD need not move a weight: such a gradient has faded."""


class StillTimes(NamedTuple):
    """For how long each parameter has not moved in spite of a gradient; all have the shape (parameters,)."""

    samples: Counts
    """Samples in a row. Those without a gradient neither count nor end them."""
    since: Counts
    """Step of the sample before the first of them."""
    update: Floats
    """The last change of a step that was measured since then; NaN where none was."""


def still_times(history: History, sample: Sample, profile: Profile) -> StillTimes:
    """Return for how long each parameter has not moved, this sample included.

    The norm of a weight, as the agent measured it before the step, is compared with that of the last sample: a weight
    that moves keeps its norm to the last bit at most by chance, or because something puts it back on a sphere.
    """
    size = len(profile.gradient)
    counts = history.counts("still", size)
    before = extended(history.weights, size, np.nan)
    last_step = history.growths[-1][0] if history.growths else sample.step
    same = (profile.weight == before) & (profile.weight > 0.0)
    if not same.any():
        return StillTimes(np.zeros_like(counts), np.full(size, sample.step), np.full(size, np.nan))
    asked = profile.unstepped | (profile.alive & (profile.ratio >= _LEAST_RATIO))
    samples = np.where(same, counts + asked, 0)
    since = np.where(counts > 0, extended(history.still_since, size, sample.step), last_step)
    known = np.where(counts > 0, extended(history.still_updates, size, np.nan), np.nan)
    update = np.where(asked & profile.present & (profile.update >= 0.0), profile.update, known)
    return StillTimes(samples, since, update)
