"""Unit norms against float64 numpy, and what the pass costs in operators and never does: wait for the device."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from benchmarks.networks import NETWORKS, Network
from benchmarks.operators import Operators, allowed, allowed_on_accelerator, launched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradwatch
from gradwatch.norms import reference
from gradwatch.norms.buffers import BufferPool
from gradwatch.norms.layout import MeasurementPlan, NormLayout
from gradwatch.norms.reducer import NormReducer, Scratch
from gradwatch.norms.streams import StreamLog
from gradwatch.norms.tensor_spec import BufferKey, UnitAxis, spec_of

from .conftest import Server
from .watching import monitor_of


def unit_norms(tensors: Sequence[Tensor], axis: UnitAxis = "rows", **sizes: int) -> list[np.ndarray[Any, Any]]:
    layout = NormLayout([spec_of(tensor, axis) for tensor in tensors], **sizes)
    buffers = {key: torch.zeros(size, dtype=key.dtype) for key, size in layout.sizes.items()}
    NormReducer(layout, buffers, Scratch()).run(tensors)
    return [
        buffers[key][start : start + spec.units].numpy() if spec.units else np.zeros(0)
        for (key, start), spec in zip(layout.places, layout.specs, strict=True)
    ]


SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=5).map(tuple)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    direct=st.sampled_from([0, 64, 1 << 20]),
)
def test_rows_of_any_shape_equal_numpy(shapes: list[tuple[int, ...]], dtype: torch.dtype, direct: int) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    for tensor, got in zip(tensors, unit_norms(tensors, direct_bytes=direct, bucket_bytes=256), strict=True):
        exact = tensor.double().numpy().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
        assert got == pytest.approx(np.linalg.norm(exact, axis=1), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64, torch.int8], ids=str)
@pytest.mark.parametrize("axis", ["rows", "transposed", "experts", "whole"])
def test_units_along_every_axis_equal_the_reference(axis: UnitAxis, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (5,), (4, 3), (4, 3, 2), (6, 5, 2, 3), (2, 2, 3, 2, 2)]
    tensors = [(torch.randn(shape, generator=generator) * 9).to(dtype) for shape in shapes]
    for tensor, got in zip(tensors, unit_norms(tensors, axis), strict=True):
        assert got == pytest.approx(reference.unit_norms(tensor, axis).numpy(), rel=1e-6)


def test_units_of_a_grouped_transposed_convolution_equal_the_reference() -> None:
    weight = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    layout = NormLayout([spec_of(weight, "transposed", 3)])
    buffers = {key: torch.zeros(size, dtype=key.dtype) for key, size in layout.sizes.items()}
    NormReducer(layout, buffers, Scratch()).run([weight])
    (got,) = buffers.values()
    assert got.numpy() == pytest.approx(reference.unit_norms(weight, "transposed", 3).numpy(), rel=1e-6)


def test_two_rows_by_hand() -> None:
    (got,) = unit_norms([torch.tensor([[3.0, 4.0], [5.0, 12.0]])])
    assert got.tolist() == [5.0, 13.0]


@pytest.mark.parametrize("shape", [(100_000_000,), (1, 30_000_001), (10_000, 10_000), (7, 200_003)])
def test_large_tensors_are_right_to_1e_5(shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape).uniform_(-1, 1)
    (got,) = unit_norms([tensor])
    exact = math.sqrt(sum(float(part.double().square().sum()) for part in tensor.reshape(-1).split(1 << 22)))
    assert math.sqrt(float((got.astype(np.float64) ** 2).sum())) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("width", "bound"), [(64, 1e-6), (1024, 1e-6), (1025, 1e-5), (7_000, 1e-5)])
def test_rows_in_a_bucket_are_right_whatever_is_in_them(width: int, bound: float) -> None:
    """A constant is what a sum in float32 is worst at."""
    drawn = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).mul(2).exp()
    tensors = [torch.full((2, width), 0.1), drawn, torch.ones(2, width)]
    assert any(
        reduction.in_bucket for reduction in NormLayout([spec_of(tensor, "rows") for tensor in tensors]).reductions
    )
    for tensor, got in zip(tensors, unit_norms(tensors), strict=True):
        assert got == pytest.approx(tensor.double().norm(dim=1).numpy(), rel=bound)


@pytest.mark.filterwarnings("error")
def test_rows_in_a_bucket_that_are_not_finite() -> None:
    rows = [[math.inf, 1.0], [math.nan, 1.0], [-math.inf, math.nan], [0.0, 0.0], [1e30, 1.0], [1e-30, 0.0]]
    got = unit_norms([torch.tensor([row]) for row in rows])
    truth = [torch.tensor([row]).norm(dim=1).numpy() for row in rows]
    assert np.concatenate(got) == pytest.approx(np.concatenate(truth), nan_ok=True)


@pytest.mark.parametrize("size", [1e-18, 1e-19, 1e-30])
def test_small_gradients_where_subnormal_numbers_are_flushed(server: Server, size: float) -> None:
    model = nn.ParameterList(nn.Parameter(torch.ones(3, 1000)) for _ in range(4))
    gradient = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    torch.set_flush_denormal(True)
    try:
        with gradwatch.attach(model, optimizer, url=server.url, every=1):
            for parameter in model:
                parameter.grad = gradient.clone()
            optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    norms = server.samples[0].statistics["grad_norm"].tolist()
    assert norms == pytest.approx([gradient.double().norm().item()] * 4, rel=1e-5, abs=0)


def test_memory_that_is_not_contiguous() -> None:
    channels_last = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    expanded = torch.ones(1).expand(6, 7)
    got = unit_norms([channels_last, expanded])
    assert got[0] == pytest.approx(channels_last.flatten(1).norm(dim=1).numpy(), rel=1e-6)
    assert got[1] == pytest.approx(np.full(6, math.sqrt(7)), rel=1e-6)


def test_the_watcher_of_operators_can_fail() -> None:
    with Operators(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).sum().item()


@pytest.mark.parametrize("loop", ["plain", "clipped", "scaled", "closure"])
def test_nothing_in_the_hooks_waits_for_the_device(server: Server, loop: str) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=loop == "scaled")
    scaler = torch.amp.GradScaler("cpu", enabled=loop == "scaled")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(2, 5)).square().mean()
        scaler.scale(loss).backward()
        return loss

    with gradwatch.attach(model, optimizer, url=server.url, every=1) as agent:
        for _ in range(4):
            with Operators():
                if loop == "closure":
                    optimizer.step(closure)
                    continue
                closure()
                if loop == "clipped":
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                if loop == "scaled":
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
        assert monitor_of(agent).dropped.errors == 0
    assert len(server.samples) == 4


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.key)
def test_operators_grow_with_the_widths_not_with_the_parameters(network: Network) -> None:
    """The layout for accelerators without Triton, where a launch is dear: a bar that grows with the unit widths.

    The documentation has the counts, and why the CPU's are higher where tensors are large.
    """
    shapes = network.shapes()
    accelerator, bar = launched(shapes, "meta"), allowed_on_accelerator(shapes)
    widths = (allowed(shapes) - 20) // 8
    row = f"| {network.name} | {len(shapes)} | {widths} | {bar} | {accelerator} | {launched(shapes, 'cpu')} |"
    assert accelerator <= bar
    assert row in (Path(__file__).parents[2] / "docs" / "agent.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("tensors", "copied"), [(3, False), (14, False), (15, True), (200, True)])
def test_what_the_operators_allow_is_reduced_where_it_lies(tensors: int, copied: bool) -> None:
    """64 kB each: to copy costs at least as much as to launch, of which 4 for a width and 10 are allowed."""
    matrices = [torch.randn(128, 128) for _ in range(tensors)]
    with Operators() as operators, patch.object(np, "einsum", wraps=np.einsum) as sums:
        got = unit_norms(matrices)
    launched = [name for name in operators.names if "norm" in name or "stack" in name]
    assert len(launched) + sums.call_count <= 14
    assert sums.called == copied
    for matrix, norms in zip(matrices, got, strict=True):
        assert norms == pytest.approx(matrix.norm(dim=1).numpy(), rel=1e-6)


@pytest.mark.parametrize(
    "shapes", [[(2, 3), (2, 3), (2, 3)], [(2, 3), (4, 3), (2, 3)], [(), (), ()], [(5,), (5,), (5,)]]
)
@pytest.mark.parametrize("changed", [(9, 3), (2, 4), (3,), ()])
def test_a_tensor_of_another_shape_in_a_bucket_is_refused(
    shapes: list[tuple[int, ...]], changed: tuple[int, ...]
) -> None:
    """Whichever it is, and before anything is written beyond the buffers, which torch would make larger."""
    for place in range(3):
        tensors = [torch.ones(shape) for shape in shapes]
        layout = NormLayout([spec_of(tensor, "rows") for tensor in tensors])
        assert any(reduction.in_bucket for reduction in layout.reductions)
        buffers = {key: torch.zeros(size, dtype=key.dtype) for key, size in layout.sizes.items()}
        scratch = Scratch()
        reducer = NormReducer(layout, buffers, scratch)
        sizes = [buffer.untyped_storage().nbytes() for buffer in scratch.buffers.values()]
        tensors[place] = torch.ones(changed)
        if changed == shapes[place]:
            continue
        with pytest.raises(RuntimeError):
            reducer.run(tensors)
        assert [buffer.untyped_storage().nbytes() for buffer in scratch.buffers.values()] == sizes


def test_sample_buffers_are_bounded_and_come_back() -> None:
    """Their number and their memory: a step of a large model is no reason to hold hundreds of them."""
    for rows, fewest, most in ((3, 1000, 2048), (100_000, 75, 85), (10_000_000, 4, 4)):
        pool = BufferPool(StreamLog())
        plan = MeasurementPlan([0], None, [spec_of(torch.zeros(1).expand(rows, 2), "rows")])
        taken = [sample for sample in iter(pool.acquire, None) if sample.allocate(plan).plan is plan]
        assert fewest <= len(taken) <= most
        pool.release(taken[0])
        assert pool.acquire() is taken[0]


def test_a_plan_reads_back_what_was_written() -> None:
    weights = [torch.randn(3, 2), torch.randn(4), torch.randn(2, 2, dtype=torch.float64)]
    grads = [torch.randn(3, 2).to_sparse(1), torch.randn(4), torch.randn(2, 2, dtype=torch.float64)]
    plan = MeasurementPlan([0, 1, 2], [spec_of(g, "rows") for g in grads], [spec_of(w, "rows") for w in weights])
    sample = BufferPool(StreamLog()).acquire()
    assert sample is not None
    norms = sample.allocate(plan)
    norms.measure(grads, weights)
    order = [plan.indices[position] for position in plan.measured]
    expected = {"grads": norms.grad_units(), "weights": norms.weight_units()}
    for tensors, got in zip((grads, weights), expected.values(), strict=True):
        rows = [tensors[i].to_dense().double().reshape(tensors[i].shape[0] if i != 1 else 1, -1) for i in order]
        assert got == pytest.approx(np.concatenate([row.norm(dim=1).numpy() for row in rows]), rel=1e-6)
    assert isinstance(next(iter(plan.sizes)), BufferKey)
