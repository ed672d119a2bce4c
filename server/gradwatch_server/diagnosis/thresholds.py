"""The limits of the rules. Each has a default that docs/diagnosis.md explains; ``[rules.NAME]`` changes them."""

from typing import Any, Self

import msgspec


class Nonfinite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NaN or infinite gradients, weights or loss."""

    enabled: bool = True
    hold_samples: int = 1
    clear_samples: int = 5


class Exploding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients or weights that grow out of proportion."""

    enabled: bool = True
    ratio: float = 10.0
    """Gradient to weight ratio that half of the weight matrices exceed: such a step replaces the weights."""
    growth_decades: float = 2.0
    """Growth of the global gradient norm over the run's own median, in powers of ten."""
    growth_ratio: float = 0.3
    """The growth counts only where the whole gradient is at least this large beside the whole weight."""
    loss_growth: float = 3.0
    """Growth of the loss over its first values that, with a tenfold gradient, counts as divergence."""
    weight_growth: float = 10.0
    """Growth of half of the weight matrices since the first sample, while the loss has not fallen."""
    runaway_growth: float = 100.0
    """The same, whatever the loss does."""
    hold_samples: int = 3
    clear_samples: int = 10


class Vanishing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Gradients that fade from the output to the input, or everywhere, while the run does not learn."""

    enabled: bool = True
    layers: int = 5
    """Fewest layers over which a slope means anything."""
    attenuation_decades: float = 4.0
    """How far the gradient of the first third of the layers lies below that of the last third, in powers of ten."""
    critical_decades: float = 6.0
    order: float = 0.7
    """Least rank correlation of gradient and depth: fading is steady, a few small layers are not."""
    starved_ratio: float = 1e-6
    """Ratio under which no weight matrix moves; it counts only while the loss has not fallen."""
    hold_samples: int = 5
    clear_samples: int = 10


class Dead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters whose gradient is exactly zero while others learn."""

    enabled: bool = True
    zero_samples: int = 20
    """Samples in a row at which the gradient was exactly zero."""
    hold_samples: int = 1
    clear_samples: int = 3


class Thresholds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of all rules."""

    nonfinite: Nonfinite = Nonfinite()
    exploding: Exploding = Exploding()
    vanishing: Vanishing = Vanishing()
    dead: Dead = Dead()

    @classmethod
    def from_table(cls, table: dict[str, dict[str, Any]]) -> Self:
        """Return the limits with the changes of a configuration table.

        Raises:
            ValueError: a rule, a key or a value is not known; the text names it and where it stands.
        """
        try:
            return msgspec.convert(table, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"rules: {error}; docs/diagnosis.md lists rules and their keys") from None
