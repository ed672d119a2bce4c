"""What the Triton kernels give, interpreted on the CPU: run by test_kernels.py in a process that is told to."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import adaptive_clip_grad_
from gradwatch.norms import buffers, reference, triton_kernels, triton_reducer
from gradwatch.norms.layout import NormLayout
from gradwatch.norms.reducer import Scratch
from gradwatch.norms.tensor_spec import WIDEST_ROW, BufferKey, UnitAxis, spec_of
from tests.agent.test_agc import TOLERANCE, _drawn, _float64, _grad, _oracle


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """Name the kernels as they are launched."""
    seen: list[str] = []
    hooks = {kernel: lambda *_, name=name, **__: seen.append(name) for name, kernel in _KERNELS.items()}
    for kernel, hook in hooks.items():
        kernel.add_pre_run_hook(hook)
    yield seen
    for kernel, hook in hooks.items():
        kernel.pre_run_hooks.remove(hook)


@pytest.fixture(autouse=True)
def _tested() -> None:
    triton_reducer.compare_kernels(BufferKey(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float64))


def test_kernels_are_not_tested_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_reducer, "_usable", {})
    key = BufferKey(torch.device("cpu"), torch.float32)
    assert not triton_reducer.can_use_triton(key)
    model = nn.Linear(3, 4)
    gradwatch.attach(model, torch.optim.SGD(model.parameters()), clip=0.1).close()
    assert triton_reducer.can_use_triton(key)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter computes by numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_that_overflow(dtype: torch.dtype) -> None:
    tensors = [torch.full((2, 1500), 1e20, dtype=dtype), torch.full((3, 2), math.inf, dtype=dtype)]
    layout = NormLayout([spec_of(tensor, "rows") for tensor in tensors])
    (key,) = layout.sizes
    out = torch.zeros(layout.sizes[key])
    buffers.make_reducer(layout, {key: out}, Scratch()).run(tensors)
    (_, first), (_, second) = layout.places
    expected = float(tensors[0][0].double().norm())
    torch.testing.assert_close(out[first : first + 2], torch.full((2,), expected), rtol=1e-5, atol=0)
    assert bool(out[second : second + 3].isinf().all())


def test_a_captured_step_takes_plain_operators(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(3, 5), torch.ones(4, 5)]
    layout = NormLayout([spec_of(tensor, "rows") for tensor in tensors])
    (key,) = layout.sizes
    out = torch.zeros(layout.sizes[key])
    reducer = buffers.make_reducer(layout, {key: out}, Scratch())
    launches.clear()
    monkeypatch.setattr(triton_reducer, "captures", lambda _device: True)
    reducer.run(tensors)
    assert launches == []
    torch.testing.assert_close(out, torch.full((7,), math.sqrt(5)))


_KERNELS = {"norms": triton_kernels.unit_norms, "scale": triton_kernels.scale_units}
SHAPES: list[tuple[tuple[int, ...], UnitAxis, int]] = [
    ((), "whole", 1),
    ((7,), "whole", 1),
    ((3, 5), "whole", 1),
    ((3, 5), "rows", 1),
    ((2, 1500), "rows", 1),
    ((4, 3, 2), "rows", 1),
    ((3, 4, 2, 3), "rows", 1),
    ((2, 3, 2, 2, 3), "rows", 1),
    ((4, 3), "transposed", 1),
    ((4, 3, 2, 5), "transposed", 1),
    ((6, 2, 3), "transposed", 3),
    ((2, 3), "experts", 1),
    ((2, 3, 4), "experts", 1),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_norms_of_every_axis_and_type_take_one_launch(dtype: torch.dtype, launches: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [_drawn(shape, dtype, generator).detach() for shape, _, _ in SHAPES]
    specs = [spec_of(tensor, axis, groups) for tensor, (_, axis, groups) in zip(tensors, SHAPES, strict=True)]
    layout = NormLayout(specs)
    (key,) = layout.sizes
    out = torch.full((layout.sizes[key],), -1.0, dtype=key.dtype)
    reducer = buffers.make_reducer(layout, {key: out}, Scratch())
    launches.clear()
    reducer.run(tensors)
    assert launches == ["norms"]
    for spec, tensor, (_, start) in zip(specs, tensors, layout.places, strict=True):
        truth = reference.unit_norms(tensor, spec.axis, spec.groups)
        tolerance = 1e-12 if key.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            out[start : start + spec.units].double(), truth, rtol=tolerance, atol=0, msg=str(spec)
        )


def test_clipping_takes_three_launches_for_each_precision(launches: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (5,), (2, 3), (3, 2, 2)]
    parameters = [_drawn(shape, dtype, generator) for shape in shapes for dtype in TOLERANCE for _ in range(2)]
    expected = [_oracle(_float64(_grad(p)), _float64(p), 0.1, 1e-3, 0) for p in parameters]
    adaptive_clip_grad_(parameters[:12], 1e6)  # the kernels are checked when they are first used
    launches.clear()
    adaptive_clip_grad_(parameters, 0.1)
    assert sorted(launches) == ["norms"] * 4 + ["scale"] * 2, "of gradients and weights, in float32 and float64"
    for parameter, truth in zip(parameters, expected, strict=True):
        tolerance = TOLERANCE[parameter.dtype]
        np.testing.assert_allclose(_float64(_grad(parameter)), truth, rtol=tolerance, atol=tolerance / 100)


def _parameter(weight: Tensor, grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = grad
    return parameter


def test_what_lies_otherwise_in_memory_is_clipped_all_the_same() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 5, 2)
    cases = {
        "channels last": _parameter(images.clone(), torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)),
        "transposed": _parameter(torch.randn(4, 3), torch.randn(3, 4).t()),
        "every other": _parameter(torch.randn(4, 3), torch.randn(4, 6)[:, ::2]),
        "expanded weight": _parameter(torch.randn(4, 1).expand(4, 3), torch.randn(4, 3)),
        "unaligned": _parameter(torch.randn(13)[1:].view(4, 3), torch.randn(13)[1:].view(4, 3)),
        "in order": _parameter(torch.randn(4, 3), torch.randn(4, 3)),
    }
    expected = {name: _oracle(_float64(_grad(p)), _float64(p), 0.1, 1e-3, 0) for name, p in cases.items()}
    adaptive_clip_grad_(cases.values(), 0.1)
    for name, parameter in cases.items():
        np.testing.assert_allclose(_float64(_grad(parameter)), expected[name], rtol=2e-6, err_msg=name)


def test_what_the_kernels_do_not_take_is_clipped_beside_them(launches: list[str]) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, sparse=True)
    table(torch.tensor([1, 4, 1])).square().sum().backward()
    wide = _parameter(torch.randn(WIDEST_ROW + 3), torch.randn(WIDEST_ROW + 3))
    small = _parameter(torch.randn(4, 3), torch.randn(4, 3))
    members = [table.weight, wide, small]
    assert table.weight.grad is not None
    dense = [table.weight.grad.to_dense(), _grad(wide), _grad(small)]
    expected = [_oracle(_float64(g), _float64(p), 0.01, 1e-3, 0) for g, p in zip(dense, members, strict=True)]
    adaptive_clip_grad_(members, 0.01)
    assert launches[-1] == "scale"
    for parameter, truth in zip(members, expected, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(_float64(parameter.grad.to_dense()), truth, rtol=2e-6, atol=1e-9)


def test_a_unit_below_the_limit_is_not_touched_and_one_that_is_not_finite_stays() -> None:
    grad = torch.tensor([[math.nan, 3.0], [30.0, 40.0], [0.03, 0.04], [math.inf, 1.0]])
    parameter = _parameter(torch.tensor([[3.0, 4.0]]).repeat(4, 1), grad.clone())
    adaptive_clip_grad_([parameter], clip=0.1)
    expected = grad.clone()
    expected[1] = torch.tensor([0.3, 0.4])
    torch.testing.assert_close(_grad(parameter), expected, equal_nan=True)
    assert torch.equal(_grad(parameter)[2], grad[2])


def test_gradients_that_move_and_change_are_followed() -> None:
    parameter = _parameter(torch.ones(3, 4), torch.zeros(3, 4))
    kept = []
    for step in range(4):
        grad = torch.full((3, 4), 1.0 + step)
        kept.append(grad)  # so that the next one lies elsewhere
        parameter.grad = grad
        adaptive_clip_grad_([parameter], clip=0.1)
        torch.testing.assert_close(grad, torch.full((3, 4), 0.1))
    parameter.data = torch.ones(2, 5)
    parameter.grad = torch.ones(2, 5)
    adaptive_clip_grad_([parameter], clip=0.1)
    torch.testing.assert_close(_grad(parameter), torch.full((2, 5), 0.1))


@pytest.mark.parametrize("kernel", ["unit_norms", "scale_units"])
def test_a_kernel_that_is_wrong_is_found_out_and_not_used(
    kernel: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Idle:
        """A kernel that does nothing."""

        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *_, **__: None

    monkeypatch.setattr(triton_reducer, "_usable", {})
    monkeypatch.setattr(triton_kernels, kernel, Idle())
    parameter = _parameter(torch.ones(3, 4), torch.ones(3, 4))
    adaptive_clip_grad_([parameter], clip=0.1)
    torch.testing.assert_close(_grad(parameter), torch.full((3, 4), 0.1))
    assert not triton_reducer.can_use_triton(BufferKey(torch.device("cpu"), torch.float32))
    (record,) = caplog.records
    assert "the Triton kernels are not used on cpu" in record.getMessage()
