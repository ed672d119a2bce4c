"""Every kind of training in which a naive hook shows wrong numbers, each against a truth computed by hand."""

import gc
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch
from gradwatch import wire
from gradwatch.hooks.patch import _tell_unheard
from gradwatch.norms.buffers import SampleBuffers
from tests.processes import LEAVE, free_port

from .conftest import OwnErrors, Server
from .watching import GRAD_A, Two, watch


def test_statistics_worked_by_hand(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.values("weight_norm") == pytest.approx({"a": math.sqrt(13), "b": 4.0})
    assert server.values("max_unit_ratio") == pytest.approx({"a": 5 / 3, "b": 3.0})
    assert server.values("zero_unit_share") == {"a": 0.5, "b": 0.0}
    assert server.values("nonfinite_count") == {"a": 0.0, "b": 0.0}
    assert server.scalar("global_grad_norm") == 13.0
    # One piece of the weights at a sample: lr 0.5 moves a by 2.5, b by 6.
    updates = server.values("update_norm")
    assert (updates["a"], updates["b"]) in [(2.5, wire.MISSING), (wire.MISSING, 6.0)]


def test_update_norm_goes_round(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            optimizer.step()
    seen = [server.values("update_norm", step) for step in (1, 2)]
    assert {name: max(values[name] for values in seen) for name in ("a", "b")} == {"a": 2.5, "b": 6.0}


def test_update_norm_tells_who_is_held_by_an_optimizer_without_a_gradient(server: Server) -> None:
    """It is 0 of what the optimizer steps without a gradient, and missing of what no optimizer holds."""
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("trained", "cut", "target")})
    optimizer = torch.optim.SGD([*model["trained"].parameters(), *model["cut"].parameters()], lr=0.5)
    with watch(model, server, optimizer):
        model["trained"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
    updates = server.values("update_norm")
    assert updates["trained.weight"] == pytest.approx(1.0)  # half of a gradient of four ones
    assert (updates["cut.weight"], updates["target.weight"]) == (0.0, wire.MISSING)


def test_update_norm_of_a_large_parameter_comes_now_and_then(server: Server) -> None:
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, server, optimizer):
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.ones(1, 1024)).sum().backward()
            optimizer.step()
    updates = {
        step: server.values("update_norm", step)
        for step in range(1, 9)
        if "update_norm" in server.samples[step - 1].statistics
    }
    # A copy of 2^18 elements is allowed at each sample: 2^20 of them at every fourth.
    assert updates == {4: {"weight": pytest.approx(512.0)}, 8: {"weight": pytest.approx(512.0)}}


