"""Parameters that cannot be measured: quantised ones, tensor subclasses, layouts and types that few operators know.

Such a parameter is named once in an event, and all others are measured and clipped as ever.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from gradwatch import wire

from .conftest import Server
from .truth import norm
from .watching import watch


class Int8(torch.Tensor):
    """Rows of 8-bit integers with one scale each; it knows few operators, as quantised weights do."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor, requires_grad: bool = False) -> "Int8":
        made: Int8 = torch.Tensor._make_wrapper_subclass(
            cls, rows.shape, dtype=torch.float32, requires_grad=requires_grad
        )
        return made

    def __init__(self, rows: Tensor, scale: Tensor, requires_grad: bool = False) -> None:
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, dense: Tensor) -> "Int8":
        scale = dense.detach().abs().amax(1, keepdim=True) / 127
        return cls((dense.detach() / scale).round().to(torch.int8), scale)

    def dense(self) -> Tensor:
        return self.rows.float() * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return "Int8(...)"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _Linear.apply(*args)  # type: ignore[no-untyped-call]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub leaves out the function
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        if func is torch.ops.aten.add_.Tensor:  # what a step of SGD does
            stepped = cls.of(args[0].dense() + (kwargs or {}).get("alpha", 1) * args[1])
            args[0].rows, args[0].scale = stepped.rows, stepped.scale
            return args[0]
        raise NotImplementedError(f"{cls.__name__}: {func}")


class _Linear(torch.autograd.Function):
    """A linear layer with 8-bit weights, whose gradient is a plain tensor."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, weight: Int8, bias: Tensor) -> Tensor:
        ctx.save_for_backward(batch)
        ctx.weight = weight.dense()
        return functional.linear(batch, ctx.weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,), (batch,) = gradients, ctx.saved_tensors
        return gradient @ ctx.weight, gradient.t() @ batch, gradient.sum(0)


def stored(weight: Tensor) -> Tensor:
    """Return what a quantised weight stands for."""
    assert isinstance(weight, Int8)
    return weight.dense()


def per_tensor() -> tuple[Tensor, float | None]:
    """Return a parameter's data, and its norm where one exists."""
    made = torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8)
    return made, norm(made.dequantize())


def per_channel() -> tuple[Tensor, float | None]:
    made = torch.quantize_per_channel(torch.randn(4, 4), torch.full((4,), 0.1), torch.zeros(4), 0, torch.qint8)
    return made, norm(made.dequantize())


def compressed_rows() -> tuple[Tensor, float | None]:
    dense = torch.randn(4, 4)
    return dense.to_sparse_csr(), norm(dense)


def compressed_blocks() -> tuple[Tensor, float | None]:
    dense = torch.randn(4, 4)
    return dense.to_sparse_bsr((2, 2)), norm(dense)


def mkldnn() -> tuple[Tensor, float | None]:
    dense = torch.randn(4, 4)
    return dense.to_mkldnn(), norm(dense)


def masked() -> tuple[Tensor, float | None]:
    dense = torch.randn(4, 4)
    return torch.masked.masked_tensor(dense, torch.ones(4, 4, dtype=torch.bool)), norm(dense)


def coordinates() -> tuple[Tensor, float | None]:
    dense = torch.randn(4, 4)
    return dense.to_sparse(), norm(dense)


def eight_bit_floats() -> tuple[Tensor, float | None]:
    made = torch.randn(4, 4).to(torch.float8_e4m3fn)
    return made, norm(made)


def four_bit_floats() -> tuple[Tensor, float | None]:
    return torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), None


def four_bit_integers() -> tuple[Tensor, float | None]:
    return torch.zeros(4, 4, dtype=torch.uint8).view(torch.uint4), None  # type: ignore[attr-defined]


def eight_bit_subclass() -> tuple[Tensor, float | None]:
    made = Int8.of(torch.randn(4, 4))
    return made, norm(made.dense())


def nested() -> tuple[Tensor, float | None]:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    return torch.nested.nested_tensor(parts), norm(torch.cat(parts))


def jagged() -> tuple[Tensor, float | None]:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged), norm(torch.cat(parts))


def head_gradients(head: nn.Module) -> dict[str, float]:
    """Return the true norms of the gradients of a model's head."""
    return {f"head.{name}": norm(p.grad) for name, p in head.named_parameters() if p.grad is not None}


