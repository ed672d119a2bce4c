"""Parameters that get no gradient while others learn."""

import numpy as np

from gradwatch_server.diagnosis.finding import Finding, blame
from gradwatch_server.diagnosis.history import IDLE_SHARE, Counts, History, QuietTimes
from gradwatch_server.diagnosis.sample import (
    TINY,
    Flags,
    Indices,
    Profile,
    RunParameters,
    Sample,
    any_of,
    largest_of,
    median,
)
from gradwatch_server.diagnosis.thresholds import Dead

_FADED_DECADES = 2.5
"""A gradient that has faded this far before it reaches zero has underflowed: that is vanishing, not death."""
_FEWEST_UNITS = 16.0
"""Below, nearly all units of a layer may be silent by chance."""
_GRAVE_SHARE = 1 / 3
"""Share of the weight matrices from which it is critical."""


def find(
    layout: RunParameters, memory: History, reading: Sample, profile: Profile, limits: Dead, times: QuietTimes
) -> Finding | None:
    """Look for gradients that have been exactly zero, or missing, for many samples in a row while others were not."""
    alive = profile.alive
    if not limits.enabled or not alive.any():
        return None
    quiet, longest, idle = times
    some_idle = bool(idle.max() >= limits.idle_samples)
    if profile.all_alive and not some_idle:
        return None
    candidates = layout.trainable & (layout.elements > 0) & ~alive
    if candidates.any():
        candidates &= ~_follows(layout, alive) & ~any_of(layout.choice, alive)
    elif not some_idle:
        return None
    rhythm = np.max([longest, *(largest_of(sets, longest) for sets in layout.peers)], axis=0)
    patience = limits.patience * rhythm
    cut = candidates & (quiet >= np.maximum(limits.cut_samples, patience)) & profile.present
    if cut.any():
        cut &= _cut_off(layout, profile, alive)
    branch = candidates & (quiet >= np.maximum(limits.branch_samples, patience))
    idling = _idling(layout, profile, idle, limits)
    dead = cut | branch
    chosen = dead | idling
    if not chosen.any():
        return None
    values = np.maximum(quiet, idle).astype(np.float64)
    worst = _origin_first(layout, chosen, dead)
    parameters, left_out = blame(layout.names, worst, values, float(quiet[chosen].min() or limits.idle_samples))
    missing = bool((dead & ~profile.present).any())
    matrices = layout.matrix & layout.trainable
    steady = dead & (rhythm == 0)  # what comes and goes may be out of use, which is no catastrophe
    grave = (missing or bool(cut.any())) and float((steady & matrices).sum()) >= _GRAVE_SHARE * float(matrices.sum())
    return Finding(
        rule="dead",
        severity=limits.severity(critical=grave),
        first_step=memory.began("dead", reading.step),
        parameters=parameters,
        left_out=left_out,
        evidence={
            "dead_parameters": float(dead.sum()),
            "idle_parameters": float((idling & ~dead).sum()),
            "samples": float(values[chosen].max()),
        },
        summary=_summary(int(dead.sum()), int((idling & ~dead).sum()), parameters[0].name, missing=missing),
        cause=_cause(parameters[0].name, missing=missing),
        remedy=_remedy(parameters[0].name, missing=missing),
        hold_samples=limits.hold_samples,
        clear_samples=limits.clear_samples,
    )


def _follows(layout: RunParameters, alive: Flags) -> Flags:
    """Return which quiet parameters belong to a module that is alive otherwise.

    A weight whose bias has a gradient only has an input of zero: what is dead lies before it. A bias whose weight has
    a gradient has none by nature: before a norm, or the key of an attention.
    """
    modules = np.zeros(int(layout.owners.max(initial=0)) + 1, np.bool_)
    modules[layout.owners[alive]] = True
    return modules[layout.owners]


def _cut_off(layout: RunParameters, profile: Profile, alive: Flags) -> Flags:
    """Return which parameters lie before every matrix that is alive, unless the gradient faded on its way there."""
    matrices = layout.order[(layout.matrix & layout.trainable & ~layout.lookup)[layout.order]]
    living = alive[matrices]
    if not living.any():
        return np.ones(len(layout.names), np.bool_)
    first = int(np.argmax(living))
    logs = np.log10(np.maximum(profile.rms[matrices[living]], TINY))
    faded = len(logs) >= 3 and median(logs[-max(1, len(logs) // 3) :]) - logs[0] > _FADED_DECADES
    before: Flags = layout.depth < layout.depth[matrices[first]]
    return before if not faded else np.zeros(len(layout.names), np.bool_)


def _idling(layout: RunParameters, profile: Profile, idle: Counts, limits: Dead) -> Flags:
    """Return which hidden weight matrices have hardly a unit with a gradient.

    Not the last one, whose rows may be chosen by the loss (sampled softmax, actions of a policy), nor embeddings.
    """
    idling = (idle >= limits.idle_samples) & profile.finite & layout.matrix & ~layout.lookup & layout.trainable
    idling &= layout.units >= _FEWEST_UNITS
    matrices = layout.order[(layout.matrix & layout.trainable & ~layout.lookup)[layout.order]]
    if matrices.size:
        idling[matrices[-1]] = False
    return idling


def _origin_first(layout: RunParameters, chosen: Flags, dead: Flags) -> Indices:
    """Return the chosen ones from output to input, the dead before the idle: what lies behind follows from it."""
    order = layout.order[::-1]
    listed = order[chosen[order]]
    return listed[np.argsort(~dead[listed], kind="stable")]


def _summary(dead: int, idle: int, first: str, *, missing: bool) -> str:
    kind = "no gradient at all" if missing else "a gradient of exactly zero"
    if not dead:
        where = first if idle == 1 else f"{idle} layers, {first} first"
        return f"{IDLE_SHARE:.0%} or more of the units have a gradient of exactly zero in {where}"
    named = first if dead == 1 else f"{dead} parameters, {first} first,"
    return f"{named} {'has' if dead == 1 else 'have'} had {kind} while others learn"


def _cause(first: str, *, missing: bool) -> str:
    if missing:
        return f"The loss does not depend on {first}: it is never called, or cut off by detach() or no_grad()."
    return f"Nothing flows back through {first}: its units never activate, or what it feeds is multiplied by zero."


def _remedy(first: str, *, missing: bool) -> str:
    if missing:
        return (
            f"Look behind {first} for detach(), .data, no_grad() or a branch that is not taken; what is meant to be "
            "frozen gets requires_grad_(False)."
        )
    module = first.rpartition(".")[0] or first
    return (
        f"Set the bias of {module} to 0 and lower the learning rate tenfold; torch.nn.LeakyReLU(0.01) or GELU "
        "instead of ReLU cannot die; start gates above 0."
    )
