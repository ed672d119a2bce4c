"""Scores the diagnosis, and the baselines, on the zoo: recall by rule, false alarms, delay and blame."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.zoo.baselines import NAMES
from benchmarks.zoo.case import Case

RULES = ("nonfinite", "dead", "vanishing", "exploding", "throttled", "unmoved", "slow")
LEAST_RECALL, LEAST_DEFAULT_RECALL = 0.95, 0.90
"""Of all sick runs, where a neighbouring rule that is also right counts; the second in the default setting."""
MOST_WARNINGS = 1 / 40
MOST_DELAY_SAMPLES = 5
LEAST_BLAME = 0.9


@dataclass(frozen=True)
class Alert:
    """One alert as the server tells of it."""

    rule: str
    severity: str
    fired_step: int
    fired_at: float
    """Unix seconds."""
    resolved_step: int | None
    blamed: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class Outcome:
    """One run of a case."""

    case: Case
    seed: int
    alerts: Sequence[Alert]
    label_holds: bool
    twin_holds: bool
    every: int | None = 1
    """Steps between samples; None: as the agent chooses."""
    onset_at: float = 0.0
    """Unix seconds at which the step of the onset began."""
    baselines: dict[str, list[int]] = field(default_factory=dict)

    @property
    def hit(self) -> Alert | None:
        """The first alert of the labelled rule at or after the onset."""
        return self._first_of([self.case.rule])

    @property
    def lenient_hit(self) -> Alert | None:
        """The first alert at or after the onset of the labelled rule or of another one that is also right."""
        return self._first_of(self.case.right_rules)

    def _first_of(self, rules: Sequence[str | None]) -> Alert | None:
        fitting = [alert for alert in self.alerts if alert.rule in rules and alert.fired_step >= self.case.onset]
        return min(fitting, key=lambda alert: alert.fired_step, default=None)

    @property
    def blame_right(self) -> bool:
        """Whether the first blamed parameter is one of those at fault."""
        return self.hit is not None and bool(self.hit.blamed) and self.case.blames(self.hit.blamed[0])

    def describe(self) -> str:
        """Return one line."""
        label = self.case.rule or "healthy"
        others = ", ".join(f"{alert.rule} {alert.severity} at {alert.fired_step}" for alert in self.alerts)
        proof = "" if self.label_holds and self.twin_holds else "  LABEL NOT PROVEN"
        if self.case.rule is None:
            said = f"ALARM {others}" if self.alerts else "quiet"
        elif self.hit is None:
            said = f"{'neighbour' if self.lenient_hit else 'MISSED'} ({others or 'quiet'})"
        else:
            wrong = "" if self.blame_right else "  WRONG BLAME"
            blamed = self.hit.blamed[0] if self.hit.blamed else "-"
            said = f"after {self.hit.fired_step - self.case.onset} steps, {blamed}{wrong}"
        return f"{label:10s} {self.case.name:28s} seed {self.seed}  {said}{proof}"


@dataclass(frozen=True)
class Score:
    """The figures that the bars are set for."""

    recall: dict[str, tuple[int, int]]
    lenient: tuple[int, int]
    """Sick runs with an alert of a right rule, and all sick runs."""
    every: int | None
    healthy: int
    criticals: int
    alarms: int
    delay_steps: float
    delay_seconds: float
    delay_samples: float
    """0 in the default setting, which has no fixed interval."""
    blame: float
    proven: bool
    baselines: dict[str, tuple[dict[str, tuple[int, int]], int]]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Score":
        """Count."""
        healthy = [outcome for outcome in outcomes if outcome.case.rule is None]
        sick = [outcome for outcome in outcomes if outcome.case.rule is not None]
        hits = [outcome for outcome in sick if outcome.hit is not None]
        delays = [outcome.hit.fired_step - outcome.case.onset for outcome in hits if outcome.hit is not None]
        seconds = [outcome.hit.fired_at - outcome.onset_at for outcome in hits if outcome.hit is not None]
        every = outcomes[0].every if outcomes else 1
        steps = statistics.median(delays) if delays else 0.0
        return cls(
            lenient=_share([outcome.lenient_hit is not None for outcome in sick]),
            every=every,
            recall={rule: _share([o.hit is not None for o in sick if o.case.rule == rule]) for rule in RULES},
            healthy=len(healthy),
            criticals=sum(any(alert.severity == "critical" for alert in o.alerts) for o in healthy),
            alarms=sum(bool(o.alerts) for o in healthy),
            delay_steps=steps,
            delay_seconds=statistics.median(seconds) if seconds else 0.0,
            delay_samples=steps / every if every else 0.0,
            blame=sum(o.blame_right for o in hits) / max(1, len(hits)),
            proven=all(o.label_holds and o.twin_holds for o in outcomes),
            baselines={name: _baseline(name, healthy, sick) for name in NAMES},
        )

    def failures(self) -> list[str]:
        """Return the bars that are missed, in words."""
        missed = []
        (found, total), least = self.lenient, LEAST_DEFAULT_RECALL if self.every is None else LEAST_RECALL
        if total and found / total < least:
            missed.append(f"{found} of {total} sick runs are found, the bar is {least:.0%}")
        if self.criticals:
            missed.append(f"{self.criticals} healthy runs have a critical alarm, the bar is none")
        if self.alarms > MOST_WARNINGS * self.healthy:
            missed.append(f"{self.alarms} of {self.healthy} healthy runs have an alarm, the bar is 1 in 40")
        if self.delay_samples > MOST_DELAY_SAMPLES:
            missed.append(f"the median delay is {self.delay_samples:g} samples, the bar is {MOST_DELAY_SAMPLES}")
        if self.blame < LEAST_BLAME:
            missed.append(f"blame is right in {self.blame:.0%}, the bar is {LEAST_BLAME:.0%}")
        if not self.proven:
            missed.append("a label is not proven by its outcome")
        return missed

    def table(self) -> str:
        """Return the table as Markdown."""
        columns = (
            "",
            *(f"recall {rule}" for rule in RULES),
            "strict",
            "lenient",
            "false alarms",
            "of them critical",
            "median delay",
            "blame",
        )
        ours = [
            "**gradwatch**",
            *(_fraction(self.recall[rule]) for rule in RULES),
            _fraction((sum(found for found, _ in self.recall.values()), self.lenient[1])),
            _fraction(self.lenient),
            f"{self.alarms}/{self.healthy}",
            f"{self.criticals}/{self.healthy}",
            f"{self.delay_steps:g} steps, {self.delay_seconds:.1f} s",
            f"{self.blame:.0%}",
        ]
        rows = [ours]
        for name, (recall, alarms) in self.baselines.items():
            hits = _fraction((sum(found for found, _ in recall.values()), self.lenient[1]))
            each = [_fraction(recall[rule]) for rule in RULES]
            rows.append([name, *each, "", hits, f"{alarms}/{self.healthy}", "", "", ""])
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(found: Sequence[bool]) -> tuple[int, int]:
    return sum(found), len(found)


def _fraction(share: tuple[int, int]) -> str:
    found, total = share
    return f"{found}/{total}" if total else "-"


def _baseline(name: str, healthy: Sequence[Outcome], sick: Sequence[Outcome]) -> tuple[dict[str, tuple[int, int]], int]:
    def hit(outcome: Outcome) -> bool:
        return any(step >= outcome.case.onset for step in outcome.baselines.get(name, []))

    recall = {rule: _share([hit(outcome) for outcome in sick if outcome.case.rule == rule]) for rule in RULES}
    return recall, sum(bool(outcome.baselines.get(name)) for outcome in healthy)
