"""A run that has stopped reporting."""

import math

from gradwatch_server.diagnosis.finding import Finding
from gradwatch_server.diagnosis.thresholds import Stalled

RULE = "stalled"


def find(
    last_seen_at: float, usual_interval_seconds: float | None, now: float, last_step: int, limits: Stalled
) -> Finding | None:
    """Look for a silence much longer than usual.

    Args:
        last_seen_at: when the run was last heard of, Unix seconds.
        usual_interval_seconds: the usual time between its samples; none: there was none yet, and the first one may
            take as long as ``intervals`` times ``least_seconds``.
        now: Unix seconds.
        last_step: the last step that was heard of.
        limits: the thresholds in force.
    """
    silence = now - last_seen_at
    usual = limits.least_seconds if usual_interval_seconds is None else usual_interval_seconds
    limit = max(limits.least_seconds, limits.intervals * usual)
    if not limits.enabled or silence <= limit:
        return None
    rhythm = (
        "there was none before"
        if usual_interval_seconds is None
        else f"usually there is one every {usual_interval_seconds:.3g} s"
    )
    return Finding(
        rule=RULE,
        severity=limits.severity(critical=False),
        first_step=last_step,
        parameters=[],
        evidence={
            "silence_seconds": silence,
            "limit_seconds": limit,
            "usual_interval_seconds": math.nan if usual_interval_seconds is None else usual_interval_seconds,
        },
        summary=f"No sample for {silence:.0f} s; {rhythm}",
        cause="The process has ended without saying so, hangs (a collective, a data loader), "
        "or does not reach this server.",
        remedy="Look at the job: py-spy dump --pid PID shows where it waits, NCCL_DEBUG=INFO collectives.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
