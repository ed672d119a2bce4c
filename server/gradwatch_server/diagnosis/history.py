"""The history of a run that the rules compare a sample with: bounded, and equal whether it was kept or replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch_server.diagnosis.loss_history import FIRST_SAMPLES, RECENT_SAMPLES, LossHistory
from gradwatch_server.diagnosis.run_parameters import Flags, Floats
from gradwatch_server.diagnosis.sample import Profile, Sample, extended, median
from gradwatch_server.diagnosis.slow_steps import SlowSteps

VERSION: Final = 7
"""Version of ``History.to_bytes``. The history of a run that was stored in another version has to be replayed."""

HISTORY_SAMPLES = 64
GROWTH_SAMPLES = 16
_SPREAD_OF_MAD = 1.4826
"""Standard deviations in a median absolute deviation of normal noise."""
OVERSHOOT = 0.6
"""Change of the typical weight matrix in one step, or growth within a few, as a share of the weight."""
OVERSHOOT_STEPS = 20
"""Steps within which that growth counts; where samples lie further apart, since the last one."""
_RISEN = 2.0
"""Growth of the loss over its beginning, as a share, from which it counts as risen."""
CLIPPED_SHARE = 0.95
"""Share of clipped units of a matrix from which the threshold, not the gradient, sets the length of its step."""
IDLE_SHARE = 0.95
"""Share of a parameter's units without a gradient from which it counts as idle."""

Counts = NDArray[np.int64]


