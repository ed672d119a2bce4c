"""Rule "dead": parameters that get no gradient while others do."""

from dataclasses import dataclass

import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.history import IDLE_SHARE
from gradwatch_server.diagnosis.rule import AtLeastOne, Limits, Observation, Rule, Samples
from gradwatch_server.diagnosis.run_parameters import Flags, Floats, Indices, any_in_set, largest_in_set
from gradwatch_server.diagnosis.sample import extended

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
    rest_steps: Samples = 100
    """What has had no gradient since the run began may be meant to be trained later: it is dead after so many steps. A
    part beside the main path that was trained may rest for as many steps, or for as long as it was trained."""
    late_steps: Samples = 1_000
    """From then on it is critical if a part has never been trained; before, it is a warning."""
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
    """The dead ones that are surely not meant to rest: cut off midway, behind dead units, or never trained for long."""
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
    quiet, longest, idle = observation.quiet_times[:3]
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
    rested = _has_rested(observation, limits)
    ever = extended(observation.history.ever, len(parameters.names), False)
    together = candidates & ~any_in_set(parameters.experts, profile.alive)  # a single expert may wait for its turn
    cut = together & (quiet >= np.maximum(limits.cut_samples, patience)) & profile.present
    if cut.any():
        cut &= _cut_off(observation)
        cut &= ever | rested | _behind_dead_units(observation)
    front = together & (quiet >= np.maximum(limits.branch_samples, patience))
    front &= ever & (parameters.depth < _first_living_depth(observation))
    dead = cut | front | (candidates & rested & (quiet >= np.maximum(limits.branch_samples, patience)))
    # 3. Find hidden layers with hardly a unit left.
    idling &= _may_idle(observation)
    chosen = dead | idling
    if not chosen.any():
        return None
    samples = np.maximum(quiet, idle).astype(np.float64)
    limit = float(quiet[chosen].min() or limits.idle_samples)
    late = observation.sample.step - observation.quiet_times.loud_steps >= limits.late_steps
    steady = dead & (rhythm == 0) & (ever | late | (cut & _behind_dead_units(observation)))
    return _Dead(cut, dead, steady, idling, samples, limit)


def _has_rested(observation: Observation, limits: DeadLimits) -> Flags:
    """Return which parameters have been quiet for longer than a part rests that is trained later or by turns."""
    times = observation.quiet_times
    rest = observation.sample.step - times.loud_steps
    return rest > np.maximum(limits.rest_steps - 1, times.trained_steps)


def _behind_dead_units(observation: Observation) -> bool:
    """Return whether a living layer gets nothing but zeros: its bias has a gradient, its weight has none.

    Then units are dead. Otherwise the gradient ends between two layers, as where it is cut off or multiplied by zero.
    """
    parameters, profile = observation.parameters, observation.profile
    zero_weight = profile.zero & parameters.matrix & ~parameters.embedding
    return bool((zero_weight & any_in_set(parameters.modules, profile.alive & ~parameters.matrix)).any())


def _first_living_depth(observation: Observation) -> int:
    """Return the depth of the weight matrix nearest to the input that is alive; 0 if there is none."""
    living = observation.parameters.matrices[observation.profile.alive[observation.parameters.matrices]]
    return int(observation.parameters.depth[living[0]]) if living.size else 0


def _candidates(observation: Observation) -> Flags:
    """Return which quiet parameters may be dead.

    A parameter of a module that is alive is not dead: a weight whose bias has a gradient only has an input of zero, so
    that something before it is dead; a bias whose weight has a gradient has none by nature, before a norm or as the key
    of an attention.
    """
    parameters, alive = observation.parameters, observation.profile.alive
    candidates = parameters.trainable & (parameters.elements > 0) & ~alive
    if not candidates.any():
        return candidates
    return candidates & ~any_in_set(parameters.modules, alive)


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
    hidden &= parameters.layer
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
    colour="purple",
    notes="""\
It is critical where a third of the weight matrices is dead.

Between "unused so far" and "dead" lies rest. What has never had a gradient may be meant to be trained later (a head
first and then the body, an encoder under no_grad for the first updates, a loss that joins): it is dead after
`rest_steps`, and until `late_steps` that is a warning. What was trained and lies beside the main path may rest for as
long as it was trained (tasks that take turns by epochs). What is cut off midway, and what lies before dead units (a
layer whose weight gets no gradient while its bias does), is dead at once.

The agent tells which parameters an optimizer holds: `update_norm` is 0 where it stepped without a gradient for them.
What no optimizer steps is only used by the training, as a target network, an averaged model, a teacher or a loss
network, or not trained yet: it is not dead. Of sharded parameters the agent does not tell it, and all count as held.

Where samples lie apart, a weight that has not changed at all since the last one counts up to three times: it was quiet
at the steps between as well. One that has grown was trained between them. Experts (because they take turns with
parameters whose names differ in one index only) go by the rhythm of their peers.

The rule leaves out:
- frozen parameters. The agent reads `requires_grad` with each sample, so that a parameter that is frozen midway is left
  alone from then on; its frozen time does not count once it is unfrozen;
- samples at which no parameter has a gradient;
- biases whose weight is alive (before a norm, attention keys, the last layer of a critic);
- weights that change between samples;
- embeddings, raw tables of features, and the rows of the last matrix;
- gradients that faded by 2.5 decades before they reached zero.
""",
)
