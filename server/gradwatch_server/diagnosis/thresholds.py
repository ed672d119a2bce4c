"""The limits of the rules. Each has a default that docs/diagnosis.md explains; ``[rules.NAME]`` changes them."""

from typing import Annotated, Any, Literal, Self

import msgspec

Samples = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Decades = Annotated[float, msgspec.Meta(ge=0.0, le=40.0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every rule can be told."""

    enabled: bool = True
    highest_severity: Literal["warning", "critical"] = "critical"
    """The rule never says more than this."""
    hold_samples: Samples = 3
    """Samples in a row that it has to hold before it fires."""
    clear_samples: Samples = 5
    """Samples in a row without it that resolve it."""

    def severity(self, *, critical: bool) -> str:
        """Return how severe a finding is."""
        return "critical" if critical and self.highest_severity == "critical" else "warning"


class Nonfinite(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NaN or infinite gradients, weights or loss."""

    hold_samples: Samples = 1


class Exploding(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients or weights that grow out of proportion while the run does not learn."""

    growth_decades: Decades = 2.0
    """Growth of the global gradient norm over what is usual in this run, in powers of ten, with a loss above its
    beginning."""
    mild_growth_decades: Decades = 1.0
    """The same, where it lasts for ``mild_hold_samples``."""
    mild_hold_samples: Samples = 8
    growth_deviations: Positive = 5.0
    """The same in robust standard deviations of the run's own noise; both have to be exceeded."""
    growth_decades_alone: Decades = 2.5
    """The same where no loss is known."""
    leverage: Positive = 5.0
    """Leverage that half of the weight matrices exceed before anything is learned."""
    ratio: Positive = 5.0
    """Gradient to weight ratio that half of the weight matrices exceed before anything is learned; both are needed."""
    amplification_decades: Decades = 1.0
    """Growth of the gradient from the last layers to the first, in powers of ten, with the leverage above its limit."""
    swelling_decades: Decades = 4.0
    """Growth of the gradient of biases and gains from the last layers to the first, in powers of ten."""
    swelling_order: Share = 0.9
    """Least rank correlation of that growth with depth."""
    weight_growth: Annotated[float, msgspec.Meta(gt=1.0)] = 4.0
    """Growth of half of the weight matrices within ``weight_growth_steps``, while nothing is learned."""
    weight_growth_steps: Samples = 20
    runaway_growth: Annotated[float, msgspec.Meta(gt=1.0)] = 10.0
    """The same since the first sample, however long it took."""
    loss_rise: Positive = 2.0
    """Share of its beginning by which the loss of every step lies above it for ``loss_rise_steps``: three times it."""
    loss_rise_steps: Annotated[int, msgspec.Meta(ge=5, le=64)] = 20
    loss_surge_decades: Decades = 3.0
    """Height of the loss over its beginning, in powers of ten, for three steps in a row between two samples."""
    risen_growth: Annotated[float, msgspec.Meta(gt=1.0)] = 2.0
    """Growth of half of the weight matrices since the first sample that goes with it."""
    clear_samples: Samples = 10


class Vanishing(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients that fade from the output to the input, or everywhere, while the run does not learn."""

    layers: Annotated[int, msgspec.Meta(ge=3)] = 5
    """Fewest layers over which fading means anything."""
    attenuation_decades: Decades = 4.0
    """How far the gradient of the first third of the layers lies below that of the last third, in powers of ten."""
    stuck_decades: Decades = 3.0
    """The same where nothing is learned and the fading is as steady as ``stuck_order``."""
    stuck_order: Share = 0.9
    critical_decades: Decades = 6.0
    """From here on it is critical, whatever the loss does."""
    order: Share = 0.7
    """Least rank correlation of gradient and depth: fading is steady, a few small layers are not."""
    leverage: Positive = 1e-4
    """Leverage that no weight matrix exceeds: nothing that the optimizer could do to the weights moves the loss."""
    ratio: Positive = 1e-4
    """Gradient to weight ratio that no weight matrix exceeds; both are needed."""
    collapse_decades: Decades = 3.0
    """How far the leverage of half of the weight matrices lies below the largest, and below what it once was itself."""
    hold_samples: Samples = 4
    clear_samples: Samples = 10


class Dead(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters that get no gradient while others do."""

    cut_samples: Samples = 4
    """Samples in a row without a gradient, where everything nearer to the input has none either."""
    branch_samples: Samples = 12
    """The same for parameters beside the main path, and for gradients that are missing instead of zero."""
    patience: Annotated[float, msgspec.Meta(ge=1.0)] = 4.0
    """A parameter that has been quiet before may be quiet this many times as long."""
    idle_samples: Samples = 5
    """Samples in a row at which nearly all units of a layer have a zero gradient."""
    hold_samples: Samples = 1


class Throttled(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Clipping that decides every step, or that never does anything."""

    clipped_samples: Samples = 100
    """Samples in a row at which half of the weight matrices have nearly all units clipped, while nothing is learned."""
    learning_clipped_samples: Samples = 500
    """The same while the loss comes down: the threshold still sets the length of every step."""
    unclipped_samples: Samples = 1_000
    """Samples in a row at which adaptive clipping was on and clipped nothing."""
    highest_severity: Literal["warning", "critical"] = "warning"
    hold_samples: Samples = 1


class Stalled(Rule, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that has stopped reporting."""

    intervals: Annotated[float, msgspec.Meta(ge=1.0)] = 20.0
    """Usual intervals between samples without any."""
    least_seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 120.0
    """Never before this time: evaluations and checkpoints take a while."""
    highest_severity: Literal["warning", "critical"] = "warning"
    hold_samples: Samples = 1
    clear_samples: Samples = 1


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of all rules."""

    nonfinite: Nonfinite = Nonfinite()
    exploding: Exploding = Exploding()
    vanishing: Vanishing = Vanishing()
    dead: Dead = Dead()
    throttled: Throttled = Throttled()
    stalled: Stalled = Stalled()

    @classmethod
    def from_table(cls, table: dict[str, dict[str, Any]]) -> Self:
        """Return the limits with the changes of a configuration table.

        Raises:
            ValueError: a rule, a key or a value is not known; the text names it, its value and the way out.
        """
        for rule, changes in table.items():
            _check(cls, rule, changes)
        return msgspec.convert(table, cls)


def _check(thresholds: type[Thresholds], rule: str, changes: object) -> None:
    known = {field.name: field.type for field in msgspec.structs.fields(thresholds)}
    if rule not in known:
        raise ValueError(f"rules.{rule}: there is no such rule; the rules are {', '.join(sorted(known))}")
    if not isinstance(changes, dict):
        raise ValueError(  # noqa: TRY004  # everything wrong with a configuration is one kind of error
            f"rules.{rule} = {changes!r}: a table of thresholds, such as [rules.{rule}] enabled = false"
        )
    fields = {field.name: field for field in msgspec.structs.fields(known[rule])}
    for key, value in changes.items():
        if key not in fields:
            raise ValueError(f"rules.{rule}.{key}: there is no such key; the keys are {', '.join(sorted(fields))}")
        try:
            msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            detail = str(error)[:1].lower() + str(error)[1:]
            default = fields[key].default
            raise ValueError(f"rules.{rule}.{key} = {value!r}: {detail}; the default is {default!r}") from None
