"""The parameters of the watched models: names, units, owners; walked once, not at every step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from gradwatch import wire
from gradwatch.norms import UnitShape

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
_PARALLEL = ("DistributedDataParallel", "DataParallel")


@dataclass(frozen=True, eq=False)
class Tracked:
    """One parameter that the agent watches."""

    name: str
    parameter: nn.Parameter
    unit: UnitShape
    kind: str

    def describe(self, depth: int) -> wire.Parameter:
        """Return what the server is told of it."""
        return wire.Parameter(
            name=self.name,
            shape=list(self.parameter.shape),
            dtype=str(self.parameter.dtype).removeprefix("torch."),
            depth=depth,
            units=self.unit.units,
            trainable=self.parameter.requires_grad,
            kind=self.kind,
        )


def catalogue(models: Sequence[nn.Module]) -> list[Tracked]:
    """Return every parameter once, in the order of registration; of several models under the model's own name.

    A tied parameter has the first of its names. What wrappers add to names (``torch.compile``, DDP, FSDP, activation
    checkpointing) is taken off.
    """
    prefixes = _prefixes(models)
    tracked: dict[int, Tracked] = {}
    for model, prefix in zip(models, prefixes, strict=True):
        for path, module in model.named_modules():
            transposed = isinstance(module, _ConvTransposeNd)
            for own, parameter in module.named_parameters(recurse=False):
                if id(parameter) in tracked:
                    continue
                name = prefix + plain_name(f"{path}.{own}" if path else own, model)
                unit = UnitShape.of(parameter.shape, transposed=transposed)
                tracked[id(parameter)] = Tracked(name, parameter, unit, type(module).__name__)
    return list(tracked.values())


def plain_name(name: str, model: nn.Module) -> str:
    """Return a qualified name without what wrappers added to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.") if type(model).__name__ in _PARALLEL else name


def _prefixes(models: Sequence[nn.Module]) -> list[str]:
    if len(models) == 1:
        return [""]
    kinds = [type(model).__name__ for model in models]
    return [
        f"{kind}." if kinds.count(kind) == 1 else f"{kind}{kinds[:index].count(kind)}."
        for index, kind in enumerate(kinds)
    ]
