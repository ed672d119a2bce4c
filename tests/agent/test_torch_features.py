"""Features of PyTorch for parameters, gradients and modes: the gradient norms stay right, and the agent goes on."""

import ast
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils import clip_grad_norm_
from torch.optim import optimizer as optimizer_module
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import gradwatch
from gradwatch import wire

from .conftest import Server
from .truth import norm
from .watching import watch

Optimizer = torch.optim.Optimizer


class Training:
    """A network that is trained and watched, with the true norm of each gradient at each step."""

    def __init__(self, server: Server, model: nn.Module | None = None, clip: gradwatch.AGC | None = None) -> None:
        self.server = server
        self.model = model or nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer: Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.agent = watch(self.model, server, self.optimizer, clip=clip)
        self.truth: list[dict[str, float]] = []

    def loss(self) -> Tensor:
        """Return the loss of a random batch, in the type of the parameters."""
        batch = torch.randn(4, 4).to(next(self.model.parameters()).dtype)
        result: Tensor = self.model(batch).square().mean()
        return result

    def step(self) -> None:
        """Take note of the gradients and step."""
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.truth.append({name: norm(gradient) for name, gradient in gradients.items() if gradient is not None})
        self.optimizer.step()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.step()

    def check(self) -> None:
        """Close the agent and compare what it measured at every step with the truth."""
        self.agent.close()
        assert [sample.step for sample in self.server.samples] == list(range(1, len(self.truth) + 1))
        for step, expected in enumerate(self.truth, start=1):
            measured = self.server.values("grad_norm", step)
            assert {name for name, value in measured.items() if value != wire.MISSING} == set(expected), step
            assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5), step
        assert [event.kind for event in self.server.events] == []
        assert self.server.batches[-1].dropped.errors == 0


def everything(clip: float = 0.02) -> gradwatch.AGC:
    """Return adaptive clipping that leaves no parameter out."""
    return gradwatch.AGC(clip, exclude=())


def convert_to_double(training: Training) -> None:
    training.model.double()


def convert_to_half(training: Training) -> None:
    training.model.bfloat16()


def replace_data(training: Training) -> None:
    layer = training.model.get_submodule("0")
    assert isinstance(layer, nn.Linear)
    layer.weight.data = torch.randn(4, 8).t()


def load_optimizer_state(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def use_a_parameter_in_another_module(training: Training) -> None:
    """Replace another module's parameter by a tensor that is computed from a watched one, as MAML does."""
    layer, other = training.model.get_submodule("2"), nn.Linear(8, 3)
    assert isinstance(layer, nn.Linear)
    del other.weight
    other.weight = layer.weight * 2
    other(torch.randn(1, 8)).sum().backward()
    training.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("change", "clip"),
    [
        (replace_data, None),
        (convert_to_double, None),
        (convert_to_half, everything()),
        (load_optimizer_state, None),
        (use_a_parameter_in_another_module, None),
    ],
)
def test_a_change_midway(server: Server, change: Callable[[Training], object], clip: gradwatch.AGC | None) -> None:
    training = Training(server, clip=clip)
    training.train(3)
    change(training)
    training.train(3)
    training.check()


def test_zeroing_that_keeps_the_gradients_now_and_then(server: Server) -> None:
    training = Training(server)
    for step in range(8):
        training.optimizer.zero_grad(set_to_none=bool(step % 2))
        training.loss().backward()
        training.step()
    training.check()


def test_a_gradient_that_is_taken_away(server: Server) -> None:
    training = Training(server)
    for _ in range(4):
        training.optimizer.zero_grad()
        training.loss().backward()
        next(training.model.parameters()).grad = None
        training.step()
    training.check()


def test_parameters_that_leave_their_group(server: Server) -> None:
    """The parameters that left keep gradients that no optimizer steps."""
    training = Training(server)
    training.train(2)
    group = training.optimizer.param_groups[0]
    group["params"] = group["params"][:2]
    training.train(2)
    training.agent.close()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]
    for step, expected in enumerate(training.truth, start=1):
        stepped = {name: value for name, value in expected.items() if step <= 2 or name.startswith("0.")}
        measured = server.values("grad_norm", step)
        assert {name: measured[name] for name in stepped} == pytest.approx(stepped, rel=1e-5)


def test_anomaly_detection(server: Server) -> None:
    training = Training(server)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it is slow
        with torch.autograd.set_detect_anomaly(True):
            training.train(4)
    training.check()


def test_deterministic_algorithms(server: Server) -> None:
    training = Training(server, clip=gradwatch.AGC(0.02, granularity="tensor", exclude=()))
    torch.use_deterministic_algorithms(True)
    try:
        training.train(4)
    finally:
        torch.use_deterministic_algorithms(False)
    training.check()


