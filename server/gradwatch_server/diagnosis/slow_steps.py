"""Since when no weight matrix of a run has moved by more than a millionth of itself in a step."""

import math
from typing import Final, NamedTuple

import numpy as np

from gradwatch_server.diagnosis.run_parameters import Floats
from gradwatch_server.diagnosis.sample import Profile, Sample

SLOW: Final = 1e-6
"""Change of a weight matrix in one step, as a share of its norm, below which a run stands still for all purposes."""
_NORM_ERROR: Final = 1e-5
"""Relative error of a norm: a smaller difference of two shows no change."""


class SlowSteps(NamedTuple):
    """A stretch of samples at which every change that was measured lay below ``SLOW``."""

    since: int
    """Step of its first sample."""
    rate: float
    """The largest learning rate then; NaN where none is known."""
    loss: float
    """The loss then; NaN where none is known."""
    fastest: float
    """The largest change of a weight matrix in one step since then, as a share of its norm."""


def slow_steps(
    before: SlowSteps | None, usual_loss: float, last: tuple[int, Floats] | None, sample: Sample, profile: Profile
) -> SlowSteps | None:
    """Return the stretch with this sample in it, None where some weight matrix moves.

    A learning rate that rises begins it anew: a warm-up may start at next to nothing. So does a norm that has changed
    since the sample before by more than slow steps could: not every change is measured at each sample.

    Args:
        before: the stretch until the sample before.
        usual_loss: median of the last few losses before this sample; NaN without any.
        last: step and weight norms, shape (parameters,), of the sample before; None where there is none.
        sample: the sample.
        profile: its profile.
    """
    rates = [rate for name, rate in sample.scalars.items() if name.split(".")[0] == "learning_rate"]
    rate = max(rates, default=math.nan)
    if before is not None and (rate > before.rate or _has_moved(last, sample, profile)):
        before = None
    members = profile.matrices
    measured = members[(profile.update[members] > 0.0) & (profile.weight[members] > 0.0)]
    if not measured.size:
        return before
    fastest = float(np.max(profile.update[measured] / profile.weight[measured]))
    if not fastest < SLOW:
        return None
    if before is None:
        return SlowSteps(sample.step, rate, profile.loss if math.isnan(usual_loss) else usual_loss, fastest)
    return before._replace(fastest=max(before.fastest, fastest))


def _has_moved(last: tuple[int, Floats] | None, sample: Sample, profile: Profile) -> bool:
    """Return whether the norm of a weight matrix has changed by more than slow steps since the sample before could."""
    if last is None:
        return False
    step, weights = last
    members = profile.matrices[profile.matrices < len(weights)]
    change = np.abs(profile.weight[members] - weights[members]) / weights[members]
    return bool(np.any(change > SLOW * (sample.step - step) + _NORM_ERROR))
