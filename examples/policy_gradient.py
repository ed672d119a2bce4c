"""REINFORCE on a walk that has to stay near the middle; episodes grow longer as the policy learns.

``python examples/policy_gradient.py``, with ``gradwatch serve`` running.
Look at: the return that is logged, not the loss: a loss of summed rewards says nothing about progress here.
"""

import torch
from torch import Tensor, nn

import gradwatch

LONGEST = 60


def episode(policy: nn.Module) -> tuple[Tensor, int]:
    """Walk until the edge is reached; return the sum of log probabilities, and the number of steps."""
    place = 0.0
    logs: list[Tensor] = []
    while abs(place) < 3 and len(logs) < LONGEST:
        choice = torch.distributions.Categorical(logits=policy(torch.tensor([place])))
        action = choice.sample()
        logs.append(choice.log_prob(action))
        place += (1.0 if action else -1.0) + 0.5 * torch.randn(()).item()
    return torch.stack(logs).sum(), len(logs)


def main() -> None:
    """Train for 150 episodes."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    usual = 10.0
    with gradwatch.attach(policy, optimizer, project="examples", run="policy gradient") as agent:
        for _ in range(150):
            logs, length = episode(policy)
            loss = -logs * (length - usual) / LONGEST
            usual += 0.1 * (length - usual)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            agent.log(episode_return=length)


if __name__ == "__main__":
    main()
