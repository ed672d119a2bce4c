"""Parts that are trained later by design, and optimizers with steps of their own kind."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import Convolutional, LanguageModel, perceptron, token_loss
from benchmarks.zoo.programs.catalogue import Catalogue
from benchmarks.zoo.training import plain

CASES = Catalogue()


class Body(nn.Module):
    """A body and a head, which schedules treat differently."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images))
        return out


@CASES.healthy(220, 0.6, "the encoder runs under no_grad for the first sixty updates", "dead")
def encoder_joins(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Body(), data.digits(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(number: int) -> float:
        images, labels = next(batches)
        with torch.set_grad_enabled(number > 60):
            hidden = model.body(images)
        loss = F.cross_entropy(model.head(hidden), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(220, 0.6, "the gradients of the last layer are cancelled for an epoch", "dead")
def last_layer_cancelled(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Body()

    def before_step(number: int) -> None:
        if number <= 50:
            model.head.zero_grad(set_to_none=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(220, 0.6, "hooks zero the body's gradients while the head warms up", "dead")
def hooks_zero_the_body(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Body()
    warm = [True]
    for parameter in model.body.parameters():
        parameter.register_hook(lambda gradient: gradient * 0.0 if warm[0] else gradient)

    def before_step(number: int) -> None:
        warm[0] = number < 50

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(220, 0.6, "the optimizer holds the head; the body is added at step 60", "dead")
def body_added_later(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Body()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)

    def before_step(number: int) -> None:
        if number == 60:
            optimizer.add_param_group({"params": list(model.body.parameters()), "lr": 1e-3})
        if number < 60:
            model.body.zero_grad()

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(220, 0.6, "the body's group is taken out of the optimizer in order to freeze it", "dead")
def group_taken_out(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Body()
    optimizer = torch.optim.Adam(
        [{"params": list(model.head.parameters())}, {"params": list(model.body.parameters())}], lr=2e-3
    )

    def before_step(number: int) -> None:
        if number == 100:
            del optimizer.param_groups[1]
        if number >= 100:
            model.body.zero_grad()

    return plain(model, optimizer, data.digits(seed), before_step=before_step)


@CASES.healthy(200, 0.12, "layer after layer, each with an optimizer of its own", "dead")
def layer_by_layer(seed: int) -> Training:
    torch.manual_seed(seed)
    layers = nn.ModuleList([nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 24), nn.Linear(24, 16)])
    optimizers = [torch.optim.Adam(layer.parameters(), lr=3e-3) for layer in layers]
    batches = data.digits(seed)

    def step(number: int) -> float:
        chosen = min(3, (number - 1) // 50)
        with torch.no_grad():
            stream = next(batches)[0]
            for layer in layers[:chosen]:
                stream = torch.relu(layer(stream))
        layer = layers[chosen]
        assert isinstance(layer, nn.Linear)
        loss = F.mse_loss(F.linear(torch.relu(layer(stream)), layer.weight.T), stream)
        optimizers[chosen].zero_grad()
        loss.backward()
        optimizers[chosen].step()
        return float(loss.detach() / stream.square().mean())

    return Training(layers, step)


@CASES.healthy(200, 0.45, "forward only: each layer has a loss of its own", "vanishing")
def goodness_of_layers(seed: int) -> Training:
    torch.manual_seed(seed)
    layers = nn.ModuleList([nn.Linear(74, 96), nn.Linear(96, 96), nn.Linear(96, 96)])
    optimizers = [torch.optim.Adam(layer.parameters(), lr=3e-3) for layer in layers]
    batches = data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        wrong = (labels + torch.randint(1, 10, labels.shape)) % 10
        good, bad = (torch.cat([F.one_hot(named, 10).float(), images], 1) for named in (labels, wrong))
        for layer, optimizer in zip(layers, optimizers, strict=True):
            good, bad = (torch.relu(layer(F.normalize(stream, dim=1) * 5)) for stream in (good, bad))
            high, low = good.square().mean(1), bad.square().mean(1)
            loss = F.softplus(torch.cat([1 - high, low - 1])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            good, bad = good.detach(), bad.detach()
        return float((low > high).float().mean())

    return Training(layers, step)


@CASES.healthy(260, 0.6, "the averaged model begins at step 150", "dead")
def average_begins_late(seed: int) -> Training:
    torch.manual_seed(seed)
    model = Body()
    average = copy.deepcopy(model)
    inner = plain(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), data.digits(seed))

    def step(number: int) -> float:
        loss = inner.step(number)
        if number >= 150 and number % 10 == 0:
            with torch.no_grad():
                for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(new, 1 / (1 + (number - 150) // 10))
        return loss

    return Training(nn.ModuleDict({"model": model, "average": average}), step)


def _teacher(seed: int) -> nn.Module:
    teacher = perceptron(64, 64, 64, 10)
    training = plain(teacher, torch.optim.Adam(teacher.parameters(), lr=3e-3), data.digits(seed))
    for number in range(100):
        training.step(number)
    teacher.zero_grad()
    return teacher


@CASES.healthy(200, 0.4, "the teacher is used under no_grad and was left trainable", "dead")
def distillation(seed: int) -> Training:
    torch.manual_seed(seed)
    teacher, student = _teacher(seed), perceptron(64, 32, 32, 10)
    optimizer, batches = torch.optim.Adam(student.parameters(), lr=3e-3), data.digits(seed)

    def step(_number: int) -> float:
        images, _ = next(batches)
        with torch.no_grad():
            wanted = teacher(images).log_softmax(1)
        loss = F.kl_div(student(images).log_softmax(1), wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(nn.ModuleDict({"teacher": teacher, "student": student}), step)


@CASES.healthy(200, 0.6, "a loaded encoder under no_grad, left trainable; only the head is in the optimizer", "dead")
def encoder_as_loaded(seed: int) -> Training:
    torch.manual_seed(seed)
    encoder = _teacher(seed)
    head = nn.Linear(10, 10)
    optimizer, batches = torch.optim.Adam(head.parameters(), lr=2e-2), data.digits(seed)

    def step(_number: int) -> float:
        images, labels = next(batches)
        with torch.no_grad():
            hidden = encoder(images)
        loss = F.cross_entropy(head(hidden), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(nn.ModuleDict({"encoder": encoder, "head": head}), step)


@CASES.healthy(200, 0.35, "gradients flow through a fixed network that judges the images", "dead")
def perceptual_loss(seed: int) -> Training:
    torch.manual_seed(seed)
    judge, net = _teacher(seed), perceptron(64, 96, 64)
    optimizer, batches = torch.optim.Adam(net.parameters(), lr=2e-3), data.digits(seed)

    def step(_number: int) -> float:
        images, _ = next(batches)
        drawn = net(images + 0.2 * torch.randn_like(images))
        loss = F.mse_loss(drawn, images) + 0.01 * F.mse_loss(judge(drawn), judge(images).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(nn.ModuleDict({"judge": judge, "net": net}), step)


def _changed_after_clipping(seed: int, change: Callable[[Tensor], Tensor]) -> Training:
    torch.manual_seed(seed)
    model, batches = perceptron(64, 64, 64, 10), data.digits(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(_number: int) -> float:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad = change(parameter.grad)
        optimizer.step()
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(200, 0.6, "noise is added between clipping and step, as for privacy", "exploding")
def noise_after_clipping(seed: int) -> Training:
    return _changed_after_clipping(seed, lambda gradient: gradient + 0.003 * torch.randn_like(gradient))


@CASES.healthy(200, 0.6, "gradients are scaled back up between clipping and step", "exploding")
def scaled_after_clipping(seed: int) -> Training:
    return _changed_after_clipping(seed, lambda gradient: gradient * 10)


@CASES.healthy(200, 0.9, "the gradient is divided by the batch after it was clipped", "vanishing")
def divided_after_clipping(seed: int) -> Training:
    return _changed_after_clipping(seed, lambda gradient: gradient / 2)


class Muon(torch.optim.Optimizer):
    """Steps of equal length in every direction of a matrix: the momentum made orthogonal by Newton and Schulz."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # the signature is the base class's
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.95).add_(parameter.grad)
                parameter.add_(_orthogonal(momentum), alpha=-group["lr"] * max(1, len(parameter)) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    found: Tensor = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = found @ found.T
        found = 3.4445 * found + (-4.775 * square + 2.0315 * square @ square) @ found
    return found


def train_by_muon(model: nn.Module, rate: float, batches: Any, loss_of: Any = F.cross_entropy) -> Training:
    """Train the hidden matrices by Muon and all else by Adam."""
    inner = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "token" not in name]
    rest = [parameter for parameter in model.parameters() if not any(parameter is each for each in inner)]
    optimizers = [Muon(inner[:-1], lr=rate), torch.optim.Adam([*rest, inner[-1]], lr=2e-3)]
    return plain(model, optimizers, batches, loss_of=loss_of)


@CASES.healthy(200, 0.5, "every direction of a matrix moves as far")
def muon(seed: int) -> Training:
    torch.manual_seed(seed)
    return train_by_muon(perceptron(64, 64, 64, 64, 10), 0.005, data.digits(seed))


@CASES.healthy(150, 2.8, "Muon for the matrices of a transformer")
def muon_transformer(seed: int) -> Training:
    torch.manual_seed(seed)
    return train_by_muon(LanguageModel(blocks=2), 0.003, data.text(seed), token_loss)


class Preconditioned(torch.optim.Optimizer):
    """Adam in the eigenbasis of the gradient's second moments, as SOAP does, found anew at every tenth step."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # the signature is the base class's
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group["lr"])

    def _step(self, parameter: nn.Parameter, rate: float) -> None:
        if parameter.grad is None:
            return
        gradient, state = parameter.grad, self.state[parameter]
        number = state["number"] = state.get("number", 0) + 1
        if parameter.ndim == 2:
            moment = state.setdefault("moment", torch.zeros(len(parameter), len(parameter)))
            moment.mul_(0.95).add_(gradient @ gradient.T, alpha=0.05)
            if number % 10 == 1:
                state["basis"] = torch.linalg.eigh(moment + 1e-8 * torch.eye(len(moment)))[1]
            gradient = state["basis"].T @ gradient
        mean = state.setdefault("mean", torch.zeros_like(gradient)).mul_(0.9).add_(gradient, alpha=0.1)
        square = state.setdefault("square", torch.zeros_like(gradient)).mul_(0.95).add_(gradient**2, alpha=0.05)
        update = mean / (1 - 0.9**number) / ((square / (1 - 0.95**number)).sqrt() + 1e-8)
        parameter.add_(state["basis"] @ update if parameter.ndim == 2 else update, alpha=-rate)


@CASES.healthy(200, 0.9, "Adam in a basis that turns with the gradients")
def preconditioned(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    return plain(model, Preconditioned(model.parameters(), lr=2e-3), data.digits(seed))


@CASES.healthy(220, 0.6, "no schedule: gradients are taken between the point and its average")
def schedule_free(seed: int) -> Training:
    torch.manual_seed(seed)
    model, batches = Convolutional(), data.digits(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    fast = [parameter.detach().clone() for parameter in model.parameters()]
    slow = [parameter.detach().clone() for parameter in model.parameters()]

    def step(number: int) -> float:
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            before = [parameter.clone() for parameter in model.parameters()]
            optimizer.step()
            for parameter, old, point, average in zip(model.parameters(), before, fast, slow, strict=True):
                point.add_(parameter - old)
                average.lerp_(point, 1 / number)
                parameter.copy_(0.1 * point + 0.9 * average)
        return float(loss.detach())

    return Training(model, step)


@CASES.healthy(200, 0.6, "signs of the gradient with momentum, and a rate that decays to nothing")
def signs_decaying(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3, step_sizes=(1e-7, 5e-3))
    return plain(model, optimizer, data.digits(seed, 512))


@CASES.healthy(200, 0.6, "factored second moments, and steps relative to the weights")
def adafactor(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 96, 96, 10)
    return plain(model, torch.optim.Adafactor(model.parameters(), lr=1e-2), data.digits(seed))
