"""What only a GPU can show: `make test-gpu` runs it, `make test` does not collect it."""

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.norms.tensor_spec import BufferKey
from gradwatch.norms.triton_reducer import can_use_triton, compare_kernels

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        seen = f"torch {torch.__version__} sees no CUDA device"
        text = f"{seen}: run `make test-gpu` on a machine with a GPU, and with a torch that is built for it"
        pytest.fail(text, pytrace=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernels_agree_with_plain_operators(dtype: torch.dtype) -> None:
    key = BufferKey(DEVICE, dtype)
    compare_kernels([key])
    assert can_use_triton(key)


@pytest.mark.parametrize("wide", [False, True], ids=["usual", "squares overflow"])
def test_clipping_gives_what_the_cpu_gives(wide: bool) -> None:
    results = []
    for on in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (8, 3, 3, 3), (64, 512))]
        grads = [torch.randn_like(parameter) * (1e20 if wide else 1.0) for parameter in parameters]
        moved = [nn.Parameter(parameter.detach().to(on)) for parameter in parameters]
        for parameter, grad in zip(moved, grads, strict=True):
            parameter.grad = grad.to(on)
        gradwatch.adaptive_clip_grad_(moved, 0.01)
        results.append([parameter.grad.cpu() for parameter in moved if parameter.grad is not None])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_agc_in_a_captured_step_clips_at_every_replay() -> None:
    model = nn.Linear(64, 64, bias=False).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = gradwatch.attach(model, optimizer, every=1, clip=gradwatch.AGC(0.01, exclude=[]))
    given, scale = torch.randn(8, 64, device=DEVICE), torch.ones((), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        (model(given).square().sum() * scale).backward()
        optimizer.step()

    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for factor in (1.0, 1e6):
        scale.fill_(factor)
        graph.replay()
        assert model.weight.grad is not None
        ratios = model.weight.grad.norm(dim=1) / model.weight.norm(dim=1)
        assert float(ratios.max()) <= 0.01 * 1.0001
    assert agent.step == 3
    agent.close()
