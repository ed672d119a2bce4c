"""A sweep over learning rates in one process: each trial is a run.

``python examples/sweep.py``, with ``gradwatch serve`` running.
Look at: the list of runs; the one with too large a rate stands out. Choose several and compare them.
"""

import torch
from torch import nn

import gradwatch

RATES = (0.001, 0.03, 30.0)


def train(rate: float) -> float:
    """Train a small network and return its last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    loss = torch.tensor(0.0)
    with gradwatch.attach(model, optimizer, project="examples", run=f"sweep lr={rate}", every=1) as agent:
        for _ in range(60):
            inputs = torch.randn(64, 8)
            loss = nn.functional.mse_loss(model(inputs), inputs.sin().sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            agent.log(learning_rate=rate)
    return loss.item()


def main() -> None:
    """Try each rate."""
    for rate in RATES:
        print(f"learning rate {rate}: loss {train(rate):.3g}")


if __name__ == "__main__":
    main()
