"""The four models of every benchmark: a GPT, a convolutional net, a very deep one of small tensors, a wide MLP."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Gpt(nn.Module):
    """GPT-2-like: 6 layers of width 512, 8 heads, its vocabulary tied."""

    def __init__(self, vocabulary: int = 50257, width: int = 512, layers: int = 6, context: int = 1024) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(GptBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class GptBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_1(x)).view(batch, length, 3, 8, width // 8).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm_2(x))))
        return out


class ConvBlock(nn.Module):
    def __init__(self, incoming: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(incoming, width, 3, stride, 1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv_2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = incoming == width and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(incoming, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.norm_1(self.conv_1(x)))
        return functional.relu(self.norm_2(self.conv_2(inner)) + self.shortcut(x))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.03 * functional.relu(self.linear(x))
        return out


def gpt() -> tuple[nn.Module, Tensor]:
    return Gpt(), torch.randint(0, 50257, (2, 256))


def conv() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1)]
    incoming = 64
    for width, blocks in ((64, 6), (128, 6), (256, 8), (512, 5)):
        for place in range(blocks):
            layers.append(ConvBlock(incoming, width, 2 if place == 0 and width > 64 else 1))
            incoming = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)), torch.randn(2, 3, 64, 64)


def deep() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(Residual(64) for _ in range(1000)), nn.Linear(64, 10)), torch.randn(128, 64)


def mlp() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = [nn.Linear(64, 1024), nn.ReLU()]
    for _ in range(29):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10)), torch.randn(256, 64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"gpt": gpt, "conv": conv, "deep": deep, "mlp": mlp}


def _shapes(make: Callable[[], tuple[nn.Module, Tensor]]) -> Callable[[], list[tuple[int, ...]]]:
    def shapes() -> list[tuple[int, ...]]:
        with torch.device("meta"):
            return [tuple(parameter.shape) for parameter in make()[0].parameters()]

    return shapes


SHAPES = {name: _shapes(make) for name, make in MODELS.items()}
