"""The parts of a rule of the diagnosis: its name, limits, check, lines on charts and documentation.

Each module of ``rules`` exports one ``RULE``. The configuration, ``/metrics``, docs/diagnosis.md and the page know the
rules from that list: a new rule is one new module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Generic, Literal, NamedTuple, Self, TypeVar

import msgspec
import numpy as np

from gradwatch_server.diagnosis.finding import MOST_BLAMED, Blame, Blamed, Finding, Symptom
from gradwatch_server.diagnosis.history import History, QuietTimes
from gradwatch_server.diagnosis.quiet_times import quiet_times
from gradwatch_server.diagnosis.run_parameters import Floats, Indices, RunParameters
from gradwatch_server.diagnosis.sample import Profile, Sample
from gradwatch_server.diagnosis.slow_steps import SlowSteps, slow_steps
from gradwatch_server.diagnosis.still_times import StillTimes, still_times

Severity = Literal["warning", "critical"]
Samples = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Decades = Annotated[float, msgspec.Meta(ge=0.0, le=40.0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
AtLeastOne = Annotated[float, msgspec.Meta(ge=1.0)]
AboveOne = Annotated[float, msgspec.Meta(gt=1.0)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings that every rule has. A rule adds its own, each with a docstring for the documentation."""

    enabled: bool = True
    """Whether the rule is on."""
    highest_severity: Severity = "critical"
    """The rule never says more than this."""
    hold_samples: Samples = 3
    """Samples in a row at which it has to hold before it fires."""
    clear_samples: Samples = 5
    """Samples in a row without it that resolve it."""


@dataclass(frozen=True, eq=False)
class Observation:
    """One sample beside the run's parameters and history: everything that a rule looks at."""

    parameters: RunParameters
    history: History
    sample: Sample
    profile: Profile

    @classmethod
    def of(cls, parameters: RunParameters, history: History, sample: Sample) -> Self:
        """Return the observation of a sample that comes after this history."""
        return cls(parameters, history, sample, sample.profile(parameters, history.first_weights))

    @cached_property
    def quiet_times(self) -> QuietTimes:
        """For how long each parameter has been without a gradient, this sample included."""
        return quiet_times(self.parameters, self.history, self.sample, self.profile)

    @cached_property
    def still_times(self) -> StillTimes:
        """For how long each parameter has had a gradient and not moved, this sample included."""
        return still_times(self.history, self.sample, self.profile)

    @cached_property
    def slow_steps(self) -> SlowSteps | None:
        """Since when no weight matrix has moved by more than a millionth of itself in a step, this sample included."""
        history = self.history
        last = None if history.weights is None else (history.growths[-1][0], history.weights)
        return slow_steps(history.slow_steps, history.losses.now, last, self.sample, self.profile)

    @property
    def matrices_with_gradient(self) -> Indices:
        """Indices of trainable weight matrices with a gradient, embeddings too, from input to output."""
        return self.parameters.by_depth(self.parameters.matrix & self.parameters.trainable & self.profile.present)

    def blame(self, chosen: Indices, values: Floats, limit: float) -> Blamed:
        """Blame parameters, worst first, for values of shape (parameters,) that break a limit."""
        names = self.parameters.names
        listed = [Blame(names[index], float(values[index]), limit) for index in chosen[:MOST_BLAMED]]
        return Blamed(listed, max(0, len(chosen) - MOST_BLAMED))

    def blame_larger_half(self, values: Floats, limit: float) -> Blamed:
        """Blame the weight matrices with the larger half of the values, largest first."""
        order = self.profile.matrices[np.argsort(-np.nan_to_num(values[self.profile.matrices]), kind="stable")]
        return self.blame(order[: max(1, (len(order) + 1) // 2)], values, limit)


class ChartLimit(NamedTuple):
    """On which chart the limit of a blamed parameter is drawn, for findings that carry a piece of evidence."""

    evidence: str
    statistic: str
    of_rms: bool = False
    """True for the limit of a root mean square: on the chart of a norm it lies higher by the root of the elements."""


SubjectT = TypeVar("SubjectT")
LimitsT = TypeVar("LimitsT", bound=Limits)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule(Generic[SubjectT, LimitsT]):
    """One rule of the diagnosis."""

    name: str
    """The name of its module; in the configuration it is ``[rules.NAME]``."""
    subject: type[SubjectT]
    """What the rule looks at: ``Observation`` for one sample, or something that the server observes without samples."""
    limits: type[LimitsT]
    """Its limits, with their defaults."""
    find: Callable[[SubjectT, LimitsT], Symptom | None]
    """The check. It is pure, and does not ask whether the rule is enabled."""
    colour: str
    """Its colour on the boards, by Grafana's name; no other rule has it."""
    notes: str = ""
    """Markdown that follows the table of limits in docs/diagnosis.md."""
    inhibited_by: Sequence[str] = ()
    """Names of rules that tell the same better: while one fires for a run, nobody is notified of this one."""
    chart_limits: Sequence[ChartLimit] = ()

    def judge(self, subject: SubjectT, limits: LimitsT) -> Finding | None:
        """Return what the rule finds without regard to earlier findings, None if it finds nothing or is not enabled."""
        symptom = self.find(subject, limits)
        return None if symptom is None else self.report(symptom, limits)

    def report(self, symptom: Symptom, limits: LimitsT, since: Sequence[tuple[str, int]] = ()) -> Finding | None:
        """Return the finding of a symptom, None if the rule is not enabled.

        ``since`` holds (rule, step at which it began to hold) of each rule that held at the sample before.
        """
        if not limits.enabled:
            return None
        return Finding(
            rule=self.name,
            severity="critical" if symptom.critical and limits.highest_severity == "critical" else "warning",
            first_step=dict(since).get(self.name, symptom.first_step),
            parameters=list(symptom.blamed.parameters),
            left_out=symptom.blamed.left_out,
            evidence=dict(symptom.evidence),
            summary=symptom.summary,
            cause=symptom.cause,
            remedy=symptom.remedy,
            hold_samples=limits.hold_samples if symptom.hold_samples is None else symptom.hold_samples,
            clear_samples=limits.clear_samples,
        )
