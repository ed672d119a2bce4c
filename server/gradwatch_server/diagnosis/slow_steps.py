"""Since when no weight matrix of a run has moved by more than a millionth of itself in a step."""

import math
from typing import Final, NamedTuple

import numpy as np

from gradwatch_server.diagnosis.sample import Profile, Sample

SLOW: Final = 1e-6
"""Change of a weight matrix in one step, as a share of its norm, below which a run stands still for all purposes."""


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


def slow_steps(before: SlowSteps | None, usual_loss: float, sample: Sample, profile: Profile) -> SlowSteps | None:
    """Return the stretch with this sample in it, None where some weight matrix moves.

    A learning rate that rises begins it anew: a warm-up may start at next to nothing.

    Args:
        before: the stretch until the sample before.
        usual_loss: median of the last few losses before this sample; NaN without any.
        sample: the sample.
        profile: its profile.
    """
    members = profile.matrices
    measured = members[(profile.update[members] > 0.0) & (profile.weight[members] > 0.0)]
    if not measured.size:
        return before
    fastest = float(np.max(profile.update[measured] / profile.weight[measured]))
    if not fastest < SLOW:
        return None
    rates = [rate for name, rate in sample.scalars.items() if name.split(".")[0] == "learning_rate"]
    rate = max(rates, default=math.nan)
    if before is None or rate > before.rate:
        return SlowSteps(sample.step, rate, profile.loss if math.isnan(usual_loss) else usual_loss, fastest)
    return before._replace(fastest=max(before.fastest, fastest))
