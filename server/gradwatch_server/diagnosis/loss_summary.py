"""Losses between two samples, summed up where there are very many, so that nothing that a rule looks for is lost."""

import itertools
import math
from collections.abc import Sequence

from gradwatch_server.diagnosis.sample import median

MOST_LOSSES = 1_024
"""Losses between two samples that are handed to the rules as they are."""
_LATEST = 64
"""The latest losses, of which each is kept."""
_BUCKETS = 128
_AROUND = 4
"""Buckets before and after one that show what is usual there."""
_OUTLIERS = 3
"""Outliers of each bucket that are kept: so many in a row are no single one."""
_FAR = 10.0
"""Median deviations above the median from which a loss is an outlier, if it is twice as large as well."""

Loss = tuple[int, float]
"""Step and loss."""


def summed_up(losses: Sequence[Loss]) -> Sequence[Loss]:
    """Return at most ``MOST_LOSSES`` of some losses, by ascending steps: all of them if they are no more.

    Of more, the latest ones stay, and of the others two of each stretch of equally many steps, which leaves the course
    of the loss as it is; beside these the first and last that are not finite, and the largest that lie far above the
    rest. What was summed up before is summed up with what follows in the same way.
    """
    if len(losses) <= MOST_LOSSES:
        return losses
    earlier, latest = losses[:-_LATEST], losses[-_LATEST:]
    first = earlier[0][0]
    width = math.ceil((earlier[-1][0] + 1 - first) / _BUCKETS)
    buckets = [list(bucket) for _, bucket in itertools.groupby(earlier, key=lambda entry: (entry[0] - first) // width)]
    kept: list[Loss] = []
    for place, bucket in enumerate(buckets):
        around = itertools.chain(*buckets[max(place - _AROUND, 0) : place + _AROUND + 1])
        kept += _of_bucket(bucket, [loss for _, loss in around if math.isfinite(loss)])
    return [*kept, *latest]


def _of_bucket(losses: Sequence[Loss], around: Sequence[float]) -> list[Loss]:
    """Return the losses of one bucket that are kept, given the finite ones of the buckets around it."""
    bad = [entry for entry in losses if not math.isfinite(entry[1])]
    chosen = {losses[0], losses[-1], *bad[:1], *bad[-1:]}
    if around:
        level = median(around)
        far = max(_FAR * median([abs(value - level) for value in around]), abs(level))
        outliers = [entry for entry in losses if math.isfinite(entry[1]) and entry[1] - level > far]
        chosen.update(sorted(outliers, key=lambda entry: entry[1])[-_OUTLIERS:])
    return sorted(chosen, key=lambda entry: entry[0])
