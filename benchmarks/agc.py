"""What adaptive clipping costs: this one, timm's loop, ``clip_grad_norm_`` and the floor, in one run on four networks.

``make bench-agc``. timm's loop is stated again here, since timm needs torchvision: the same operators in the same
order. The floor is what memory allows: gradients read, scaled and written, weights read.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.networks import NETWORKS, Network
from benchmarks.timing import interleaved, read_bandwidth, write_bandwidth

CLIP = 0.01
BARS = {"GPT-2-like": 4.0, "conv net": 2.5, "1,000 blocks": 3.5, "MLP": 3.0}
"""How many times faster than timm's loop it has to be."""


def _unitwise_norm(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.as_tensor(tensor.norm(2.0))
    return torch.as_tensor(tensor.norm(2.0, dim=tuple(range(1, tensor.ndim)), keepdim=True))


def timm_adaptive_clip_grad(parameters: Iterable[Tensor], clip_factor: float = CLIP, eps: float = 1e-3) -> None:
    """Clip as timm does: a loop over the parameters, each gradient copied."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        weights, grads = parameter.detach(), parameter.grad.detach()
        most = _unitwise_norm(weights).clamp_(min=eps).mul_(clip_factor)
        norm = _unitwise_norm(grads)
        clipped = grads * (most / norm.clamp(min=1e-6))
        parameter.grad.detach().copy_(torch.where(norm < most, grads, clipped))


def _restored(parameters: list[nn.Parameter], saved: list[Tensor]) -> None:
    for parameter, grad in zip(parameters, saved, strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(grad)


def _measure(network: Network, rounds: int, read: float, write: float) -> bool:
    model, _, _ = network.ready()
    parameters = list(model.parameters())
    saved = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    seconds: dict[str, float] = {}
    work = {
        "gradwatch": lambda: gradwatch.adaptive_clip_grad_(model, CLIP),
        "timm": lambda: timm_adaptive_clip_grad(parameters),
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1e-3),
    }

    def afresh(run: Callable[[], object]) -> Callable[[], None]:
        def clip() -> None:
            _restored(parameters, saved)
            run()

        return clip

    restored = {name: afresh(run) for name, run in work.items()}
    restore = interleaved({"restore": lambda: _restored(parameters, saved), **restored}, rounds)
    seconds = {name: restore[name] - restore["restore"] for name in work}
    nbytes = sum(grad.nbytes for grad in saved)
    floor = nbytes / read + 2 * nbytes / write
    ratio = seconds["timm"] / seconds["gradwatch"]
    met = ratio >= BARS[network.name]
    print(
        f"{network.name:<14} {len(parameters):>5} tensors  floor {1e3 * floor:6.1f} ms  "
        f"gradwatch {1e3 * seconds['gradwatch']:6.1f} ms (x{seconds['gradwatch'] / floor:4.1f})  "
        f"timm {1e3 * seconds['timm']:6.1f} ms  clip_grad_norm_ {1e3 * seconds['clip_grad_norm_']:6.1f} ms  "
        f"-> {ratio:4.1f} times faster than timm (bar {BARS[network.name]}) {'ok' if met else 'MISSED'}"
    )
    return met


def main() -> int:
    """Print the table; return 0 only if every bar holds."""
    torch.set_num_threads(2)
    read, write = read_bandwidth(), write_bandwidth()
    print(
        f"memory: {read / 1e9:.0f} GB/s read, {write / 1e9:.0f} GB/s scaled in place; medians of 30 interleaved rounds"
    )
    met = [_measure(network, 30, read, write) for network in NETWORKS]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
