"""The picture of what came out."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.ladder import METHODS, PLAIN, STABLE, Ladder, Method
from benchmarks.paper.training import Outcome

COLOURS: dict[str, tuple[float, float, float, float] | str] = {
    method.name: mpl.colormaps["viridis"](0.1 + 0.17 * index) for index, method in enumerate(METHODS[1:-1])
}
COLOURS |= {PLAIN.name: "crimson", METHODS[-1].name: "black"}


def draw(path: Path, ladders: Sequence[Ladder], dives: Mapping[tuple[float | None, int], Outcome]) -> None:
    """Draw the largest stable rates, the accuracies by rate, and the losses of the deep network."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    rates, accuracies, losses = figure.subplots(1, 3)
    _rates(rates, ladders)
    _accuracies(accuracies, ladders, max(ladder.batch for ladder in ladders))
    _losses(losses, dives)
    figure.savefig(path, dpi=110)


def _of(ladders: Sequence[Ladder], method: Method) -> dict[int, list[Ladder]]:
    own = sorted((ladder for ladder in ladders if ladder.method == method), key=lambda ladder: ladder.batch)
    return {batch: list(group) for batch, group in itertools.groupby(own, key=lambda ladder: ladder.batch)}


def _rates(axes: Axes, ladders: Sequence[Ladder]) -> None:
    for method in dict.fromkeys(ladder.method for ladder in ladders):
        points = {}
        for batch, own in _of(ladders, method).items():
            stable = [rate for ladder in own if (rate := ladder.largest(STABLE)) is not None]
            if stable:
                points[batch] = 2 ** statistics.fmean(stable)
        axes.plot(list(points), list(points.values()), "o-", color=COLOURS[method.name], label=method.name)
    axes.set(xscale="log", xlabel="batch size", ylabel="largest stable learning rate")
    axes.set_yscale("log", base=2)
    batches = sorted({ladder.batch for ladder in ladders})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.minorticks_off()
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))


def _accuracies(axes: Axes, ladders: Sequence[Ladder], batch: int) -> None:
    for method in dict.fromkeys(ladder.method for ladder in ladders):
        own = _of(ladders, method)[batch]
        exponents = sorted(set.union(*(set(ladder.accuracies) for ladder in own)))
        means = [statistics.fmean(ladder.accuracies.get(exponent, 0.0) for ladder in own) for exponent in exponents]
        axes.plot([2.0**exponent for exponent in exponents], means, "o-", color=COLOURS[method.name])
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"test accuracy, batch {batch} (0: diverged)")


def _losses(axes: Axes, dives: Mapping[tuple[float | None, int], Outcome]) -> None:
    for (clip, exponent), outcome in dives.items():
        name = PLAIN.name if clip is None else f"AGC {clip}"
        style = ["-", "--", "-.", ":"][sorted({rate for _, rate in dives}).index(exponent)]
        shown = [min(loss, 30.0) if math.isfinite(loss) else 30.0 for loss in outcome.losses]
        axes.plot(shown, style, color=COLOURS[name], label=f"{name}, learning rate {2.0**exponent:g}")
    axes.set(yscale="log", xlabel="step", ylabel="training loss, 1,000 layers")
    axes.legend(fontsize="x-small")