def test_nonfinite_elements_are_counted_exactly(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model([[math.nan, math.inf, 1.0], [-math.inf, 2.0, 2.0]], 1e30).backward()
        optimizer.step()
    assert server.values("nonfinite_count") == {"a": 3.0, "b": 0.0}
    assert server.values("grad_norm")["b"] == pytest.approx(1e30)  # its square is not a float32


def test_vanishing_below_what_float32_can_square(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for second in (0.0, 6e-25):
            optimizer.zero_grad()
            model([[3e-25, 0.0, 4e-25], [second, 0.0, 0.0]], 0.0).backward()
            optimizer.step()
    assert server.values("grad_norm", 1) == pytest.approx({"a": 5e-25, "b": 0.0}, rel=1e-6, abs=0.0)
    assert server.values("max_unit_ratio", 1) == pytest.approx({"a": 5e-25 / 3, "b": 0.0}, rel=1e-6, abs=0.0)
    assert server.values("zero_unit_share", 1) == {"a": 0.5, "b": 1.0}
    assert server.values("max_unit_ratio", 2)["a"] == pytest.approx(3e-25, rel=1e-6, abs=0.0)
    assert server.values("zero_unit_share", 2) == {"a": 0.0, "b": 1.0}


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_and_gradients_above_what_float32_can_square(server: Server, frozen: bool) -> None:
    """A frozen weight is measured apart from those that have gradients; a last unit is as usual."""
    model = Two()
    model.a.data = torch.tensor([[3e25, 0.0, 4e25], [1.0, 2.0, 2.0]])
    model.a.requires_grad_(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model([[6e24, 0.0, 8e24], [3e25, 0.0, 4e25]], 12.0).backward()
        optimizer.step()
    assert server.values("weight_norm") == pytest.approx({"a": 5e25, "b": 4.0})
    if not frozen:
        assert server.values("grad_norm") == pytest.approx({"a": math.hypot(1e25, 5e25), "b": 12.0})
        assert server.values("max_unit_ratio") == pytest.approx({"a": 5e25 / 3, "b": 3.0})
        assert server.values("nonfinite_count") == {"a": 0.0, "b": 0.0}
        assert sum(map(sum, server.samples[-1].histograms.values())) == 3


def test_a_large_gradient_that_float32_cannot_square(server: Server) -> None:
    """Of one whose other rows are as usual, those that look like zero are taken for it: an embedding has many."""
    model = nn.Embedding(1024, 1024)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for usual in (0.0, 1.0):
            model.weight.grad = torch.zeros_like(model.weight)
            model.weight.grad[:2, 0] = torch.tensor([3e-25, usual])
            optimizer.step()
    assert server.values("grad_norm", 1)["weight"] == pytest.approx(3e-25, rel=1e-6, abs=0.0)
    assert [server.values("zero_unit_share", step)["weight"] for step in (1, 2)] == [1023 / 1024] * 2


def test_sparse_gradients_that_float32_cannot_square(server: Server) -> None:
    model = nn.Embedding(4, 2, sparse=True)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        (model(torch.tensor([1, 1, 2])) * torch.tensor([3e-25, 4e-25])).sum().backward()
        optimizer.step()
    assert server.values("grad_norm")["weight"] == pytest.approx(5e-25 * math.sqrt(5), rel=1e-6, abs=0.0)
    assert server.values("zero_unit_share") == {"weight": 0.5}


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_is_taken_out(server: Server, fused: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    with watch(model, server, optimizer):
        for value in (12.0, math.inf, 12.0):
            optimizer.zero_grad()
            scaler.scale(model(GRAD_A, value)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [sample.step for sample in server.samples] == [1, 3]
    assert server.values("grad_norm", 1) == server.values("grad_norm", 3) == {"a": 5.0, "b": 12.0}
    assert (server.scalar("loss_scale", 1), server.scalar("loss_scale", 3)) == (1024.0, 512.0)
    assert server.scalar("skipped_steps", 3) == 1.0
    assert [event.step for event in server.events if event.kind == "skipped_step"] == [2]
    assert server.trail("loss")[1] == pytest.approx(3 + 8 + 48)


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaling_with_clipping(server: Server, fused: bool) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        scaler.scale(model(GRAD_A, 12.0)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 6.5)
        scaler.step(optimizer)
        scaler.update()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0})
    assert server.values("clipped_grad_norm") == pytest.approx({"a": 2.5, "b": 6.0})


def test_the_scale_of_another_training_is_not_ours(server: Server) -> None:
    ours, other = Two(), Two()
    optimizer, elsewhere = (torch.optim.SGD(model.parameters(), lr=0.0) for model in (ours, other))
    scaler, stranger = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (16.0, 1024.0))

    def train_other() -> None:
        stranger.scale(other(GRAD_A, 12.0)).backward()
        stranger.step(elsewhere)
        stranger.update()

    with watch(ours, server, optimizer):
        ours(GRAD_A, 12.0).backward()
        train_other()
        optimizer.step()
        for in_parts in (False, True):
            scaled = scaler.scale(ours(GRAD_A, 12.0))
            (scaled / 2 if in_parts else scaled).backward()
            train_other()
            scaler.step(optimizer)
            scaler.update()
    assert [sample.scalars.get("loss_scale") for sample in server.samples] == [None, 16.0, 16.0]


def test_a_round_in_which_one_optimizer_was_skipped_has_no_sample(server: Server) -> None:
    model = Two()
    optimizers = [torch.optim.SGD([model.a], lr=0.0), torch.optim.SGD([model.b], lr=0.0)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizers):
        for value in (12.0, math.inf, 12.0):
            model.zero_grad()
            scaler.scale(model(GRAD_A, value)).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    assert [sample.step for sample in server.samples] == [1, 3]
    assert server.values("grad_norm", 3) == {"a": 5.0, "b": 12.0}
    assert server.scalar("skipped_steps", 3) == 1.0


def test_an_optimizer_over_part_of_the_model(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD([model.b], lr=0.5)
    elsewhere = nn.Linear(2, 2)
    other = torch.optim.SGD(elsewhere.parameters(), lr=0.5)
    with watch(model, server):
        model(GRAD_A, 12.0).backward()
        elsewhere(torch.ones(2)).sum().backward()
        other.step()
        optimizer.step()
    assert server.values("grad_norm") == {"a": wire.MISSING, "b": 12.0}
    assert server.values("weight_norm") == pytest.approx({"a": math.sqrt(13), "b": 4.0})


def test_tied_frozen_and_later_unfrozen(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, server, optimizer):
        for frozen in (True, False):
            model[2].requires_grad_(not frozen)
            optimizer.zero_grad()
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    assert server.names == ["0.weight", "2.weight", "2.bias"]
    trainable = [[parameter.trainable for parameter in told.parameters] for told in server.registrations]
    assert (trainable[0], trainable[-1]) == ([True, False, False], [True, True, True])
    assert server.values("grad_norm", 1)["2.weight"] == wire.MISSING
    assert server.values("grad_norm", 2)["2.bias"] == pytest.approx(math.sqrt(2))


def test_networks_that_freeze_each_other_in_turn_stay_as_they_are(server: Server) -> None:
    players = [nn.Linear(3, 3), nn.Linear(3, 3)]
    optimizers = [torch.optim.SGD(player.parameters(), lr=0.1) for player in players]
    with gradwatch.attach(players, optimizers, url=server.url, every=1):
        for _ in range(5):
            for player, other, optimizer in zip(players, players[::-1], optimizers, strict=True):
                other.requires_grad_(False)
                optimizer.zero_grad()
                player(other(torch.ones(3))).sum().backward()
                optimizer.step()
                other.requires_grad_(True)
    assert all(parameter.trainable for parameter in server.registrations[-1].parameters)
    assert len(server.registrations) <= 4


def test_what_no_optimizer_steps_any_more_is_frozen_too(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with gradwatch.attach(model, url=server.url, every=1):
        for frozen in (False, True):
            model[0].requires_grad_(not frozen)
            optimizer = torch.optim.SGD([entry for entry in model.parameters() if entry.requires_grad], lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(3)).sum().backward()
                optimizer.step()
    trainable = [parameter.trainable for parameter in server.registrations[-1].parameters]
    assert trainable == [False, False, True, True]


@pytest.mark.parametrize("clip", [False, True])
def test_sparse_gradients(server: Server, clip: bool) -> None:
    model = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2))
    sparse, dense = torch.optim.SGD(model[0].parameters(), lr=0.0), torch.optim.SGD(model[1].parameters(), lr=0.0)
    index = torch.tensor([1, 4, 1])
    with watch(model, server):
        for _ in range(2):
            model.zero_grad()
            model(index).sum().backward()
            if clip:
                clip_grad_norm_(model[1].parameters(), 1.0)
            sparse.step()
            dense.step()
    linear = model[1]
    assert isinstance(linear, nn.Linear)
    row = linear.weight.detach().sum(0)
    assert server.values("grad_norm")["0.weight"] == pytest.approx(float(row.norm()) * math.sqrt(5), rel=1e-6)
    assert server.values("zero_unit_share")["0.weight"] == pytest.approx(4 / 6)
    assert server.registrations[0].parameters[0].units == 6


@pytest.mark.parametrize("clip", [None, gradwatch.AGC(1.0, exclude=[])])
def test_a_sparse_gradient_without_rows_is_zero(server: Server, clip: gradwatch.AGC | None) -> None:
    """A batch in which no word is known; of a vector the gradient is sparse, too."""
    model, table = nn.Module(), nn.Embedding(3, 2, sparse=True)
    vector = nn.Parameter(torch.ones(4))
    model.register_module("table", table)
    model.register_parameter("vector", vector)
    nn.init.ones_(table.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, clip=clip):
        for rows in ([], [2, 2], []):
            optimizer.zero_grad()
            index = torch.tensor(rows, dtype=torch.long)
            table(index).sum().backward()
            vector.grad = torch.sparse_coo_tensor(index[None], torch.ones(len(rows)), (4,), check_invariants=True)
            optimizer.step()
    norms = [server.values("grad_norm", step) for step in (1, 2, 3)]
    nothing = {"table.weight": 0.0, "vector": 0.0}
    assert norms == [nothing, pytest.approx({"table.weight": math.sqrt(8), "vector": 2.0}), nothing]
    shares = [server.values("zero_unit_share", step)["table.weight"] for step in (1, 2, 3)]
    assert shares == [1.0, pytest.approx(2 / 3), 1.0]


def test_complex_empty_and_zero_dimensional(server: Server) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.complex = nn.Parameter(torch.tensor([[3 + 4j, 0j], [0j, 2j]]))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.none = nn.Parameter(torch.zeros(3, 0))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.gain = nn.Parameter(torch.tensor(3.0))
            self.wide = nn.Parameter(torch.tensor([[6.0, 8.0]], dtype=torch.float64))

        def forward(self) -> Tensor:
            return (
                (self.complex * self.complex.conj()).real.sum() / 2
                + self.empty.sum()
                + self.none.sum()
                + 7 * self.scalar
                + 5 * self.gain
                + self.wide.sum()
            )

    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)
    with watch(model, server, optimizer):
        model().backward()
        optimizer.step()
    expected = {"complex": math.sqrt(29), "empty": 0.0, "none": 0.0, "scalar": 7.0, "gain": 5.0, "wide": math.sqrt(2)}
    assert server.values("grad_norm") == pytest.approx(expected)
    assert server.values("weight_norm") == pytest.approx({**expected, "scalar": 2.0, "gain": 3.0, "wide": 10.0})
    assert [parameter.units for parameter in server.registrations[0].parameters] == [2, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("clip", [None, gradwatch.AGC(1e9, exclude=[])])
@pytest.mark.parametrize("width", [2, 200])  # gathered with others, or reduced where it lies
@pytest.mark.parametrize("rows", [(1200, 800), (800, 1200), (1200, 1200)])
def test_data_of_another_shape(server: Server, width: int, rows: tuple[int, int], clip: gradwatch.AGC | None) -> None:
    """Layers that grow, are pruned or change places; nothing that torch warns of reaches the user."""
    model = nn.ParameterList([torch.full((size, width), 2.0) for size in (1000, 1000)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, clip=clip):
        for sizes in ((1000, 1000), rows, rows[::-1]):
            for parameter, size in zip(model, sizes, strict=True):
                parameter.grad = None
                parameter.data = torch.full((size, width), 2.0)
                parameter.sum().backward()
            optimizer.step()
    for step, sizes in ((1, (1000, 1000)), (2, rows), (3, rows[::-1])):
        norms = [math.sqrt(size * width) for size in sizes]
        assert list(server.values("grad_norm", step).values()) == pytest.approx(norms)
        assert list(server.values("weight_norm", step).values()) == pytest.approx([2 * norm for norm in norms])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(server: Server, dtype: torch.dtype) -> None:
    model = nn.Linear(300, 200).to(dtype)
    model.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model.weight.grad = torch.full_like(model.weight, 1000.0)
        model.bias.grad = torch.full_like(model.bias, 60000.0)
        optimizer.step()
    thousand = float(torch.tensor(1000.0, dtype=dtype))
    large = float(torch.tensor(60000.0, dtype=dtype))
    assert server.values("grad_norm") == pytest.approx(
        {"weight": thousand * math.sqrt(60000), "bias": large * math.sqrt(200)}, rel=1e-6
    )
    assert server.values("weight_norm")["weight"] == pytest.approx(math.sqrt(60000))


@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled(server: Server, what: str) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(), watch(model, server, optimizer):
        warnings.simplefilter("ignore")
        forward: Any = torch.compile(model, backend="aot_eager") if what == "model" else model
        step = torch.compile(optimizer.step, backend="eager") if what == "step" else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            (forward.a * torch.tensor(GRAD_A)).sum().backward() if what == "step" else forward(GRAD_A, 12.0).backward()
            step()
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.names == ["a", "b"]
    assert server.values("grad_norm")["a"] == 5.0


@pytest.mark.parametrize("whole", [True, False])
def test_clipping_that_is_compiled(server: Server, whole: bool, own_errors: OwnErrors) -> None:
    """It stays one graph, so that its bits are the same, and is not heard: one warning says so."""
    _tell_unheard.cache_clear()
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def clip() -> None:
        clip_grad_norm_(model.parameters(), 6.5)
        if whole:
            clip_grad_value_(model.parameters(), 1e9)

    with warnings.catch_warnings(), watch(model, server, optimizer):
        warnings.simplefilter("ignore")
        graphs: list[object] = []

        def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(clip, backend=backend, fullgraph=whole)
        for _ in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            compiled()
            optimizer.step()
    assert server.scalar("global_grad_norm") == pytest.approx(6.5)
    assert server.trail("clip_norm") == {}
    assert len(graphs) == 1
    assert own_errors.warnings == 1


def test_a_compiled_model_keeps_its_names_and_registration_order(server: Server) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
        with watch(compiled, server, optimizer):
            compiled(torch.ones(3)).sum().backward()
            optimizer.step()
    assert server.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    depths = [parameter.depth or 0 for parameter in server.registrations[-1].parameters]
    assert max(depths[:2]) < min(depths[2:])


@pytest.mark.parametrize("what", ["model", "function"])
def test_what_is_compiled_after_attach_keeps_the_registration_order(server: Server, what: str) -> None:
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(3, 3), nn.Tanh())])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(x: Tensor) -> Tensor:
        result: Tensor = model(x).sum()
        return result

    with warnings.catch_warnings(), watch(model, server, optimizer):
        warnings.simplefilter("ignore")
        compiled: Any = torch.compile(model if what == "model" else loss, backend="aot_eager")
        for _ in range(2):
            optimizer.zero_grad()
            compiled(torch.ones(3)).sum().backward()
            optimizer.step()
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert [parameter.depth for parameter in server.registrations[-1].parameters] == list(range(8))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.0, foreach=False),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.0), capturable=False, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.0, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.0, foreach=True),
    ],
)
def test_forms_of_optimizers(server: Server, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = Two()
    optimizer = make(model.parameters())
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert server.values("grad_norm") == {"a": 5.0, "b": 12.0}
    assert server.scalar("learning_rate") == 0.0


def test_transposed_and_grouped_convolutions(server: Server) -> None:
    transposed = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    model = nn.Sequential(transposed, nn.Conv2d(6, 4, 3, groups=2), nn.LayerNorm([3, 3]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model(torch.randn(2, 4, 3, 3)).square().sum().backward()
        optimizer.step()
    assert {p.name: p.units for p in server.registrations[0].parameters} == {
        "0.weight": 6,
        "1.weight": 4,
        "1.bias": 1,
        "2.weight": 1,
        "2.bias": 1,
    }
    assert transposed.weight.grad is not None
    grad, weight = np.asarray(transposed.weight.grad.double()), np.asarray(transposed.weight.detach().double())
    ratios = []
    for group in range(2):
        for out in range(3):
            unit = np.s_[group * 2 : group * 2 + 2, out]
            ratios.append(float(np.linalg.norm(grad[unit])) / max(float(np.linalg.norm(weight[unit])), 1e-3))
    assert server.values("max_unit_ratio")["0.weight"] == pytest.approx(max(ratios), rel=1e-6)


def slots() -> list[SampleBuffers]:
    """Return the buffers of all agents of this process, those of earlier tests among them."""
    return [found for found in gc.get_objects() if type(found) is SampleBuffers]


def slot_bytes(others: list[SampleBuffers]) -> int:
    """Return what the buffers take that were made since."""
    return sum(slot.bytes for slot in slots() if all(slot is not other for other in others))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_packed_weights_of_one_column_are_one_unit_and_cost_no_memory(server: Server, dtype: torch.dtype) -> None:
    """As QLoRA keeps four-bit weights: frozen, of shape (N, 1)."""
    model = nn.Sequential(nn.Linear(3, 2))
    rows = 5_000_001  # more than integers are converted at once
    packed = (torch.arange(rows) % 7).to(dtype)[:, None]
    model.register_parameter("packed", nn.Parameter(packed, requires_grad=False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    others = slots()
    with watch(model, server, optimizer):
        model[0](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        assert slot_bytes(others) < 100_000
    true = float(np.linalg.norm(packed.double().numpy()))
    assert server.values("weight_norm")["packed"] == pytest.approx(true, rel=1e-6)
    assert server.values("grad_norm")["packed"] == -1.0
    if dtype is torch.uint8:
        assert server.registrations[0].parameters[0].units == 1


@pytest.mark.parametrize(("rows", "units"), [(2**20, 2**20), (2**20 + 1, 1)])
def test_a_parameter_of_too_many_units_is_one(server: Server, rows: int, units: int) -> None:
    model = nn.Embedding(rows, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    others = slots()
    with watch(model, server, optimizer):
        model(torch.tensor([3, 3, 7])).sum().backward()  # gradients 2 and 1
        optimizer.step()
        assert slot_bytes(others) < 2 * 4 * 2 * units + 100_000
    assert server.registrations[0].parameters[0].units == units
    norm, weight = 5.0**0.5, 0.5 * rows**0.5
    assert server.values("grad_norm")["weight"] == pytest.approx(norm)
    assert server.values("weight_norm")["weight"] == pytest.approx(weight)
    assert server.values("max_unit_ratio")["weight"] == pytest.approx(2 / 0.5 if units > 1 else norm / weight)
    assert server.values("zero_unit_share")["weight"] == pytest.approx(1 - 2 / rows if units > 1 else 0.0)


def test_clipping_tells_all_units_apart(server: Server) -> None:
    model = nn.Embedding(2**20 + 1, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, clip=gradwatch.AGC(3.0, exclude=[])):
        model(torch.tensor([3, 3, 7])).sum().backward()
        optimizer.step()
    assert model.weight.grad is not None
    assert model.weight.grad[[3, 7], 0].tolist() == [1.5, 1.0]  # at most three times 0.5
    assert server.registrations[0].parameters[0].units == 2**20 + 1


_DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
import gradwatch
rank, port, url = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1, bias=False))
model.module.weight.data.fill_(1.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
with gradwatch.attach(model, optimizer, url=url, every=1):
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[3.0 + 2 * rank, 4.0 + 0 * rank]])).sum().backward()
        optimizer.step()
dist.destroy_process_group()
"""


def test_data_parallel_rank_0_reports(server: Server) -> None:
    import subprocess

    port = str(free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", _DDP + LEAVE, str(rank), port, server.url])
        for rank in range(2)
    ]
    assert [process.wait(300) for process in ranks] == [0, 0]
    assert {registration.id for registration in server.registrations} == {server.registrations[0].id}
    assert server.names == ["weight"]
    # The mean of (3, 4) and (5, 4) is (4, 4).
    assert server.values("grad_norm") == pytest.approx({"weight": math.sqrt(32)})
    assert [sample.step for sample in server.samples] == [1, 2]
