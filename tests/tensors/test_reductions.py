"""Contract C11: operations on lists of tensors as one vector."""

import math

import pytest
import torch

from steppe._tensors.reductions import all_finite, norm, reciprocal


def exact(tensors) -> float:
    return math.sqrt(math.fsum(float((t.double() ** 2).sum()) for t in tensors))


def test_c11_norm_is_right_to_1e_6_at_100_million_elements():
    x = torch.empty(100_000_000)
    for fill in (0.1, 0.7):
        x.fill_(fill)
        want = float(x[0].double()) * math.sqrt(x.numel())
        assert float(norm([x])) == pytest.approx(want, rel=1e-6)
    naive = float(x.norm())
    assert abs(naive / want - 1) > 1e-4, "torch's own float32 norm has become exact, so norm() needs no pieces"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_c11_norm_of_many_shapes_and_layouts_is_right_to_1e_6(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (257,), (256,), (300, 7), (8, 16, 3, 3)]
    tensors = [torch.randn(s, generator=g).to(dtype) * 100 for s in shapes]
    tensors += [
        tensors[-1].to(memory_format=torch.channels_last),
        tensors[-2].t(),
        torch.ones(1, dtype=dtype).expand(9),
    ]
    assert float(norm(tensors)) == pytest.approx(exact(tensors), rel=1e-6)
    assert norm(tensors).dtype == torch.float64
    assert norm([]).item() == 0.0


@pytest.mark.parametrize("size", [1, 5000])
@pytest.mark.parametrize("value", [1e30, 3e38, 1e-30, 1e-44, 0.0, float("inf"), float("nan")])
def test_c11_norm_of_huge_and_tiny_elements_neither_overflows_nor_underflows(value, size):
    got = float(norm([torch.full((size,), value)]))
    want = float(torch.full((size,), value, dtype=torch.float32).double().norm())
    assert got == pytest.approx(want, rel=1e-6, nan_ok=True)


def test_c11_norm_of_half_precision_gradients_does_not_overflow():
    assert float(norm([torch.full((10_000,), 60_000.0, dtype=torch.float16)])) == pytest.approx(6e6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_finds_one_non_finite_entry_and_ignores_overflow_of_sums(dtype):
    large = min(torch.finfo(dtype).max, 1e150)
    assert all_finite([])
    assert all_finite([torch.full((1000,), large, dtype=dtype), torch.ones(3, dtype=dtype)])
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(1001).to(dtype)
        x[700] = bad
        assert not all_finite([torch.ones(3, dtype=dtype), x])
    assert not all_finite([torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)])


def test_reciprocal_of_zero_is_zero():
    lengths = torch.tensor([0.0, 1e-300, 4.0, float("inf")], dtype=torch.float64)
    assert reciprocal(lengths).tolist() == [0.0, 0.0, 0.25, 0.0]
    assert torch.isnan(reciprocal(torch.tensor(float("nan"))))
