"""A run that has stopped reporting."""

from gradwatch_server.diagnosis.finding import Finding
from gradwatch_server.diagnosis.thresholds import Stalled


def stalled(
    last_seen_at: float, usual_interval_seconds: float | None, now: float, last_step: int, limits: Stalled
) -> Finding | None:
    """Look for a silence much longer than usual.

    Args:
        last_seen_at: when the run was last heard of, Unix seconds.
        usual_interval_seconds: the usual time between its samples; none: not known yet.
        now: Unix seconds.
        last_step: the last step that was heard of.
        limits: the thresholds in force.
    """
    silence = now - last_seen_at
    limit = max(limits.least_seconds, limits.intervals * (usual_interval_seconds or 0.0))
    if not limits.enabled or silence <= limit:
        return None
    return Finding(
        rule="stalled",
        severity=limits.severity(critical=False),
        first_step=last_step,
        parameters=[],
        evidence={
            "silence_seconds": silence,
            "limit_seconds": limit,
            "usual_interval_seconds": usual_interval_seconds or 0.0,
        },
        summary=f"No sample for {silence:.0f} s; usually there is one every {usual_interval_seconds or 0.0:.3g} s",
        cause="The process has ended without saying so, hangs (a collective, a data loader), "
        "or does not reach this server.",
        remedy="Look at the job: py-spy dump --pid PID shows where it waits, NCCL_DEBUG=INFO collectives.",
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )
