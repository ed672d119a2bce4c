"""Reinforcement learning: the loss is no measure of progress, and several networks step in one run.

Each returns a measure of what it is to learn, smaller is better, not the loss.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

from benchmarks.zoo import data
from benchmarks.zoo.case import Training
from benchmarks.zoo.networks import perceptron
from benchmarks.zoo.programs.catalogue import Catalogue

CASES = Catalogue()


class Poles:
    """Sixteen carts with poles at once, whose episodes end at different steps; states have the shape (16, 4)."""

    def __init__(self, generator: torch.Generator) -> None:
        self.state = torch.rand(16, 4, generator=generator) * 0.1 - 0.05
        self.up = torch.ones(16)

    def push(self, right: Tensor) -> Tensor:
        """Move all carts; returns 1 for each pole that is still up, shape (16,)."""
        x, v, angle, turn = self.state.unbind(1)
        cosine, sine = angle.cos(), angle.sin()
        force = (20.0 * right - 10.0 + 0.05 * turn**2 * sine) / 1.1
        bend = (9.8 * sine - cosine * force) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        move = force - 0.05 * bend * cosine / 1.1
        self.state = torch.stack([x + 0.02 * v, v + 0.02 * move, angle + 0.02 * turn, turn + 0.02 * bend], 1)
        self.up = self.up * ((self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < 0.21)).float()
        return self.up


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 64)
        self.action, self.value = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.body(state))
        return self.action(hidden), self.value(hidden).squeeze(1)


def _returns(rewards: Sequence[Tensor]) -> Tensor:
    total, found = torch.zeros_like(rewards[0]), []
    for reward in reversed(rewards):
        total = reward + 0.99 * total
        found.append(total)
    return torch.stack(found[::-1])


def _episodes(model: ActorCritic, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play to the end; returns log probabilities, values, returns and whether the pole was up, (steps, 16) each."""
    poles, kept = Poles(generator), []
    for _ in range(80):
        before = poles.up
        logits, value = model(poles.state)
        choice = Categorical(logits=logits)
        action = choice.sample()
        kept.append((choice.log_prob(action), value, poles.push(action.float()), before))
        if not poles.up.any():
            break
    logs, values, rewards, up = zip(*kept, strict=True)
    return torch.stack(logs), torch.stack(values), _returns(rewards), torch.stack(up)


def _growing_episodes(seed: int, *, critic: bool) -> Training:
    torch.manual_seed(seed)
    model, generator = ActorCritic(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(_number: int) -> float:
        logs, values, returns, up = _episodes(model, generator)
        gain = returns - values.detach() if critic else (returns - returns.mean()) / 10
        loss = -(logs * gain * up).sum()
        if critic:
            loss = loss + (F.smooth_l1_loss(values, returns, reduction="none") * up).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 1.0 - float(up.sum()) / (16 * 80)

    return Training(model, step)


@CASES.healthy(100, 0.45, "the better it is, the longer the episode and the larger the summed loss", "exploding")
def actor_critic_longer_episodes(seed: int) -> Training:
    return _growing_episodes(seed, critic=True)


@CASES.healthy(100, 0.45, "REINFORCE, summed over episodes that grow", "exploding")
def reinforce_longer_episodes(seed: int) -> Training:
    return _growing_episodes(seed, critic=False)


def _wrong_moves(model: nn.Module) -> float:
    """Return the share of places from which the greedy move leads away from the middle."""
    places = torch.linspace(-1, 1, 41).unsqueeze(1)
    with torch.no_grad():
        right = model(places).argmax(1) == 1
    return float((right != (places[:, 0] < 0)).float().mean())


def _q_values(seed: int, copy_every: int | None, *, summed: bool = False, polyak: float = 0.0) -> Training:
    """Move a point on a line to its middle. The target network is copied, averaged, or the network itself."""
    torch.manual_seed(seed)
    model = perceptron(1, 48, 48, 2)
    target = model if copy_every is None and not polyak else copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(number: int) -> float:
        place = torch.rand(64, 1) * 2 - 1
        action = torch.randint(0, 2, (64, 1))
        moved = (place + (action * 2 - 1) * 0.2).clamp(-1, 1)
        with torch.no_grad():
            wanted = -moved.abs()[:, 0] + 0.9 * target(moved).max(1).values
        loss = F.smooth_l1_loss(model(place).gather(1, action)[:, 0], wanted, reduction="sum" if summed else "mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if copy_every is not None and number % copy_every == 0:
            target.load_state_dict(model.state_dict())
        if polyak:
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, polyak)
        return _wrong_moves(model)

    watched = model if target is model else nn.ModuleDict({"online": model, "target": target})
    return Training(watched, step)


@CASES.healthy(240, 0.2, "the target network is copied every 40 steps and held by no optimizer", "dead")
def q_learning_copied_target(seed: int) -> Training:
    return _q_values(seed, 40)


@CASES.healthy(240, 0.2, "the target network is copied every 60 steps; the loss is summed", "dead")
def q_learning_rare_copies(seed: int) -> Training:
    return _q_values(seed, 60, summed=True)


@CASES.healthy(240, 0.2, "the loss rises with the values", "exploding")
def q_learning_without_target(seed: int) -> Training:
    return _q_values(seed, None, summed=True)


@CASES.healthy(240, 0.2, "the target network follows slowly")
def q_learning_averaged_target(seed: int) -> Training:
    return _q_values(seed, None, polyak=0.02)


@CASES.healthy(240, 0.25, "a clipped ratio: the loss starts at zero in each of its epochs")
def ppo_on_digits(seed: int) -> Training:
    torch.manual_seed(seed)
    model = perceptron(64, 64, 64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batches = data.digits(seed, 256)
    kept: list[Tensor] = []

    def step(number: int) -> float:
        if number % 4 == 1:
            images, labels = next(batches)
            with torch.no_grad():
                choice = Categorical(logits=model(images))
                action = choice.sample()
                reward = (action == labels).float()
                kept[:] = [images, action, choice.log_prob(action), reward - reward.mean(), labels]
        images, action, old, gain, labels = kept
        choice = Categorical(logits=model(images))
        ratio = (choice.log_prob(action) - old).exp()
        loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean() - 0.01 * choice.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return 1.0 - float((choice.logits.argmax(1) == labels).float().mean())

    return Training(model, step)


def _grpo(seed: int, classes: int, steps_an_update: int = 1) -> Training:
    torch.manual_seed(seed)
    model = perceptron(16, 32, 32, classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    kept: list[Tensor] = []

    def step(number: int) -> float:
        if (number - 1) % steps_an_update == 0:
            inputs = torch.randn(16, 16)
            with torch.no_grad():
                policy = Categorical(logits=model(inputs))
                actions = policy.sample(torch.Size([8]))
                reward = (actions == inputs[:, :classes].argmax(1)).float()
                gain = (reward - reward.mean(0)) / (reward.std(0) + 1e-4)
                kept[:] = [inputs, actions, policy.log_prob(actions), gain, reward]
        inputs, actions, old, gain, reward = kept
        loss = -(gain * (Categorical(logits=model(inputs)).log_prob(actions) - old).exp()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return 1.0 - float(reward.mean())

    return Training(model, step)


@CASES.healthy(
    500, 0.3, "verifiable rewards: the loss is zero by construction, and so is the gradient once solved", "vanishing"
)
def grpo_verifiable(seed: int) -> Training:
    return _grpo(seed, 2)


@CASES.healthy(400, 0.4, "two epochs an update: the loss is zero at every other step", "vanishing")
def grpo_two_epochs(seed: int) -> Training:
    return _grpo(seed, 3, 2)


class Actor(nn.Sequential):
    """States to an action."""


class Critic(nn.Sequential):
    """States and an action to their value."""


def _wanted(state: Tensor) -> Tensor:
    return torch.sin(2 * state[:, :1]) * 0.7


def _actor_and_critic(seed: int, warm_up: int = 0, *, actor_first: bool = True) -> Training:
    torch.manual_seed(seed)
    actor = Actor(*perceptron(3, 64, 64, 1), nn.Tanh())
    critic = Critic(*perceptron(4, 64, 64, 1))
    slow = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=5e-4)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)

    def step(number: int) -> float:
        state = torch.rand(64, 3) * 2 - 1
        with torch.no_grad():
            action = (actor(state) + 0.3 * torch.randn(64, 1)).clamp(-1, 1)
        reward = -((action - _wanted(state)) ** 2) * 5
        critic_optimizer.zero_grad()
        F.mse_loss(critic(torch.cat([state, action], 1)), reward).backward()
        critic_optimizer.step()
        if number > warm_up:
            actor_optimizer.zero_grad()
            (-critic(torch.cat([state, actor(state)], 1)).mean()).backward()
            actor_optimizer.step()
        with torch.no_grad():
            for kept, new in zip(slow.parameters(), critic.parameters(), strict=True):
                kept.lerp_(new, 0.01)
            return float((actor(state) - _wanted(state)).square().mean())

    return Training([actor, critic] if actor_first else [critic, actor], step)


@CASES.healthy(300, 0.12, "two networks of one depth, each with its own loss", "vanishing")
def deterministic_policy(seed: int) -> Training:
    return _actor_and_critic(seed)


@CASES.healthy(300, 0.12, "the critic is watched first", "vanishing")
def deterministic_policy_critic_first(seed: int) -> Training:
    return _actor_and_critic(seed, actor_first=False)


@CASES.healthy(340, 0.12, "the critic alone for the first forty updates", "dead")
def critic_warm_up(seed: int) -> Training:
    return _actor_and_critic(seed, 40)


@CASES.healthy(300, 0.15, "two critics, and a temperature that is a parameter of its own", "vanishing")
def soft_actor_critic(seed: int) -> Training:
    torch.manual_seed(seed)
    actor, critics = perceptron(3, 64, 64, 2), nn.ModuleList(perceptron(4, 64, 64, 1) for _ in range(2))
    temperature = nn.Parameter(torch.tensor(-2.0))
    model = nn.ModuleDict({"actor": actor, "critics": critics})
    model.register_parameter("temperature", temperature)
    rates = ((actor.parameters(), 2e-3), (critics.parameters(), 3e-3), ([temperature], 1e-2))
    optimizers = [torch.optim.Adam(parameters, lr=rate) for parameters, rate in rates]

    def step(_number: int) -> float:
        state = torch.rand(64, 3) * 2 - 1
        mean, spread = actor(state).chunk(2, 1)
        choice = Normal(mean, spread.clamp(-4, 0).exp())
        action = choice.rsample()
        reward = -((action.detach() - _wanted(state)) ** 2) * 5
        judged = [critic(torch.cat([state, action.detach()], 1)) for critic in critics]
        optimizers[1].zero_grad()
        sum(F.mse_loss(value, reward) for value in judged).backward()  # type: ignore[union-attr]
        optimizers[1].step()
        log = choice.log_prob(action)
        best = torch.minimum(*(critic(torch.cat([state, action], 1)) for critic in critics))
        optimizers[0].zero_grad()
        (temperature.exp().detach() * log - best).mean().backward()
        optimizers[0].step()
        optimizers[2].zero_grad()
        (-temperature * (log.detach() - 1.0).mean()).backward()
        optimizers[2].step()
        return float((mean.detach() - _wanted(state)).square().mean())

    return Training(model, step)


@CASES.healthy(250, 0.35, "the reference policy is a copy that nobody trains, under no_grad", "dead")
def preferences_against_reference(seed: int) -> Training:
    torch.manual_seed(seed)
    policy = perceptron(16, 48, 48, 8)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        inputs = torch.randn(64, 16)
        good = inputs[:, :8].argmax(1, keepdim=True)
        bad = (good + torch.randint(1, 8, good.shape)) % 8
        logs = policy(inputs).log_softmax(1)
        with torch.no_grad():
            old = reference(inputs).log_softmax(1)
        margin = (logs - old).gather(1, good) - (logs - old).gather(1, bad)
        loss = -F.logsigmoid(0.5 * margin).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Training(nn.ModuleDict({"policy": policy, "reference": reference}), step)


@CASES.healthy(250, 0.3, "rewards of very different size: the loss jumps by three decades", "exploding")
def bandit_with_jackpots(seed: int) -> Training:
    """Values of actions under rare large rewards; the squared error jumps where one comes."""
    torch.manual_seed(seed)
    model = perceptron(8, 64, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(_number: int) -> float:
        state = torch.randn(64, 8)
        action = torch.randint(0, 4, (64, 1))
        best = state[:, :4].argmax(1, keepdim=True)
        jackpot = torch.where(torch.rand(64, 1) < 0.002, 30.0, 1.0)
        reward = (action == best).float() * jackpot
        loss = F.mse_loss(model(state).gather(1, action), reward)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            return float((model(state).argmax(1) != best[:, 0]).float().mean())

    return Training(model, step)
