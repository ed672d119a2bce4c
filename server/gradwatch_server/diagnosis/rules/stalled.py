"""Rule "stalled": a run that has stopped reporting."""

import math
from dataclasses import dataclass
from typing import Annotated

import msgspec

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.rule import AtLeastOne, Limits, Rule, Samples, Severity


class StalledLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that has stopped reporting."""

    intervals: AtLeastOne = 20.0
    """So many usual intervals between samples have to pass without one."""
    least_seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 120.0
    """So much time has to pass in any case: evaluations and checkpoints take a while."""
    highest_severity: Severity = "warning"
    hold_samples: Samples = 1
    clear_samples: Samples = 1


@dataclass(frozen=True, kw_only=True)
class Silence:
    """The time since a run last reported."""

    last_seen_at: float
    """Unix seconds."""
    now: float
    """Unix seconds."""
    usual_interval_seconds: float | None
    """The usual time between samples; None before there were two."""
    last_step: int


def _find(silence: Silence, limits: StalledLimits) -> Symptom | None:
    """Look for a silence much longer than usual."""
    seconds, usual = silence.now - silence.last_seen_at, silence.usual_interval_seconds
    limit = max(limits.least_seconds, limits.intervals * (limits.least_seconds if usual is None else usual))
    if seconds <= limit:
        return None
    rhythm = "there was none before" if usual is None else f"usually there is one every {usual:.3g} s"
    return Symptom(
        summary=f"No sample for {seconds:.0f} s; {rhythm}",
        cause="The process has ended without saying so, hangs (a collective, a data loader), "
        "or does not reach this server.",
        remedy="Look at the job: py-spy dump --pid PID shows where it waits, NCCL_DEBUG=INFO collectives.",
        first_step=silence.last_step,
        evidence={
            "silence_seconds": seconds,
            "limit_seconds": limit,
            "usual_interval_seconds": math.nan if usual is None else usual,
        },
    )


RULE = Rule(
    name="stalled",
    subject=Silence,
    limits=StalledLimits,
    find=_find,
    colour="orange",
    notes="""\
The first sample, before which no interval is known, may take `intervals` times `least_seconds`: models are compiled.
The server checks once a second. The time in which it was itself down, asleep or without its database does not count. A
run that has finished never stalls, and the alert resolves when the run is heard of again. A run is `stalled` for
`GET /api/v1/runs`, `/metrics` and Grafana while this alert fires, and at no other time.
""",
)
