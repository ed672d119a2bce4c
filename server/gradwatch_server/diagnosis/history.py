"""What is remembered of a run's earlier samples: bounded, and the same whether it was kept or replayed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch_server.diagnosis.finding import Finding
from gradwatch_server.diagnosis.sample import Flags, Floats, Profile, RunParameters, Sample, any_of, grown, median

VERSION: Final = 3
"""Version of ``to_bytes``; another one is refused, and the memory is to be replayed."""

HISTORY_SAMPLES = 64
FIRST_SAMPLES = 8
RECENT_SAMPLES = 5
LATELY_STEPS = 64
GROWTH_SAMPLES = 16
_SPREAD_OF_MAD = 1.4826
"""Standard deviations in a median absolute deviation of normal noise."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Losses:
    """How the loss has gone, and so whether the run learns."""

    first: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()
    """The last few, Inf where one was not finite."""
    lowest: float = math.inf
    """Least median of a few in a row."""
    lately: tuple[float, ...] = ()
    """The last medians of a few in a row, one a step."""

    @cached_property
    def reference(self) -> float:
        """Where the loss began; the first value alone where later ones are higher: a divergence lifts its median."""
        return min(self.first[0], median(self.first)) if self.first else math.nan

    @cached_property
    def now(self) -> float:
        """Median of the last few."""
        return median(self.recent) if self.recent else math.nan

    @property
    def scale(self) -> float:
        """What a change of the loss is measured by."""
        return max(abs(self.reference), 1e-12)

    def progress(self, loss: float | None = None) -> float:
        """Return how far the loss has come down, as a share of where it began: 1 is all the way to zero.

        Negative where it rose; NaN where no loss is known.
        """
        loss = self.now if loss is None else loss
        return (self.reference - loss) / self.scale if self.first else math.nan

    def relapse(self, loss: float | None = None) -> float:
        """Return the share of the progress made so far that is lost again; 0 where there was next to none."""
        loss = self.now if loss is None else loss
        made = self.reference - self.lowest
        if not self.first or not made > 0.1 * self.scale:
            return 0.0
        return (loss - self.lowest) / made

    def after(self, loss: float) -> "Losses":
        """Return the losses with one more."""
        if math.isnan(loss):
            return self
        recent = (*self.recent, loss)[-RECENT_SAMPLES:]
        now = median(recent)
        return Losses(
            first=(*self.first, loss) if len(self.first) < FIRST_SAMPLES and math.isfinite(loss) else self.first,
            recent=recent,
            lowest=min(self.lowest, now) if len(recent) >= 3 else self.lowest,
            lately=(*self.lately, now)[-LATELY_STEPS:],
        )

    def risen(self, share: float, steps: int) -> bool:
        """Return whether each of the last ``steps`` medians lies above where the loss began by this share of it.

        False for a loss that began at or below zero somewhere: it does not measure how bad the run is.
        """
        if len(self.lately) < steps or not self.first or min(self.first) <= 0.0:
            return False
        return min(self.lately[-steps:]) > (1.0 + share) * self.reference