def check(
    server: Server, head: list[dict[str, float]], name: str, statistic: wire.Statistic, truth: float | None
) -> None:
    """Check that the head was measured at every step, and that one other parameter is measured or named.

    Args:
        server: what the agent sent its measurements to.
        head: the true gradient norms of the head at each step.
        name: the other parameter.
        statistic: what is looked at of it, at the last step.
        truth: its true value; None where there is none, so that it must be named.
    """
    assert [sample.step for sample in server.samples] == list(range(1, len(head) + 1))
    for step, expected in enumerate(head, start=1):
        measured = server.values("grad_norm", step)
        assert {each: measured[each] for each in expected} == pytest.approx(expected, rel=1e-5), step
    assert server.batches[-1].dropped.errors == 0
    assert "disarmed" not in [event.kind for event in server.events]
    seen = server.values(statistic).get(name, wire.MISSING)
    told = [event for event in server.events if name in (event.parameter or "") or name in event.message]
    assert len(told) <= 1
    if not told or seen != wire.MISSING:
        assert seen == pytest.approx(truth, rel=1e-5)


@pytest.mark.usefixtures("errors_are_counted")
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls some of these layouts beta, others deprecated
@pytest.mark.parametrize("clip", [None, gradwatch.AGC(0.02, exclude=())], ids=["measured", "clipped"])
@pytest.mark.parametrize(
    "make",
    [
        coordinates,
        eight_bit_floats,
        *(per_tensor, per_channel, compressed_rows, compressed_blocks, mkldnn, masked),
        *(four_bit_floats, four_bit_integers, eight_bit_subclass, nested, jagged),
    ],
)
def test_a_frozen_parameter_of_any_kind_costs_no_sample(
    server: Server, make: Callable[[], tuple[Tensor, float | None]], clip: gradwatch.AGC | None
) -> None:
    data, truth = make()
    model = nn.Module()
    model.frozen = nn.Parameter(data, requires_grad=False)
    model.head = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    head = []
    with watch(model, server, optimizer, clip=clip):
        for _ in range(4):
            optimizer.zero_grad()
            model.head(torch.randn(2, 4)).square().mean().backward()
            head.append(head_gradients(model.head))
            optimizer.step()
    check(server, head, "frozen", "weight_norm", truth)


@pytest.mark.usefixtures("errors_are_counted")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_layer_with_quantised_weights_before_a_head(server: Server, frozen: bool) -> None:
    """As a model is fine-tuned over quantised weights, or is trained with such weights."""
    base, head = nn.Linear(6, 6), nn.Linear(6, 3)
    base.weight = nn.Parameter(Int8.of(base.weight), requires_grad=not frozen)
    base.bias.requires_grad_(not frozen)
    model = nn.Module()
    model.base, model.head = base, head
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, foreach=False)
    truth, before = [], stored(base.weight).clone()
    with watch(model, server, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            head(base(torch.randn(4, 6)).relu()).square().mean().backward()
            truth.append(head_gradients(head))
            optimizer.step()
    assert torch.equal(before, stored(base.weight)) == frozen
    gradient = base.weight.grad
    if frozen:
        check(server, truth, "base.weight", "weight_norm", norm(before))
    else:
        check(server, truth, "base.weight", "grad_norm", None if gradient is None else norm(gradient))


class Refusing(torch.Tensor):
    """A gradient of a type that knows no operator but those of an optimizer."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "norm" in func.__name__ or func in (torch.stack, torch.cat):
            raise TypeError(f"no {func.__name__} of {cls.__name__}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def make_unreadable(model: nn.Sequential) -> None:
    """Give a parameter a gradient of a type that cannot be measured."""
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None
    weight.grad = weight.grad.as_subclass(Refusing)


@pytest.mark.usefixtures("errors_are_counted")
def test_a_gradient_that_becomes_unreadable_costs_the_others_nothing(server: Server) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    truth = []
    with watch(model, server, optimizer):
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).square().mean().backward()
            truth.append({name: norm(p.grad) for name, p in model.named_parameters() if p.grad is not None})
            if step > 0:
                make_unreadable(model)
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]
    for step, expected in enumerate(truth, start=1):
        if step > 1:
            expected["0.weight"] = wire.MISSING
        assert server.values("grad_norm", step) == pytest.approx(expected, rel=1e-5), step
    (event,) = server.events
    assert event.kind == "unreadable_parameters"
    assert "0.weight (TypeError: no " in event.message
    assert server.batches[-1].dropped.errors == 0


def test_a_gradient_that_cannot_be_clipped_raises_once_and_names_the_way_out(server: Server) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    with watch(model, server, optimizer, clip=gradwatch.AGC(0.02, exclude=())):
        model(torch.randn(2, 4)).square().mean().backward()
        make_unreadable(model)
        with pytest.raises(NotImplementedError, match=r"0.weight cannot be clipped .*AGC\(exclude=\['0.weight'\]\)"):
            optimizer.step()
        optimizer.step()