class QuietTimes(NamedTuple):
    """For how many samples each parameter has been without a gradient; all have the shape (parameters,)."""

    quiet: Counts
    longest: Counts
    """The longest such time that has ended."""
    idle: Counts
    """For how many samples nearly all units of the parameter have been without a gradient."""
    loud: Flags
    """True where the parameter is not quiet at this sample."""
    loud_steps: Counts
    """Step of the last sample at which it was not quiet; the attempt's first step before that."""
    trained_steps: Counts
    """Steps from the first sample to the last one before this at which it was not quiet."""


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
    losses: LossHistory = field(default_factory=LossHistory)
    log_gradients: tuple[float, ...] = ()
    """log10 of the global gradient norm of the last 64 samples without a sign of an explosion: an explosion must not
    become usual."""
    first_log_gradients: tuple[float, ...] = ()
    growths: tuple[tuple[int, float], ...] = ()
    """(step, log10 of the typical growth of the weight matrices since the first sample) of the last few samples."""
    proportionate: bool = False
    """Whether the gradients of some sample were in proportion to weights and loss."""
    before_rise: tuple[int, float] | None = None
    """(step, log10 of the typical growth of the weight matrices) of the last sample before the loss had risen; the
    attempt's first sample if it had by then."""
    slow_steps: SlowSteps | None = None
    """Since when no weight matrix has moved by more than a millionth of itself in a step; None where some do."""
    overshot_step: int | None = None
    """Step of the last sample at which the weights moved out of proportion to themselves."""
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
    loud_steps: Counts | None = None
    """Step of the last sample at which each parameter had a gradient other than zero; the first step before that."""
    trained_steps: Counts | None = None
    """Steps between the first sample and the last one at which each parameter had a gradient other than zero."""
    first_step: int | None = None
    """Step of the attempt's first sample."""
    knows_holders: bool = False
    """Whether the agent tells which parameters an optimizer holds without a gradient for them."""
    still: Counts | None = None
    """Samples in a row at which each parameter had a gradient and its weight had not changed."""
    still_since: Counts | None = None
    """Step of the sample before them."""
    still_updates: Floats | None = None
    """The last change of a step that was measured since then; NaN where none was."""
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
        self,
        sample: Sample,
        profile: Profile,
        quiet: QuietTimes,
        still: tuple[Counts, Counts, Floats],
        slow: SlowSteps | None,
        rules: Sequence[str],
        *,
        suspect: bool,
    ) -> "History":
        """Return the history with one more sample in it.

        Args:
            sample: the sample.
            profile: its profile.
            quiet: the quiet times, this sample included.
            still: for how long each parameter has not moved, this sample included.
            slow: since when no weight matrix has moved, this sample included.
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
            still=still[0],
            still_since=still[1],
            still_updates=still[2],
            samples=self.samples + 1,
            losses=self._losses_after(sample),
            log_gradients=(self.log_gradients + log_gradient)[-HISTORY_SAMPLES:],
            first_log_gradients=(self.first_log_gradients + log_gradient)[:FIRST_SAMPLES],
            growths=(*self.growths, (sample.step, profile.typical_growth))[-GROWTH_SAMPLES:],
            proportionate=self.proportionate or profile.in_proportion,
            before_rise=self._before_rise(sample, profile),
            slow_steps=slow,
            overshot_step=sample.step if self.overshoots(sample.step, profile) else self.overshot_step,
            best_leverage=max(self.best_leverage, float(np.fmax.reduce(profile.leverages, initial=0.0))),
            best_typical_leverage=max(self.best_typical_leverage, 0.0 if math.isnan(typical) else typical),
            suspect_since=(sample.step if self.suspect_since is None else self.suspect_since) if suspect else None,
            first_weights=np.where(new, profile.weight, first) if new.any() else first,
            weights=profile.weight,
            log_usual=_smoothed(self.log_usual, profile),
            since=tuple((rule, self.began(rule, sample.step)) for rule in rules),
        )

    def _before_rise(self, sample: Sample, profile: Profile) -> tuple[int, float]:
        """Return where the weights stood before the loss had risen, this sample included."""
        has_risen = self.losses.progress(profile.loss) < -_RISEN
        return self.before_rise if has_risen and self.before_rise else (sample.step, profile.typical_growth)

    def _losses_after(self, sample: Sample) -> LossHistory:
        losses = self.losses
        for loss in sample.every_loss():
            losses = losses.after(loss if math.isfinite(loss) else math.inf)
        return losses

    def _counts_after(self, sample: Sample, profile: Profile, quiet: QuietTimes) -> dict[str, Any]:
        """Return the fields that count samples in a row."""
        everything_clipped, nothing_clipped = _clipping(sample, profile)
        return {
            "quiet": quiet.quiet,
            "longest_quiet": quiet.longest,
            "ever": extended(self.ever, len(profile.gradient), False) | profile.nonzero,
            "loud_steps": quiet.loud_steps,
            "trained_steps": np.where(quiet.loud, quiet.loud_steps - self.began_at(sample), quiet.trained_steps),
            "first_step": self.began_at(sample),
            "knows_holders": self.knows_holders or "update_norm" in sample.statistics,
            "idle": quiet.idle,
            "clipped_samples": self.clipped_samples + 1 if everything_clipped else 0,
            "unclipped_samples": self.unclipped_samples + 1 if nothing_clipped else 0,
        }

    def overshoots(self, step: int, profile: Profile) -> bool:
        """Return whether the weights have moved out of proportion to themselves in the last few steps."""
        oldest = min(step - OVERSHOOT_STEPS, self.growths[-1][0] if self.growths else step)
        earlier = min((growth for at, growth in self.growths if at >= oldest), default=profile.typical_growth)
        return profile.typical_update >= OVERSHOOT or profile.typical_growth - earlier >= math.log10(1 + OVERSHOOT)

    def weights_follow(self, step: int, profile: Profile) -> bool:
        """Return whether weights have moved out of proportion lately, or grown far beyond what they ought to be.

        A loss that joins, switches or is summed over more multiplies loss and gradient alike, and the weights go on as
        before. Where no loss is known, the gradient alone decides.
        """
        if math.isnan(profile.loss) and not self.losses.first:
            return True
        since = self.growths[0][0] if self.growths else step
        lately = self.overshot_step is not None and self.overshot_step >= since
        return lately or self.overshoots(step, profile) or profile.overflowed or self.grew_with_the_loss(step, profile)

    def grew_with_the_loss(self, step: int, profile: Profile) -> bool:
        """Return whether half of the weight matrices have grown since the loss rose, faster than they did before.

        Training makes weights grow at its own pace, many times over where they began small, and a loss that is summed
        over episodes rises meanwhile: so the pace until the rise is taken off.
        """
        if self.before_rise is None:
            return False
        at, growth = self.before_rise
        before = max(at - (at if self.first_step is None else self.first_step), 0)
        pace = max(growth, 0.0) / before if before else 0.0
        return profile.typical_growth - growth - pace * (step - at) >= math.log10(1 + OVERSHOOT)

    def began_at(self, sample: Sample) -> int:
        """Return the step of the attempt's first sample, which may be this one."""
        return sample.step if self.first_step is None else self.first_step

    def resumed(self) -> "History":
        """Return the history with which a new attempt starts: without what refers to steps, which it may repeat.

        The weights of the last sample are dropped, too: those of the new attempt come from a checkpoint.
        """
        losses = replace(self.losses, lately=())
        return replace(
            self,
            losses=losses,
            growths=(),
            suspect_since=None,
            before_rise=None,
            slow_steps=None,
            overshot_step=None,
            weights=None,
            since=(),
            first_step=None,
            loud_steps=None,
        )

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
        losses, stretch = content.pop("losses"), content.pop("slow_steps")
        unpacked = {name: _unpacked(value) for name, value in content.items()}
        return cls(
            losses=LossHistory(tuple(losses[0]), tuple(losses[1]), losses[2], tuple(losses[3])),
            slow_steps=None if stretch is None else SlowSteps(*stretch),
            **unpacked,
        )


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
