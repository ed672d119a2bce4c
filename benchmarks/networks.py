"""The four networks of every benchmark."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.as_tensor(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, 8)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return torch.as_tensor(x + self.mlp(self.norm_2(x)))


class _Gpt(nn.Module):
    def __init__(self, layers: int = 6, width: int = 512, vocabulary: int = 50_257, length: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return torch.as_tensor(self.head(self.norm(self.blocks(x))))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(x + self.inner(x))


def _convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    width = 64
    for stage, blocks in ((64, 4), (128, 6), (256, 8), (512, 8)):
        if stage != width:
            layers.append(nn.Conv2d(width, stage, 2, stride=2))
            width = stage
        for _ in range(blocks):
            inner = nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width // 2, 1),
                nn.ReLU(),
                nn.Conv2d(width // 2, width, 3, padding=1),
            )
            layers.append(_Residual(inner))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _narrow_and_deep() -> nn.Module:
    blocks = [_Residual(nn.Sequential(nn.Linear(64, 64), nn.Tanh())) for _ in range(1000)]
    return nn.Sequential(*blocks, nn.Linear(64, 10))


def _perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(30):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


@dataclass(frozen=True)
class Network:
    """One of the four, with a batch for it."""

    key: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of a batch."""
        return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    def ready(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return the network, seeded, after one backward pass, with its batch."""
        torch.manual_seed(0)
        model = self.build()
        inputs, targets = self.batch()
        self.loss(model, inputs, targets).backward()
        return model, inputs, targets

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of its parameters."""
        with torch.device("meta"):
            return [tuple(parameter.shape) for parameter in self.build().parameters()]


NETWORKS = (
    Network("gpt", "GPT-2-like", _Gpt, lambda: (torch.randint(50_257, (2, 128)), torch.randint(50_257, (2, 128)))),
    Network("conv", "conv net", _convolutions, lambda: (torch.randn(2, 3, 64, 64), torch.randint(10, (2,)))),
    Network("blocks", "1,000 blocks", _narrow_and_deep, lambda: (torch.randn(64, 64), torch.randint(10, (64,)))),
    Network("mlp", "MLP", _perceptron, lambda: (torch.randn(64, 1024), torch.randint(10, (64,)))),
)
