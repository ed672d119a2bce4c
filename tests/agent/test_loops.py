"""Loops that people write, and that are easily measured wrongly."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations

import gradwatch
from gradwatch.settings import SettingsError

from .conftest import Server
from .watching import GRAD_A, Two, watch


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_a_step_that_is_not_sampled(server: Server, fused: bool) -> None:
    model = Two()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with gradwatch.attach(model, optimizer, url=server.url, every=100):
        for step in range(1, 7):
            optimizer.zero_grad()
            scaler.scale(model(GRAD_A, 1e35 if step in (3, 4) else 12.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [event.step for event in server.events if event.kind == "skipped_step"] == [3, 4]


def test_clipping_by_value_while_the_scale_is_on(server: Server) -> None:
    """A frequent mistake: the gradients that are clipped are 1,024 times theirs. What is told of them is not."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        for unscale in (False, True):
            optimizer.zero_grad()
            scaler.scale(model(GRAD_A, 12.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            clip_grad_value_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    for step, clipped in ((1, 1.0 / 1024), (2, 1.0)):
        assert server.values("grad_norm", step) == {"a": 5.0, "b": 12.0}
        expected = {"a": 2**0.5 * clipped, "b": clipped}
        assert server.values("clipped_grad_norm", step) == pytest.approx(expected, rel=1e-6)


def half(scaler: torch.amp.GradScaler, losses: list[Tensor]) -> Tensor:
    return sum((scaler.scale(loss) / 2 for loss in losses), torch.zeros(()))


def joined(scaler: torch.amp.GradScaler, losses: list[Tensor]) -> Tensor:
    return scaler.scale(losses[0]) + scaler.scale(losses[1])


def averaged(scaler: torch.amp.GradScaler, losses: list[Tensor]) -> Tensor:
    return scaler.scale(torch.stack(losses)).mean()


def beside(scaler: torch.amp.GradScaler, losses: list[Tensor]) -> Tensor:
    scaler.scale(losses[1])  # is not propagated
    scaler.scale(losses[1].detach())
    return losses[0] / 4


@pytest.mark.parametrize(("compute", "expected"), [(half, 59.0), (joined, 118.0), (averaged, 59.0), (beside, 14.75)])
def test_a_loss_that_is_computed_from_scaled_ones(server: Server, compute: Any, expected: float) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, server, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            compute(scaler, [model(GRAD_A, 12.0), model(GRAD_A, 12.0)]).backward()
            if compute is beside:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
    assert server.trail("loss") == {1: expected, 2: expected, 3: expected}


def test_a_tied_weight_that_is_listed_twice_is_scaled_twice(server: Server) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        model(GRAD_A, 12.0).backward()
        clip_grad_norm_([model.a, model.b, model.b], 1.0)
        optimizer.step()
    assert server.values("grad_norm") == pytest.approx({"a": 5.0, "b": 12.0}, rel=1e-5)
    coefficient = 1 / (25 + 144 + 144) ** 0.5
    expected = {"a": 5 * coefficient, "b": 12 * coefficient**2}
    assert server.values("clipped_grad_norm") == pytest.approx(expected, rel=1e-5)


def test_a_tied_weight_that_is_listed_twice_is_clipped_once() -> None:
    layer = nn.Linear(4, 5, bias=False)
    layer.weight.grad = 3 * torch.ones(5, 4)
    gradwatch.adaptive_clip_grad_([layer.weight, layer.weight], 0.1)
    ratios = layer.weight.grad.norm(dim=1) / layer.weight.detach().norm(dim=1)
    assert ratios.tolist() == pytest.approx([0.1] * 5)


def test_each_of_many_parameters_is_clipped_by_itself(server: Server) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(1200)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        loss: Tensor = sum((10 * parameter.sum() for parameter in model), torch.zeros(()))
        loss.backward()
        for parameter in model:
            clip_grad_norm_(parameter, 1.0)
        optimizer.step()
    assert list(server.values("grad_norm").values()) == pytest.approx([300**0.5] * 1200, rel=1e-5)


def test_learning_rates_keep_their_places_whoever_steps(server: Server) -> None:
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    seldom = torch.optim.SGD(generator.parameters(), lr=1e-4)
    often = torch.optim.SGD(critic.parameters(), lr=4e-4)
    with gradwatch.attach([generator, critic], [seldom, often], url=server.url, every=1):
        for step in range(8):
            critic(generator(torch.ones(2, 3))).mean().backward()
            often.step()
            if step % 4 == 3:
                seldom.step()
            often.zero_grad()
            seldom.zero_grad()
    told = [(sample.scalars.get("learning_rate"), sample.scalars.get("learning_rate.1")) for sample in server.samples]
    assert {often for _, often in told} == {4e-4}
    assert [place for place, (rare, _) in enumerate(told, start=1) if rare is not None] == [4, 8]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_that_is_kept_makes_new_gradients_at_each_pass(server: Server) -> None:
    """With ``create_graph`` gradients are added out of place: the new one may lie where the old one did."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for _ in range(6):
            for _ in range(4):
                model(GRAD_A, 12.0).backward(create_graph=True)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
    assert server.trail("loss") == pytest.approx(dict.fromkeys(range(1, 7), 4 * 59.0))


def test_more_is_added_to_what_was_clipped(server: Server) -> None:
    """By a pass that is told its gradient: there is no loss, but what was clipped is so no longer."""
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer):
        for step in range(2):
            optimizer.zero_grad()
            model(GRAD_A, 12.0).backward()
            clip_grad_norm_(model.parameters(), 6.5)
            if step:
                (model(GRAD_A, 12.0) * torch.ones(1)).backward(torch.ones(1))
            optimizer.step()
    assert server.values("grad_norm", 1) == pytest.approx({"a": 5.0, "b": 12.0}, rel=1e-5)
    assert server.values("grad_norm", 2) == pytest.approx({"a": 7.5, "b": 18.0}, rel=1e-5)


def plain(layer: nn.Module) -> nn.Module:
    return layer


@pytest.mark.parametrize("wrap", [plain, nn.utils.spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("groups", [1, 2])
def test_units_of_a_transposed_convolution_that_is_computed_from_others(wrap: Any, groups: int) -> None:
    model = nn.Sequential(wrap(nn.ConvTranspose2d(4, 3 * groups, 2, groups=groups)))
    (weight,) = (parameter for parameter in model.parameters() if parameter.dim() == 4)
    weight.grad = torch.randn_like(weight)
    weight.grad[:, 2] *= 1000

    def units(tensor: Tensor) -> Tensor:
        rows = tensor.detach().reshape(groups, -1, 3, 4).transpose(1, 2).flatten(0, 1).flatten(1)
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms

    gradwatch.adaptive_clip_grad_(model, 0.1)
    assert (units(weight.grad) / units(weight)).tolist() == pytest.approx([0.1] * 3 * groups)


@pytest.mark.parametrize("step", [5, np.int64(5), np.float32(5.0), 5.0, torch.tensor(5), torch.tensor(5.0)])
def test_a_step_out_of_a_checkpoint(server: Server, step: Any) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watch(model, server, optimizer, step=step):
        model(GRAD_A, 12.0).backward()
        optimizer.step()
    assert [sample.step for sample in server.samples] == [6]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"step": 2.5}, "step=2.5 must be a whole number"),
        ({"step": torch.ones(2)}, "must be a whole number"),
        ({"step": "5"}, "step='5' must be a whole number"),
        ({"every": "5"}, "every='5' must be a whole number"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
        ({"overhead_budget": "1%"}, "overhead_budget='1%' must be a number"),
        ({"project": 5}, "project=5 must be a text"),
        ({"project": "x" * 600}, "at most 512 characters"),
        ({"run": "a\0b"}, "no NUL"),
        ({"run": 3}, "run=3 must be a text"),
        ({"url": 8321}, "url=8321 must be a text"),
        ({"token": "gwt_secret\nmore"}, "the token holds a character that no HTTP header may"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text) as raised:
        gradwatch.attach(Two(), **options)
    assert "secret" not in str(raised.value)


def test_a_token_is_taken_without_the_end_of_its_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_TOKEN", "gwt_secret\n")
    watch(Two(), server).close()
    assert {headers["Authorization"] for _, headers in server.requests} == {"Bearer gwt_secret"}


def test_what_is_no_model_no_optimizer_and_no_ending_is_named(server: Server) -> None:
    model: Any = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="or several of them, not None"):
        gradwatch.attach(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be"):
        gradwatch.attach(model, model)
    agent = watch(model, server)
    with pytest.raises(ValueError, match="status='weird' must be one of completed, failed, killed"):
        agent.close(status="weird")
    agent.log(large=10**400, small=-(10**400))
    agent.close(status="failed", exit_code=3)
    assert [(batch.end.status, batch.end.exit_code) for batch in server.batches if batch.end] == [("failed", 3)]
