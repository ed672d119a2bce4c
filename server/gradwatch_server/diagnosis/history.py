"""The history of a run that the rules compare a sample with: bounded, and equal whether it was kept or replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch_server.diagnosis.sample import (
    Flags,
    Floats,
    Profile,
    RunParameters,
    Sample,
    any_in_set,
    extended,
    median,
)

VERSION: Final = 3
"""Version of ``History.to_bytes``. The history of a run that was stored in another version has to be replayed."""

HISTORY_SAMPLES = 64
FIRST_SAMPLES = 8
RECENT_SAMPLES = 5
LATELY_STEPS = 64
GROWTH_SAMPLES = 16
_SPREAD_OF_MAD = 1.4826
"""Standard deviations in a median absolute deviation of normal noise."""
_MOST_QUIET_STEPS = 3
"""Most steps between two samples for which a parameter counts as quiet."""
CLIPPED_SHARE = 0.95
"""Share of clipped units of a matrix from which the threshold, not the gradient, sets the length of its step."""
IDLE_SHARE = 0.95
"""Share of a parameter's units without a gradient from which it counts as idle."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LossHistory:
    """The course of the loss, which tells whether the run learns."""

    first: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()
    """The last few losses, infinity for one that was not finite."""
    lowest: float = math.inf
    """Smallest median of a few losses in a row."""
    lately: tuple[float, ...] = ()
    """The last medians of a few losses in a row, one for each step."""

    @cached_property
    def reference(self) -> float:
        """The loss at the beginning; NaN without any.

        It is the median of the first losses, but at most the very first: a divergence lifts the median.
        """
        return min(self.first[0], median(self.first)) if self.first else math.nan

    @cached_property
    def now(self) -> float:
        """Median of the last few losses; NaN without any."""
        return median(self.recent) if self.recent else math.nan

    @property
    def scale(self) -> float:
        """The unit in which a change of the loss is measured: its size at the beginning."""
        return max(abs(self.reference), 1e-12)

    def progress(self, loss: float | None = None) -> float:
        """Return how far the loss has come down, as a share of the loss at the beginning.

        The share is 1 for a loss of zero, negative for a loss that rose, and NaN where no loss is known.

        Args:
            loss: the loss now; by default the median of the last few.
        """
        loss = self.now if loss is None else loss
        return (self.reference - loss) / self.scale if self.first else math.nan

    def relapse(self, loss: float | None = None) -> float:
        """Return the share of the progress so far that is lost again; 0 if there was next to no progress.

        Args:
            loss: the loss now; by default the median of the last few.
        """
        loss = self.now if loss is None else loss
        made = self.reference - self.lowest
        if not self.first or not made > 0.1 * self.scale:
            return 0.0
        return (loss - self.lowest) / made

    def after(self, loss: float) -> "LossHistory":
        """Return the history with one more loss."""
        if math.isnan(loss):
            return self
        recent = (*self.recent, loss)[-RECENT_SAMPLES:]
        now = median(recent)
        return LossHistory(
            first=(*self.first, loss) if len(self.first) < FIRST_SAMPLES and math.isfinite(loss) else self.first,
            recent=recent,
            lowest=min(self.lowest, now) if len(recent) >= 3 else self.lowest,
            lately=(*self.lately, now)[-LATELY_STEPS:],
        )

    def risen(self, share: float, steps: int) -> bool:
        """Return whether the last ``steps`` medians all exceed the loss at the beginning by more than ``share`` of it.

        A loss that was zero or negative at the beginning never counts as risen: it does not measure how bad a run is.
        """
        if len(self.lately) < steps or not self.first or min(self.first) <= 0.0:
            return False
        return min(self.lately[-steps:]) > (1.0 + share) * self.reference


