"""Rule "unmoved": parameters that are trainable, get gradients, and do not move."""

from dataclasses import dataclass

import numpy as np

from gradwatch_server.diagnosis.finding import Symptom
from gradwatch_server.diagnosis.rule import Limits, Observation, Positive, Rule, Samples, Share
from gradwatch_server.diagnosis.run_parameters import Flags, Indices
from gradwatch_server.diagnosis.sample import median

_NOTHING = 1e-6
"""Share of a gradient that clipping leaves from which nothing is left of it."""


class UnmovedLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters that are trainable, get gradients, and do not move."""

    still_samples: Samples = 5
    """Samples in a row with a gradient at which the weight is the same to the last bit."""
    whole_steps: Samples = 20
    """Where nothing of the network moves, its rate may begin at 0, or its optimizer sums up gradients: so many steps.
    What no optimizer steps is only a warning for as long: what is stepped by hand may keep its norm by chance."""
    rest_steps: Samples = 100
    """A part whose optimizer does not move it may wait for its turn at a rate of 0: so many steps. So may weights that
    are moved and put back: where all are kept on a sphere, the loss shows by then that they move."""
    put_back: Positive = 1e-4
    """Change of a step, as a share of the weight, from which a weight that stays the same was put back."""
    progress: Share = 0.1
    """Share of the first loss by which it has come down where weights on a sphere are trained."""
    critical_share: Share = 0.5
    """Share of the weight matrices from which it is critical."""
    hold_samples: Samples = 1


@dataclass(frozen=True)
class _Unmoved:
    """The parameters that do not move, shape (parameters,)."""

    unstepped: Flags
    """No optimizer steps them."""
    stuck: Flags
    """Their optimizer's step changed nothing."""
    put_back: Flags
    """Their optimizer's step changed them, and something undid it."""

    @property
    def all(self) -> Flags:
        return self.unstepped | self.stuck | self.put_back


def _find(observation: Observation, limits: UnmovedLimits) -> Symptom | None:
    times = observation.still_times
    if not (times.samples >= limits.still_samples).any():
        return None
    found = _search(observation, limits)
    if not found.all.any():
        return None
    matrices = observation.parameters.matrix & observation.parameters.trainable & ~observation.parameters.embedding
    worst = _blame_order(observation, found.all)
    cause, remedy = _explanation(observation, found)
    steps = observation.sample.step - times.since
    share = float((found.all & matrices).sum()) / max(float(matrices.sum()), 1.0)
    # An optimizer that was made for a part of the network may be meant so: a head first, and later the body.
    unintended = found.all if bool(found.unstepped[matrices].all()) else found.stuck | found.put_back
    unintended_share = float((unintended & matrices).sum()) / max(float(matrices.sum()), 1.0)
    return Symptom(
        summary=_summary(observation.parameters.names[worst[0]], len(worst), unstepped=bool(found.unstepped.any())),
        cause=cause,
        remedy=remedy,
        first_step=int(times.since[worst].min()),
        blamed=observation.blame(worst, times.samples.astype(np.float64), float(limits.still_samples)),
        evidence={
            "unmoved_parameters": float(len(worst)),
            "samples": float(times.samples[worst].max()),
            "matrix_share": share,
        },
        critical=unintended_share >= limits.critical_share and bool((steps[worst] >= limits.whole_steps).any()),
    )


def _search(observation: Observation, limits: UnmovedLimits) -> _Unmoved:
    parameters, profile, times = observation.parameters, observation.profile, observation.still_times
    still = parameters.trainable & (times.samples >= limits.still_samples)
    unstepped = still & profile.unstepped & ~_used_by_the_loss(observation)
    # 1. What an optimizer steps: weight matrices alone, since gains in low precision often stay as they are.
    matrices = parameters.matrix & parameters.trainable & ~parameters.embedding & (profile.weight > 0.0)
    active = matrices & profile.alive
    held = still & active
    stuck = held & (times.update == 0.0)
    put_back = held & (times.update >= limits.put_back * profile.weight)
    # 2. How long it may last: a part may wait for its turn, and a whole network for its first rate.
    steps = observation.sample.step - times.since
    whole = bool(active.any()) and bool((stuck[active]).all())
    stuck &= steps >= (limits.whole_steps if whole else limits.rest_steps)
    # 3. What is put back: everything, biases too, while nothing is learned.
    progress = observation.history.losses.progress(profile.loss)
    trained = parameters.trainable & profile.alive & (profile.weight > 0.0)
    everything = bool(put_back.any()) and bool((times.samples[trained] >= limits.still_samples).all())
    if not (everything and progress < limits.progress):
        put_back = np.zeros_like(put_back)
    put_back &= steps >= limits.rest_steps
    return _Unmoved(unstepped, stuck, put_back)


