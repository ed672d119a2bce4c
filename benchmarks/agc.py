"""What adaptive clipping costs: this one, timm's loop, ``clip_grad_norm_`` and the floor, in one run on four networks.

``make bench-agc``. timm's loop is stated again here, since timm needs torchvision: the same operators in the same
order. The floor is what memory allows: gradients read, scaled and written, weights read. "With monitoring" is all that
an agent with ``every=1, clip=...`` does around a step on the training thread: it measures and clips in one pass.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import gradwatch
from benchmarks.networks import NETWORKS, Network
from benchmarks.timing import interleaved, read_bandwidth, write_bandwidth

CLIP = 0.01
NOWHERE = "http://127.0.0.1:9"
BARS = {"gpt": 4.0, "conv": 2.5, "blocks": 3.5, "mlp": 3.0}
"""How many times faster than timm's loop it has to be."""
BOTH = 1.25
"""How many times as long clipping with monitoring may take as clipping alone."""


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


@contextmanager
def _agent(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Yield what an agent that samples and clips every step does around a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clip = gradwatch.AGC(CLIP, exclude=())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADWATCH_SPOOL_DIR"] = folder
        agent = gradwatch.attach(model, optimizer, url=NOWHERE, every=1, clip=clip)

        listener = agent._session.monitor.listener

        def around_a_step() -> None:
            listener.before_step(optimizer, (optimizer,), {}, None)
            listener.after_step(optimizer)

        yield around_a_step
        agent.close(timeout_seconds=0.1)


def _measure(network: Network, rounds: int, read: float, write: float) -> bool:
    model, _, _ = network.ready()
    with _agent(model) as around_a_step:
        return _compare(network, model, around_a_step, rounds, read, write)


def _compare(
    network: Network, model: nn.Module, around_a_step: Callable[[], None], rounds: int, read: float, write: float
) -> bool:
    parameters = list(model.parameters())
    saved = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    seconds: dict[str, float] = {}
    work = {
        "gradwatch": lambda: gradwatch.adaptive_clip_grad_(model, CLIP),
        "both": around_a_step,
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
    both = seconds["both"] / seconds["gradwatch"]
    met = ratio >= BARS[network.key] and both <= BOTH and seconds["both"] <= seconds["timm"]
    print(
        f"{network.name:<14} {len(parameters):>5} tensors  floor {1e3 * floor:6.1f} ms  "
        f"gradwatch {1e3 * seconds['gradwatch']:6.1f} ms (x{seconds['gradwatch'] / floor:4.1f})  "
        f"timm {1e3 * seconds['timm']:6.1f} ms  clip_grad_norm_ {1e3 * seconds['clip_grad_norm_']:6.1f} ms  "
        f"-> {ratio:4.1f} times faster than timm (bar {BARS[network.key]})  "
        f"with monitoring {1e3 * seconds['both']:6.1f} ms (x{both:4.2f}, bar {BOTH}) {'ok' if met else 'MISSED'}"
    )
    return met


def main() -> int:
    """Print the table; return 0 only if every bar holds."""
    torch.set_num_threads(2)
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    read, write = read_bandwidth(), write_bandwidth()
    print(
        f"memory: {read / 1e9:.0f} GB/s read, {write / 1e9:.0f} GB/s scaled in place; medians of 30 interleaved rounds"
    )
    met = [_measure(network, 30, read, write) for network in NETWORKS]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