@dataclass(frozen=True, eq=False)
class History:
    """The history of a run's earlier samples for the rules; arrays have the shape (parameters,).

    Loss and size of the gradient
        losses, log_gradients, first_log_gradients: the first samples and the last ones.
    Weights
        first_weights, weights, growths: at the first sample, at the last one, and their growth in between.
    Parameters without a gradient
        quiet, longest_quiet, ever, idle: counted for each parameter.
    Clipping
        clipped_samples, unclipped_samples: how long it has decided everything, or nothing.
    """

    samples: int = 0
    losses: LossHistory = LossHistory()
    log_gradients: tuple[float, ...] = ()
    """log10 of the global gradient norm of the last 64 samples without a sign of an explosion: an explosion must not
    become usual."""
    first_log_gradients: tuple[float, ...] = ()
    growths: tuple[tuple[int, float], ...] = ()
    """(step, log10 of the typical growth of the weight matrices since the first sample) of the last few samples."""
    best_leverage: float = 0.0
    """The largest leverage that any weight matrix has had."""
    best_typical_leverage: float = 0.0
    """The largest leverage that half of the weight matrices have had."""
    suspect_since: int | None = None
    """Step since which every sample shows a sign of an explosion."""
    first_weights: Floats | None = None
    """Weight norms at the first sample."""
    log_usual: Floats | None = None
    """Smoothed log10 of each gradient; NaN for a parameter that never had a gradient."""
    quiet: Counts | None = None
    """Samples in a row without any gradient while other parameters had one."""
    longest_quiet: Counts | None = None
    """The longest such time that has ended."""
    ever: Flags | None = None
    """True where there was a gradient other than zero at some sample."""
    idle: Counts | None = None
    """Samples in a row at which nearly all units of a parameter had a zero gradient."""
    weights: Floats | None = None
    """Weight norms at the last sample."""
    clipped_samples: int = 0
    """Samples in a row at which nearly everything was clipped."""
    unclipped_samples: int = 0
    """Samples in a row at which clipping was on and clipped nothing."""
    since: tuple[tuple[str, int], ...] = ()
    """(rule, step at which it began to hold) of each rule that holds."""

    def began(self, rule: str, step: int) -> int:
        """Return the step at which a rule that holds at ``step`` began to hold."""
        return dict(self.since).get(rule, step)

    @property
    def every_steps(self) -> int:
        """Steps between the last two samples; 1 before there were two."""
        return self.growths[-1][0] - self.growths[-2][0] if len(self.growths) > 1 else 1

    @cached_property
    def usual_log_gradient(self) -> float:
        """The usual log10 of the global gradient norm: the larger of now and at the start; NaN without history."""
        if not self.log_gradients:
            return math.nan
        return max(median(self.log_gradients), median(self.first_log_gradients))

    @property
    def spread_log_gradient(self) -> float:
        """Robust standard deviation of log10 of the global gradient norm."""
        if len(self.log_gradients) < RECENT_SAMPLES:
            return 0.0
        history = np.array(self.log_gradients)
        return _SPREAD_OF_MAD * median(np.abs(history - median(history)))

    def counts(self, name: str, size: int) -> Counts:
        """Return a counter of each parameter, 0 for those that the run has appended."""
        return extended(getattr(self, name), size, 0)

    def after(
        self, sample: Sample, profile: Profile, quiet: "QuietTimes", rules: Sequence[str], *, suspect: bool
    ) -> "History":
        """Return the history with one more sample in it.

        Args:
            sample: the sample.
            profile: its profile.
            quiet: the quiet times, this sample included.
            rules: the names of the rules that hold at the sample.
            suspect: whether the sample shows a sign of an explosion.
        """
        calm = not suspect and profile.global_gradient > 0.0 and not profile.overflowed
        log_gradient = (math.log10(profile.global_gradient),) if calm else ()
        first = extended(self.first_weights, len(profile.weight), np.nan)
        new = np.isnan(first)
        typical = profile.typical_leverage
        return replace(
            self,
            **self._counts_after(sample, profile, quiet),
            samples=self.samples + 1,
            losses=self._losses_after(sample),
            log_gradients=(self.log_gradients + log_gradient)[-HISTORY_SAMPLES:],
            first_log_gradients=(self.first_log_gradients + log_gradient)[:FIRST_SAMPLES],
            growths=(*self.growths, (sample.step, profile.typical_growth))[-GROWTH_SAMPLES:],
            best_leverage=max(self.best_leverage, float(np.fmax.reduce(profile.leverages, initial=0.0))),
            best_typical_leverage=max(self.best_typical_leverage, 0.0 if math.isnan(typical) else typical),
            suspect_since=(sample.step if self.suspect_since is None else self.suspect_since) if suspect else None,
            first_weights=np.where(new, profile.weight, first) if new.any() else first,
            weights=profile.weight,
            log_usual=_smoothed(self.log_usual, profile),
            since=tuple((rule, self.began(rule, sample.step)) for rule in rules),
        )

    def _losses_after(self, sample: Sample) -> LossHistory:
        losses = self.losses
        for loss in sample.every_loss():
            losses = losses.after(loss if math.isfinite(loss) else math.inf)
        return losses

    def _counts_after(self, sample: Sample, profile: Profile, quiet: "QuietTimes") -> dict[str, Any]:
        """Return the fields that count samples in a row."""
        everything_clipped, nothing_clipped = _clipping(sample, profile)
        return {
            "quiet": quiet.quiet,
            "longest_quiet": quiet.longest,
            "ever": extended(self.ever, len(profile.gradient), False) | profile.nonzero,
            "idle": quiet.idle,
            "clipped_samples": self.clipped_samples + 1 if everything_clipped else 0,
            "unclipped_samples": self.unclipped_samples + 1 if nothing_clipped else 0,
        }

    def resumed(self) -> "History":
        """Return the history with which a new attempt starts: without what refers to steps, which it may repeat.

        The weights of the last sample are dropped, too: those of the new attempt come from a checkpoint.
        """
        losses = replace(self.losses, lately=())
        return replace(self, losses=losses, growths=(), suspect_since=None, weights=None, since=())

    def to_bytes(self) -> bytes:
        """Return the history as bytes that ``from_bytes`` reads."""
        content = {entry.name: _packed(getattr(self, entry.name)) for entry in fields(self)}
        return msgspec.msgpack.encode({"version": VERSION, **content})

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Return the history that ``to_bytes`` wrote.

        Raises:
            ValueError: another version wrote it; replay the stored samples instead.
        """
        content = msgspec.msgpack.decode(body)
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"history of version {version}, not {VERSION}: replay the run's samples")
        losses = content.pop("losses")
        unpacked = {name: _unpacked(value) for name, value in content.items()}
        return cls(losses=LossHistory(tuple(losses[0]), tuple(losses[1]), losses[2], tuple(losses[3])), **unpacked)


class QuietTimes(NamedTuple):
    """For how many samples each parameter has been without a gradient; all have the shape (parameters,)."""

    quiet: Counts
    longest: Counts
    """The longest such time that has ended."""
    idle: Counts
    """For how many samples nearly all units of the parameter have been without a gradient."""


def quiet_times(parameters: RunParameters, history: History, sample: Sample, profile: Profile) -> QuietTimes:
    """Return for how long each parameter has been without a gradient, this sample included.

    - A sample at which no parameter has a gradient does not count.
    - A parameter whose weight has changed since the last sample is not quiet: its module steps, but not at the sampled
      steps. This holds where the gradient is missing. If samples lie apart, it also holds for a parameter that never
      had a gradient at a sample and whose weight grew. (A weight that only follows momentum after its last gradient,
      or shrinks by weight decay, is not being trained.)
    - A parameter whose weight has not changed at all between samples that lie apart was quiet at the steps between
      them, too: it counts up to three times.
    """
    size = len(parameters.names)
    quiet, longest = history.counts("quiet", size), history.counts("longest_quiet", size)
    idle = history.counts("idle", size)
    if not profile.nonzero.any():
        return QuietTimes(quiet, longest, idle)
    if not profile.nonzero.all():
        loud, steps = _changes(parameters, history, sample, profile)
        longest = np.where(loud, np.maximum(longest, quiet), longest)
        # A frozen parameter is not quiet: its time would set a rhythm for later.
        quiet = np.where(loud | ~parameters.trainable, 0, quiet + steps)
    elif quiet.any():
        longest, quiet = np.maximum(longest, quiet), np.zeros_like(quiet)
    silent = sample.vector("zero_unit_share", size) >= IDLE_SHARE
    if silent.any() or idle.any():
        idle = np.where(profile.nonzero, np.where(silent, idle + 1, 0), idle)
    return QuietTimes(quiet, longest, idle)


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


def _clipping(sample: Sample, profile: Profile) -> tuple[bool, bool]:
    """Return whether adaptive clipping clipped nearly everything, and whether it was on and clipped nothing."""
    if "clipped_unit_share" not in sample.statistics:
        return False, False
    shares = sample.clipped_share(len(profile.gradient))
    all_shares, matrices = shares[shares >= 0.0], shares[profile.matrices]
    matrices = matrices[matrices >= 0.0]
    if matrices.size > 1 and matrices[-1] == 0.0:
        matrices = matrices[:-1]  # the classifier, which adaptive clipping leaves alone
    everything = bool(matrices.size) and median(matrices) >= CLIPPED_SHARE
    return everything, bool(all_shares.size) and float(all_shares.max()) == 0.0


def _smoothed(usual: Floats | None, profile: Profile) -> Floats:
    """Return the smoothed log10 of each gradient after a sample, which counts for a tenth."""
    known, everything = profile.alive, profile.all_alive
    now: Floats = np.log10(profile.gradient if everything else np.where(known, profile.gradient, 1.0))
    before = extended(usual, len(now), np.nan)
    fresh = 0.9 * before + 0.1 * now
    fresh = np.where(np.isnan(before), now, fresh)
    return fresh if everything else np.where(known, fresh, before)


_KINDS: Final[dict[str, type[Any]]] = {"f": np.float64, "i": np.int64, "b": np.bool_}


def _packed(value: Any) -> Any:
    if isinstance(value, LossHistory):
        return [value.first, value.recent, value.lowest, value.lately]
    if isinstance(value, np.ndarray):
        narrow = _narrowed(value)
        return {"type": narrow.dtype.str, "kind": value.dtype.kind, "data": narrow.tobytes()}
    return value


def _narrowed(vector: NDArray[Any]) -> NDArray[Any]:
    """Return a vector in the smallest type that holds it exactly: norms were measured in float32, counts are small."""
    if vector.dtype.kind == "i":
        return vector.astype(np.min_scalar_type(int(vector.max(initial=0))))
    if vector.dtype.kind != "f":
        return vector
    with np.errstate(over="ignore"):
        narrow = vector.astype(np.float32)
    return narrow if np.array_equal(narrow, vector, equal_nan=True) else vector


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return np.frombuffer(value["data"], value["type"]).astype(_KINDS[value["kind"]])
    if isinstance(value, list):
        return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
    return value