def _used_by_the_loss(observation: Observation) -> Flags:
    """Return the parts that no optimizer steps and that lie behind all that is stepped: networks that make the loss."""
    parameters, profile = observation.parameters, observation.profile
    stepped = parameters.matrix & parameters.trainable & profile.present
    deepest = int(parameters.depth[stepped].max(initial=-1))
    used = np.zeros(len(parameters.names), np.bool_)
    for part in set(parameters.parts[profile.unstepped].tolist()) - {-1}:
        members = (parameters.parts == part) & parameters.trainable
        if profile.unstepped[members].all() and int(parameters.depth[members].min()) > deepest >= 0:
            used |= members
    return used


def _blame_order(observation: Observation, flags: Flags) -> Indices:
    """Return the flagged parameters from input to output, weight matrices first."""
    listed = observation.parameters.by_depth(flags)
    return listed[np.argsort(~observation.parameters.matrix[listed], kind="stable")]


def _summary(first: str, count: int, *, unstepped: bool) -> str:
    named = first if count == 1 else f"{count} parameters, {first} first,"
    has = "has a gradient" if count == 1 else "have gradients"
    if unstepped:
        return f"{named} {has}, but no optimizer steps {'it' if count == 1 else 'them'}"
    return f"{named} {has} and {'does' if count == 1 else 'do'} not move"


def _explanation(observation: Observation, found: _Unmoved) -> tuple[str, str]:
    """Return the cause and the remedy."""
    rates = [rate for name, rate in observation.sample.scalars.items() if name.split(".")[0] == "learning_rate"]
    if found.unstepped.any():
        return (
            "The optimizer does not hold these parameters: it was made before the model had them, for a part of it, or "
            "over the tensors of another copy.",
            "Make the optimizer after the model is complete, with all of model.parameters(); what is meant to be "
            "frozen gets requires_grad_(False).",
        )
    if found.put_back.any():
        return (
            "The optimizer moves the weights, and before the next step they are again what they were: something loads "
            "or copies old values into the model.",
            "Look in the loop for load_state_dict, copy_ or an average that is copied back after each step.",
        )
    if rates and max(rates) == 0.0:
        moved = observation.profile.first_weight is not None and bool(
            (observation.profile.first_weight != observation.profile.weight)[found.stuck].any()
        )
        if moved:
            return "The learning rate is 0: its schedule has run out.", "Make the schedule as long as the training."
        return (
            "The learning rate is 0, and has been since the run began.",
            "Look at the schedule: an integer division, a warm-up that is never stepped, or a rate of 0.",
        )
    if _left_by_clipping(observation, found.stuck) < _NOTHING:
        return (
            "Clipping leaves nothing of the gradient that the optimizer could step with.",
            "Raise the threshold, and clip after scaler.unscale_(optimizer), once.",
        )
    if rates and min(rates) == 0.0:
        return (
            "The learning rate of a parameter group is 0.",
            "Give the group its rate; what is meant to be frozen gets requires_grad_(False).",
        )
    return (
        "The optimizer's update is smaller than half of the last digit of the weights, so that it is rounded away.",
        "Keep the weights in float32 (torch.autocast for the rest), or raise the learning rate.",
    )


def _left_by_clipping(observation: Observation, stuck: Flags) -> float:
    """Return the share of the gradient that clipping leaves, in the median over some parameters; 1 without clipping."""
    after = observation.sample.vector("clipped_grad_norm", len(stuck))
    known = stuck & (after >= 0.0)
    return median(after[known] / observation.profile.gradient[known]) if known.any() else 1.0


RULE = Rule(
    name="unmoved",
    subject=Observation,
    limits=UnmovedLimits,
    find=_find,
    colour="light-blue",
    notes="""\
It is critical where half of the weight matrices do not move. What no optimizer holds while another part is trained is a
warning however much it is: it may be meant so, such as a head that is trained before the body.

The agent tells of a parameter that has a gradient, but is in no optimizer. Where `attach` was not given the optimizers,
one that has not stepped yet may hold it, and the agent waits for 100 steps. What an optimizer steps does not move where
its weight keeps its norm to the last bit and its measured update is 0: the learning rate is 0, clipping leaves nothing,
or the update is rounded away. The cause names which. Weights that are moved and are the same again before the next step
are put back.

The rule leaves out:
- weights that change, whoever moves them: master weights, steps by hand;
- a part whose optimizer does not move it for fewer than `rest_steps`: a group that waits for its turn;
- a part that no optimizer steps and that lies behind all that is trained: a network that makes the loss;
- frozen parameters, weights of zero, gains and biases that an optimizer steps, embeddings;
- gradients below a millionth of the weight, which `vanishing` is about.
""",
)