def test_gradients_of_torch_func(server: Server) -> None:
    training = Training(server)

    def loss(parameters: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        result: Tensor = functional_call(training.model, dict(parameters), (batch,)).square().mean()
        return result

    for _ in range(4):
        named = dict(training.model.named_parameters())
        for_each = vmap(grad(loss), in_dims=(None, 0))(named, torch.randn(4, 4))
        for name, parameter in named.items():
            parameter.grad = for_each[name].detach().mean(0)
        training.step()
    training.check()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_graph_of_the_gradients_with_adaptive_clipping(server: Server) -> None:
    training = Training(server, clip=everything())
    for _ in range(4):
        training.optimizer.zero_grad()
        training.loss().backward(create_graph=True)
        training.step()
        for parameter in training.model.parameters():
            parameter.grad = None  # else the graph keeps itself alive
    training.check()


def test_a_compiled_backward_pass(server: Server) -> None:
    training = Training(server)
    with warnings.catch_warnings(), torch._dynamo.config.patch(compiled_autograd=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(training.model, backend="eager")

        @torch.compile(backend="eager")
        def backward(batch: Tensor) -> None:
            compiled(batch).square().mean().backward()

        for _ in range(3):
            training.optimizer.zero_grad()
            backward(torch.randn(4, 4))
            training.step()
    training.check()


def expand_gradients(model: nn.Module, value: float) -> None:
    """Give every parameter a gradient whose elements lie in one place of memory."""
    for parameter in model.parameters():
        parameter.grad = torch.full((1,) * parameter.dim(), value).expand(parameter.shape)


def rows(shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, 0.1)


def strided(shape: tuple[int, ...]) -> Tensor:
    """Return a matrix whose rows do not lie side by side in memory, or a vector with gaps."""
    if len(shape) == 1:
        return torch.full((*shape, 3), 0.1)[:, 0]
    return torch.full(shape[::-1], 0.1).permute(*reversed(range(len(shape))))


@pytest.mark.parametrize("make", [rows, strided])
def test_elements_that_are_alike_in_wide_rows(server: Server, make: Callable[[tuple[int, ...]], Tensor]) -> None:
    """A float32 sum over many of them drifts, since each addition is rounded to the same side."""
    model = nn.Module()
    shapes = [(20_000,), (65_536,), (3, 20_000), (2, 65_536), (2, 4_096, 16), (3, 3_000), (7, 8_000), (2_000_000,)]
    model.several = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in shapes)
    model.transposed = nn.ConvTranspose1d(4_000, 3, 4, bias=False)
    training = Training(server, model)
    for shape, parameter in zip(shapes, model.several, strict=True):
        parameter.grad = make(shape)
    model.transposed.weight.grad = torch.full((4_000, 3, 4), 0.1)
    training.step()
    training.check()


def test_gradients_that_are_expanded(server: Server) -> None:
    training = Training(server)
    for step in range(4):
        expand_gradients(training.model, 0.5 + step)
        training.step()
    training.check()


def test_gradients_that_are_expanded_are_not_left_unclipped_in_silence(server: Server) -> None:
    training = Training(server, clip=everything())
    expand_gradients(training.model, 0.5)
    with pytest.raises(RuntimeError, match="single memory location"):
        training.step()
    training.check()


def test_a_gradient_that_two_parameters_share_is_clipped(server: Server) -> None:
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    training = Training(server, model, everything())
    model.a.grad = model.b.grad = torch.ones(3, 4)
    training.step()
    assert float(model.a.grad[0].norm()) <= 0.02 * 2.0 * (1 + 1e-6)
    training.check()


class Conjugates(nn.Module):
    """A loss of conjugated parameters, whose gradients are conjugated lazily."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
        self.vector = nn.Parameter(torch.randn(5, dtype=torch.cfloat))


@pytest.mark.parametrize("clip", [None, gradwatch.AGC(0.02, exclude=())])
def test_gradients_that_are_conjugated_lazily(server: Server, clip: gradwatch.AGC | None) -> None:
    model = Conjugates()
    training = Training(server, model, clip)
    for _ in range(4):
        matrix, vector = torch.randn(4, 3, dtype=torch.cfloat).t().conj(), torch.randn(5, dtype=torch.cfloat).conj()
        model.matrix.grad, model.vector.grad = matrix, vector
        assert matrix.is_conj()
        expected, weight = matrix.resolve_conj().clone(), model.matrix.detach()
        if clip is not None:
            limit = clip.clip * weight.abs().square().sum(1).sqrt().clamp(min=1e-3)
            expected *= (limit / expected.abs().square().sum(1).sqrt()).clamp(max=1.0)[:, None]
        training.step()
        torch.testing.assert_close(matrix.resolve_conj(), expected)
    training.check()


def test_hybrid_sparse_gradients_with_adaptive_clipping(server: Server) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(5, 6, 2))
    training = Training(server, model, everything())
    for _ in range(4):
        places, values = torch.randint(0, 5, (2, 7)), torch.randn(7, 2)
        model.weight.grad = torch.sparse_coo_tensor(places, values, (5, 6, 2), check_invariants=True)
        gradient = model.weight.grad.to_dense().double()
        weight = model.weight.detach().double()
        limit = 0.02 * weight.flatten(1).norm(dim=1).clamp(min=1e-3)
        factor = (limit / gradient.flatten(1).norm(dim=1)).clamp(max=1.0)  # a row without gradients stays zero
        training.step()
        torch.testing.assert_close(model.weight.grad.to_dense().double(), gradient * factor[:, None, None])
    training.check()


def test_clipping_in_a_step_pre_hook_of_the_optimizer(server: Server) -> None:
    """The norms are those that the gradients had before the hook clipped them."""
    training = Training(server)

    def clip(*_: object) -> None:
        clip_grad_norm_(training.model.parameters(), 0.01)

    training.optimizer.register_step_pre_hook(clip)
    training.train(4)
    training.check()


def test_weights_that_a_step_post_hook_moves(server: Server) -> None:
    training = Training(server)

    @torch.no_grad()
    def normalise(*_: object) -> None:
        for parameter in training.model.parameters():
            parameter.div_(parameter.norm() + 1e-9)

    training.optimizer.register_step_post_hook(normalise)
    training.train(4)
    training.check()


def test_parameters_that_are_all_replaced(server: Server) -> None:
    training = Training(server)
    training.train(3)
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()), assign=True)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.train(3)
    training.check()


@pytest.mark.usefixtures("errors_are_counted")
def test_another_default_device(server: Server) -> None:
    training = Training(server, nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)), everything())
    batches = [torch.randint(0, 10, (4,)) for _ in range(4)]
    torch.set_default_device("meta")
    try:
        for step, batch in enumerate(batches):
            training.optimizer.zero_grad()
            (training.model(batch) * (1e-25 if step == 3 else 1)).square().mean().backward()
            training.step()
    finally:
        torch.set_default_device(None)
    training.check()


@pytest.mark.usefixtures("errors_are_counted")
def test_fake_tensors_of_another_model(server: Server) -> None:
    training = Training(server)
    with FakeTensorMode():
        other = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(5):
            other(torch.randn(2, 3)).sum().backward()
            optimizer.step()
    training.train(4)
    training.check()


FACTORIES = {"zeros", "ones", "full", "empty", "tensor", "arange", "linspace", "scalar_tensor", "eye", "rand", "randn"}


def tensors_without_a_device(source: str) -> list[int]:
    """Return the lines that make a tensor wherever the user's default device is."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES]
    return [
        call.lineno
        for call in made
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]


def test_every_tensor_of_the_agent_is_made_on_a_device_that_it_names() -> None:
    package = Path(gradwatch.__file__).parent
    sources = [path for path in package.rglob("*.py") if "demo" not in path.parts]
    assert len(sources) > 50
    found = {str(path): lines for path in sources if (lines := tensors_without_a_device(path.read_text("utf-8")))}
    assert not found
    assert tensors_without_a_device("a = torch.zeros(3)\ntorch.zeros(3, device=d)") == [1]


def test_an_agent_that_attaches_or_closes_during_a_step_elsewhere(server: Server) -> None:
    """The hooks that torch is going through at that moment must not change under it."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    agents: list[gradwatch.Agent] = []
    first = register_optimizer_step_pre_hook(lambda *_: agents.append(watch(model, server)))
    last = register_optimizer_step_post_hook(lambda *_: agents.pop().close())
    try:
        for _ in range(2):
            optimizer.step()
    finally:
        first.remove()
        last.remove()
    assert not agents
    assert type(optimizer_module._global_optimizer_pre_hooks) is OrderedDict


def test_hooks_that_the_user_sets_and_removes_while_an_agent_listens(server: Server) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called: list[str] = []
    before = register_optimizer_step_pre_hook(lambda *_: called.append("before"))
    with watch(model, server):
        during = register_optimizer_step_pre_hook(lambda *_: called.append("during"))
        optimizer.step()
        before.remove()
        optimizer.step()
    optimizer.step()
    during.remove()
    optimizer.step()
    assert called == ["before", "during", "during", "during"]


class Comparable(torch.optim.SGD):
    """An optimizer that cannot be hashed, as a class that defines equality alone cannot."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]


def test_an_optimizer_that_cannot_be_hashed(server: Server) -> None:
    model = nn.Linear(4, 3)
    optimizer = Comparable(model.parameters(), lr=0.1)
    truth = []
    with watch(model, server, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 4)).square().mean().backward()
            truth.append({name: norm(p.grad) for name, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4, 5]
    for step, expected in enumerate(truth, start=1):
        assert server.values("grad_norm", step) == pytest.approx(expected, rel=1e-5)
