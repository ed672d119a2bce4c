"""The measuring pass against the oracle."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.norms import UnitNorms, UnitShape, row_norms

SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])


def _oracle(tensor: Tensor, axis: int | None) -> list[float]:
    values = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
    if axis is None:
        return [float(np.sqrt((np.abs(values) ** 2).sum()))]
    moved = np.moveaxis(values, axis, 0)
    return [float(np.sqrt((np.abs(row) ** 2).sum())) for row in moved]


def _measure(tensors: Sequence[Tensor], units: Sequence[UnitShape]) -> list[list[float]]:
    plan = UnitNorms(tensors, units)
    buffer = plan(tensors).tolist()
    return [buffer[first : first + unit.units] for first, unit in zip(plan.first, units, strict=True)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(SHAPES, DTYPES, st.booleans()), min_size=1, max_size=8), st.integers(0, 2**31))
def test_unit_norms_equal_the_oracle(kinds: list[tuple[tuple[int, ...], torch.dtype, bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype, _ in kinds]
    units = [UnitShape.of(shape, transposed=transposed) for shape, _, transposed in kinds]
    for tensor, unit, found in zip(tensors, units, _measure(tensors, units), strict=True):
        np.testing.assert_allclose(found, _oracle(tensor, unit.axis), rtol=2e-6)


def test_two_numbers_worked_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, 12.0]])
    assert _measure([weight, weight[0]], [UnitShape.of((3, 2)), UnitShape.of((2,))]) == [[5.0, 0.0, 13.0], [5.0]]
    assert _measure([weight], [UnitShape.of((3, 2), transposed=True)])[0] == pytest.approx([34**0.5, 160**0.5])


def test_nan_and_infinity_stay_in_their_unit() -> None:
    weight = torch.ones(3, 2)
    weight[0, 1], weight[2, 0] = float("nan"), float("inf")
    found = _measure([weight], [UnitShape.of((3, 2))])[0]
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(2**0.5)
    assert found[2] == float("inf")


@pytest.mark.parametrize("elements", [1_000_003, 30_000_001])
def test_long_rows_are_right_to_1e_5(elements: int) -> None:
    row = torch.rand(elements, generator=torch.Generator().manual_seed(0))
    truth = float(np.linalg.norm(row.double().numpy()))
    assert row_norms(row[None])[0].item() == pytest.approx(truth, rel=1e-5)


def test_half_precision_does_not_overflow() -> None:
    row = torch.full((1, 1000), 60_000.0, dtype=torch.float16)
    assert row_norms(row)[0].item() == pytest.approx(60_000 * 1000**0.5, rel=1e-3)


def test_non_contiguous_tensors_are_read_as_they_are() -> None:
    base = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(0))
    for tensor in (base.permute(2, 1, 0), base[::2], base.transpose(0, 1)):
        found = _measure([tensor], [UnitShape.of(tensor.shape)])[0]
        np.testing.assert_allclose(found, _oracle(tensor, 0), rtol=2e-6)


def test_sparse_rows_are_summed_before_they_are_measured() -> None:
    indices = torch.tensor([[1, 3, 1]])
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]])
    sparse = torch.sparse_coo_tensor(indices, values, (5, 2), check_invariants=True)
    found = _measure([sparse], [UnitShape.of((5, 2))])[0]
    np.testing.assert_allclose(found, [0.0, 5.0, 0.0, 5.0, 0.0])
