"""Networks that several cases share, small and plain."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Return linear layers of these widths with an activation between each two."""
    layers: list[nn.Module] = []
    for index, (wide, next_wide) in enumerate(itertools.pairwise(widths)):
        layers += [activation()] if index else []
        layers += [nn.Linear(wide, next_wide, bias=bias)]
    return nn.Sequential(*layers)


def scale_weights(model: nn.Module, gain: float) -> nn.Module:
    """Draw every weight matrix anew with deviation gain / sqrt(fan in), and set biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain / fan_in**0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


class Branch(nn.Module):
    """A residual block whose branch is multiplied by a gain: ReZero (0), LayerScale (1e-5), or plain (none)."""

    def __init__(self, width: int, gain: float | None, *, per_channel: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        shape = (width,) if per_channel else ()
        self.gain = None if gain is None else nn.Parameter(torch.full(shape, gain))

    def forward(self, stream: Tensor) -> Tensor:
        branch = self.second(F.relu(self.first(stream)))
        out: Tensor = stream + (branch if self.gain is None else self.gain * branch)
        return out


class Attention(nn.Module):
    """Multi-head self-attention with one matrix each for query, key, value and output."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads
        self.causal = causal

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        query, key, value = (
            part(stream).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """A transformer block, with its norms before the branches (pre) or after the sums (post)."""

    def __init__(self, width: int, heads: int, *, post: bool, causal: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=causal)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.post = post

    def forward(self, stream: Tensor) -> Tensor:
        if self.post:
            stream = self.norm_1(stream + self.attention(stream))
            out: Tensor = self.norm_2(stream + self.feed(stream))
            return out
        stream = stream + self.attention(self.norm_1(stream))
        fed: Tensor = self.feed(self.norm_2(stream))
        return stream + fed


class LanguageModel(nn.Module):
    """A byte-level transformer."""

    def __init__(self, width: int = 32, blocks: int = 4, *, post: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(128, width)
        self.position = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 2, post=post, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 128, bias=False)
        if tied:
            nn.init.normal_(self.token.weight, std=0.1)
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.token(tokens.clamp_max(127)) + self.position[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(stream)))
        return out


class Recurrent(nn.Module):
    """A byte-level recurrent network: LSTM, GRU or plain."""

    def __init__(self, kind: str, width: int = 48) -> None:
        super().__init__()
        self.token = nn.Embedding(128, 24)
        cells: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        self.cell = cells[kind](24, width, batch_first=True)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.cell(self.token(tokens.clamp_max(127)))
        out: Tensor = self.head(states)
        return out


class Convolutional(nn.Module):
    """A small residual network over 8 x 8 images, with batch norm or without."""

    def __init__(self, width: int = 16, blocks: int = 3, *, norm: bool = True, zero_gamma: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.convs_1 = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=not norm) for _ in range(blocks))
        self.convs_2 = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=not norm) for _ in range(blocks))
        make: Callable[[], nn.Module] = (lambda: nn.BatchNorm2d(width)) if norm else nn.Identity
        self.norms_1 = nn.ModuleList(make() for _ in range(blocks))
        self.norms_2 = nn.ModuleList(make() for _ in range(blocks))
        self.head = nn.Linear(width * 4, 10)
        if zero_gamma:
            for gain in self.norms_2:
                assert isinstance(gain, nn.BatchNorm2d)
                nn.init.zeros_(gain.weight)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images.view(-1, 1, 8, 8))
        for conv_1, norm_1, conv_2, norm_2 in zip(self.convs_1, self.norms_1, self.convs_2, self.norms_2, strict=True):
            stream = stream + norm_2(conv_2(F.relu(norm_1(conv_1(stream)))))
        out: Tensor = self.head(F.adaptive_avg_pool2d(F.relu(stream), 2).flatten(1))
        return out


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over all bytes."""
    return F.cross_entropy(logits.flatten(0, 1), targets.clamp_max(127).flatten())
