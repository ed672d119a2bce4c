"""A training that never ends, with gradients that fade: something to look at in the dashboards.

``gradwatch run python examples/endless.py``
"""

import time

import torch
from torch import nn

STEPS_PER_SECOND = 20


def main() -> None:
    """Train a deep network of sigmoids on noise that it can learn, slowly."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 32)]
    for _ in range(10):
        layers += [nn.Sigmoid(), nn.Linear(32, 32)]
    network = nn.Sequential(*layers, nn.Sigmoid(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    while True:
        inputs = torch.randn(64, 16)
        loss = nn.functional.mse_loss(network(inputs), inputs[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(1 / STEPS_PER_SECOND)


if __name__ == "__main__":
    main()