@dataclass(frozen=True, eq=False)
class History:
    """A run's own history."""

    samples: int = 0
    losses: Losses = Losses()
    log_gradients: tuple[float, ...] = ()
    """log10 of the global gradient norm of up to 64 samples at which nothing exploded: an explosion does not become its
    own yardstick."""
    first_log_gradients: tuple[float, ...] = ()
    growths: tuple[tuple[int, float], ...] = ()
    """Step, and log10 of the typical growth of the weight matrices since the first sample, of the last few samples."""
    best_leverage: float = 0.0
    """The largest leverage that any weight matrix has had."""
    best_typical_leverage: float = 0.0
    """The largest leverage that half of the weight matrices have had."""
    suspect_since: int | None = None
    """Step of the first sign of an explosion that has not been taken back since."""
    first_weights: Floats | None = None
    """Weight norms at the first sample, shape (parameters,)."""
    log_usual: Floats | None = None
    """Smoothed log10 of each gradient, shape (parameters,); NaN where there was none yet."""
    quiet: Counts | None = None
    """For each parameter, samples in a row without any gradient while others had one, shape (parameters,)."""
    longest_quiet: Counts | None = None
    """The longest such time that has ended, shape (parameters,)."""
    ever: Flags | None = None
    """True where there was a gradient other than zero at some sample, shape (parameters,)."""
    idle: Counts | None = None
    """For each parameter, samples in a row at which nearly all of its units had a zero gradient."""
    weights: Floats | None = None
    """Weight norms at the last sample."""
    clipped_samples: int = 0
    """Samples in a row at which nearly everything was clipped."""
    unclipped_samples: int = 0
    """Samples in a row at which clipping was on and did nothing."""
    since: tuple[tuple[str, int], ...] = ()
    """The step at which each rule that holds began to hold."""

    def began(self, rule: str, step: int) -> int:
        """Return the step at which a rule began to hold that holds at ``step``."""
        return dict(self.since).get(rule, step)

    @property
    def every_steps(self) -> int:
        """Steps between the last two samples; 1 where there were none."""
        return self.growths[-1][0] - self.growths[-2][0] if len(self.growths) > 1 else 1

    @cached_property
    def usual_log_gradient(self) -> float:
        """The larger of what is usual now and what was usual at the start; NaN without history."""
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
        """Return one of the counters, grown to ``size``: a run may append parameters."""
        return grown(getattr(self, name), size, 0)

    def after(
        self,
        layout: RunParameters,
        reading: Sample,
        profile: Profile,
        findings: Sequence[Finding],
        quiet: "QuietTimes",
        *,
        suspect: bool,
    ) -> "History":
        """Return the memory with one more sample in it.

        Args:
            layout: the run's parameters.
            reading: the sample.
            profile: what the rules share of it.
            findings: what they found.
            quiet: what ``quiet_times`` says of it.
            suspect: whether there is a sign of an explosion at this sample.
        """
        calm = not suspect and profile.global_gradient > 0.0 and not profile.overflowed
        log_gradient = (math.log10(profile.global_gradient),) if calm else ()
        losses = self.losses
        for loss in reading.every_loss():
            losses = losses.after(loss if math.isfinite(loss) else math.inf)
        first = grown(self.first_weights, len(layout.names), np.nan)
        unknown = np.isnan(first)
        typical = profile.typical_leverage
        return replace(
            self,
            **self._quiet_after(layout, reading, profile, quiet),
            samples=self.samples + 1,
            losses=losses,
            log_gradients=(self.log_gradients + log_gradient)[-HISTORY_SAMPLES:],
            first_log_gradients=(self.first_log_gradients + log_gradient)[:FIRST_SAMPLES],
            growths=(*self.growths, (reading.step, profile.typical_growth))[-GROWTH_SAMPLES:],
            best_leverage=max(self.best_leverage, float(np.fmax.reduce(profile.leverages, initial=0.0))),
            best_typical_leverage=max(self.best_typical_leverage, 0.0 if math.isnan(typical) else typical),
            suspect_since=(reading.step if self.suspect_since is None else self.suspect_since) if suspect else None,
            first_weights=np.where(unknown, profile.weight, first) if unknown.any() else first,
            weights=profile.weight,
            log_usual=_smoothed(self.log_usual, profile),
            since=tuple((finding.rule, self.began(finding.rule, reading.step)) for finding in findings),
        )

    def _quiet_after(
        self, layout: RunParameters, reading: Sample, profile: Profile, times: "QuietTimes"
    ) -> dict[str, Any]:
        size = len(layout.names)
        quiet, longest, idle = times
        ever = grown(self.ever, size, False)
        decided = idle_clip = False
        if "clipped_unit_share" in reading.statistics:
            shares = reading.clipped_share(size)
            all_shares, matrices = shares[shares >= 0.0], shares[profile.matrices]
            matrices = matrices[matrices >= 0.0]
            if matrices.size > 1 and matrices[-1] == 0.0:
                matrices = matrices[:-1]  # the classifier, which adaptive clipping leaves alone
            decided = bool(matrices.size) and median(matrices) >= CLIPPED_SHARE
            idle_clip = bool(all_shares.size) and float(all_shares.max()) == 0.0
        return {
            "quiet": quiet,
            "longest_quiet": longest,
            "ever": ever | profile.stirred,
            "idle": idle,
            "clipped_samples": self.clipped_samples + 1 if decided else 0,
            "unclipped_samples": self.unclipped_samples + 1 if idle_clip else 0,
        }

    def resumed(self) -> "History":
        """Return what a new attempt starts with: the run's history, and what has lasted; nothing that names a step.

        Its weights come from a checkpoint: they did not change since the last sample, they are others.
        """
        losses = replace(self.losses, lately=())
        return replace(self, losses=losses, growths=(), suspect_since=None, weights=None, since=())

    def to_bytes(self) -> bytes:
        """Return the memory as bytes that ``from_bytes`` reads."""
        content = {entry.name: _packed(getattr(self, entry.name)) for entry in fields(self)}
        return msgspec.msgpack.encode({"version": VERSION, **content})

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Return the memory that ``to_bytes`` wrote.

        Raises:
            ValueError: it was written by another version; replay the stored samples instead.
        """
        content = msgspec.msgpack.decode(body)
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"memory of version {version}, not {VERSION}: replay the run's samples")
        losses = content.pop("losses")
        unpacked = {name: _unpacked(value) for name, value in content.items()}
        return cls(losses=Losses(tuple(losses[0]), tuple(losses[1]), losses[2], tuple(losses[3])), **unpacked)


class QuietTimes(NamedTuple):
    """For how many samples each parameter has been without a gradient, all of shape (parameters,)."""

    quiet: Counts
    longest: Counts
    """The longest such time that has ended."""
    idle: Counts
    """For how long nearly all of its units have been."""


def quiet_times(memory: History, layout: RunParameters, reading: Sample, profile: Profile) -> QuietTimes:
    """Return the times of each parameter, this sample included.

    A sample at which nothing had a gradient does not count. Nor is a parameter quiet that has no gradient at this
    sample but whose weight changed since the last: its module steps, only not at the sampled steps. Likewise one that
    never had a gradient at a sample and whose weight grew between samples that lie apart; where there was one before,
    momentum runs out, and weight decay shrinks. A weight that has not changed at all
    between samples that lie apart has been quiet for all steps between them, and counts up to three times.
    """
    size = len(layout.names)
    quiet, longest = memory.counts("quiet", size), memory.counts("longest_quiet", size)
    idle = memory.counts("idle", size)
    alive = profile.stirred
    if not alive.any():
        return QuietTimes(quiet, longest, idle)
    before = grown(memory.weights, size, np.nan)
    gap = reading.step - memory.growths[-1][0] if memory.growths else 1
    loud = alive
    if not alive.all():
        change, little = profile.weight - before, 1e-6 * before
        moved = np.where(profile.present, change, np.abs(change)) > little
        elsewhere = ~profile.present if gap == 1 else ~profile.present | ~grown(memory.ever, size, False)
        loud = alive | any_of(layout.owners, moved & elsewhere)
        still = np.abs(change) <= little
        steps = np.where(still, min(max(gap, 1), _MOST_STEPS), 1)
        longest = np.where(loud, np.maximum(longest, quiet), longest)
        quiet = np.where(loud | ~layout.trainable, 0, quiet + steps)  # a frozen one sets no rhythm for later
    elif quiet.any():
        longest, quiet = np.maximum(longest, quiet), np.zeros_like(quiet)
    silent = reading.vector("zero_unit_share", size) >= IDLE_SHARE
    if silent.any() or idle.any():
        idle = np.where(alive, np.where(silent, idle + 1, 0), idle)
    return QuietTimes(quiet, longest, idle)


_MOST_STEPS = 3
"""How many of the steps between two samples count, at most."""
CLIPPED_SHARE = 0.95
"""Share of a matrix's units that are clipped from which the threshold, not the gradient, decides its step."""
IDLE_SHARE = 0.95
"""Share of a parameter's units without a gradient from which it counts as idle."""


def _smoothed(usual: Floats | None, profile: Profile) -> Floats:
    """Return the smoothed log gradient of each parameter with this sample in it: a tenth of the way."""
    known, everything = profile.alive, profile.all_alive
    now: Floats = np.log10(profile.gradient if everything else np.where(known, profile.gradient, 1.0))
    before = grown(usual, len(now), np.nan)
    fresh = 0.9 * before + 0.1 * now
    fresh = np.where(np.isnan(before), now, fresh)
    return fresh if everything else np.where(known, fresh, before)


_KINDS: Final[dict[str, type[Any]]] = {"f": np.float64, "i": np.int64, "b": np.bool_}


def _packed(value: Any) -> Any:
    if isinstance(value, Losses):
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
