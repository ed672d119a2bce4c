"""Rule "dead": parameters that get no gradient while others do."""

from dataclasses import dataclass

import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.history import IDLE_SHARE
from gradwatch_server.diagnosis.rule import AtLeastOne, Limits, Observation, Rule, Samples
from gradwatch_server.diagnosis.sample import Flags, Floats, Indices, any_in_set, largest_in_set

_FEWEST_UNITS = 16.0
"""In a layer with fewer units, nearly all of them may be silent by chance."""
_CRITICAL_SHARE = 1 / 3
"""Share of the weight matrices from which it is critical."""


class DeadLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters that get no gradient while others do."""

    cut_samples: Samples = 4
    """Samples in a row with a gradient of exactly zero, here and everywhere nearer to the input."""
    branch_samples: Samples = 12
    """The same beside the main path, or with a missing gradient: another optimizer or another task may step the
    parameter at every few steps."""
    patience: AtLeastOne = 4.0
    """A parameter may be quiet for this many times the longest quiet time that has ended: experts and rare heads set
    their own rhythm."""
    idle_samples: Samples = 5
    """Samples in a row at which 95% or more of a hidden layer's units have a gradient of exactly zero."""
    hold_samples: Samples = 1


@dataclass(frozen=True)
class _Dead:
    """The parameters that are dead or idle; all arrays have the shape (parameters,)."""

    cut: Flags
    """No gradient reaches this parameter or anything nearer to the input."""
    dead: Flags
    """The cut ones, and those beside the main path."""
    steady: Flags
    """The dead ones that were never quiet before. Others may be out of use, which is not critical."""
    idle: Flags
    samples: Floats
    """For how many samples."""
    limit: float


def _find(observation: Observation, limits: DeadLimits) -> Symptom | None:
    found = _search(observation, limits)
    if found is None:
        return None
    worst = _blame_order(observation, found)
    first, missing = observation.parameters.names[worst[0]], bool((found.dead & ~observation.profile.present).any())
    dead, idle = float(found.dead.sum()), float((found.idle & ~found.dead).sum())
    return Symptom(
        summary=_summary(int(dead), int(idle), first, missing=missing),
        cause=_cause(first, missing=missing),
        remedy=_remedy(first, missing=missing),
        first_step=observation.sample.step,
        blamed=observation.blame(worst, found.samples, found.limit),
        evidence={"dead_parameters": dead, "idle_parameters": idle, "samples": float(found.samples[worst].max())},
        critical=(missing or bool(found.cut.any())) and _is_most(observation, found.steady),
    )


def _is_most(observation: Observation, steady: Flags) -> bool:
    """Return whether enough of the weight matrices are dead for a critical alert."""
    matrices = observation.parameters.matrix & observation.parameters.trainable
    return float((steady & matrices).sum()) >= _CRITICAL_SHARE * float(matrices.sum())


def _search(observation: Observation, limits: DeadLimits) -> _Dead | None:
    parameters, profile = observation.parameters, observation.profile
    quiet, longest, idle = observation.quiet_times
    # 1. Rule out most samples at little cost. Where nothing is alive, nothing says that the others should be.
    idling = idle >= limits.idle_samples
    if not profile.alive.any() or (profile.all_alive and not idling.any()):
        return None
    candidates = _candidates(observation)
    if not candidates.any() and not idling.any():
        return None
    # 2. Find what has been quiet for longer than the limits, and than its own rhythm and that of its peers.
    rhythm = np.max([longest, *(largest_in_set(sets, longest) for sets in parameters.peers)], axis=0)
    patience = limits.patience * rhythm
    cut = candidates & (quiet >= np.maximum(limits.cut_samples, patience)) & profile.present
    if cut.any():
        cut &= _cut_off(observation)
    dead = cut | (candidates & (quiet >= np.maximum(limits.branch_samples, patience)))
    # 3. Find hidden layers with hardly a unit left.
    idling &= _may_idle(observation)
    chosen = dead | idling
    if not chosen.any():
        return None
    samples = np.maximum(quiet, idle).astype(np.float64)
    limit = float(quiet[chosen].min() or limits.idle_samples)
    return _Dead(cut, dead, dead & (rhythm == 0), idling, samples, limit)


def _candidates(observation: Observation) -> Flags:
    """Return which quiet parameters may be dead.

    A parameter of a module that is alive is not dead: a weight whose bias has a gradient only has an input of zero, so
    that something before it is dead; a bias whose weight has a gradient has none by nature, before a norm or as the key
    of an attention. Experts are dead only all together.
    """
    parameters, alive = observation.parameters, observation.profile.alive
    candidates = parameters.trainable & (parameters.elements > 0) & ~alive
    if not candidates.any():
        return candidates
    return candidates & ~any_in_set(parameters.modules, alive) & ~any_in_set(parameters.experts, alive)


def _cut_off(observation: Observation) -> Flags:
    """Return which parameters lie before every matrix that is alive; none if the gradient fades to zero on its way."""
    parameters, profile = observation.parameters, observation.profile
    living = parameters.matrices[profile.alive[parameters.matrices]]
    if not living.size:
        return np.ones(len(parameters.names), np.bool_)
    if profile.underflows(living):
        return np.zeros(len(parameters.names), np.bool_)
    before: Flags = parameters.depth < parameters.depth[living[0]]
    return before


def _may_idle(observation: Observation) -> Flags:
    """Return the hidden weight matrices, without embeddings.

    The last matrix is not among them: the loss may choose its rows, as with a sampled softmax or the actions of a
    policy.
    """
    parameters = observation.parameters
    hidden = observation.profile.finite & parameters.matrix & ~parameters.embedding & parameters.trainable
    hidden &= parameters.units >= _FEWEST_UNITS
    if parameters.matrices.size:
        hidden[parameters.matrices[-1]] = False
    return hidden


def _blame_order(observation: Observation, found: _Dead) -> Indices:
    """Return dead parameters before idle ones, both from output to input: faults near the output cause the others."""
    listed = observation.parameters.by_depth(found.dead | found.idle)[::-1]
    return listed[np.argsort(~found.dead[listed], kind="stable")]


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


RULE = Rule(
    name="dead",
    subject=Observation,
    limits=DeadLimits,
    find=_find,
    notes="""\
It is critical where a third of the weight matrices is dead.

Where samples lie apart, a weight that has not changed at all since the last one counts up to three times: it was quiet
at the steps between as well. One that has grown was trained between them. Experts (by their name, or because they take
turns with parameters whose names differ in one index only) go by the rhythm of their peers; experts by name are dead
only all together.

The rule leaves out:
- frozen parameters. The agent reads `requires_grad` with each sample, so that a parameter that is frozen midway is left
  alone from then on; its frozen time does not count once it is unfrozen;
- samples at which no parameter has a gradient;
- biases whose weight is alive (before a norm, attention keys);
- weights that change between samples;
- embeddings, and the rows of the last matrix;
- gradients that faded by 2.5 decades before they reached zero.
""",
)
