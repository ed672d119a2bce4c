"""A plain loop with the agent attached in one line.

``python examples/plain_loop.py``, with ``gradwatch serve`` running.
Look at: the map of the run. ``torch.tanh`` keeps every layer within two decades. With ``torch.sigmoid`` in its place
the map darkens from the output to the input, and the rule ``vanishing`` fires.
"""

import torch
from torch import nn

import gradwatch


class Block(nn.Module):
    """One layer of the network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations of the layer, shape (batch, width)."""
        return torch.tanh(self.linear(x))


def main() -> None:
    """Learn the sum of 32 numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(32) for _ in range(12)), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with gradwatch.attach(model, optimizer, project="examples", run="plain loop") as agent:
        for _ in range(200):
            inputs = torch.randn(64, 32)
            loss = nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"look at {agent.run_url}")


if __name__ == "__main__":
    main()
