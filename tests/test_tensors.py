"""Lists of tensors as one vector, and the reversible move."""

import math

import pytest
import torch

from steppe._engine.displacement import Displacement
from steppe._tensors.ops import _add_scaled_fused_, add_scaled_, all_finite, norm, reciprocal
from support import bits


def exact(tensors) -> float:
    return math.sqrt(math.fsum(float((t.double() ** 2).sum()) for t in tensors))


def test_the_norm_is_right_to_1e_6_at_100_million_elements():
    x = torch.empty(100_000_000)
    for fill in (0.1, 0.7):
        x.fill_(fill)
        want = float(x[0].double()) * math.sqrt(x.numel())
        assert float(norm([x])) == pytest.approx(want, rel=1e-6)
    naive = float(x.norm())
    assert abs(naive / want - 1) > 1e-4, "torch's own float32 norm has become exact: the pieces can go"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_many_shapes_and_layouts(dtype):
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
def test_the_norm_is_finite_whenever_it_is(value, size):
    got = float(norm([torch.full((size,), value)]))
    want = float(torch.full((size,), value, dtype=torch.float32).double().norm())
    assert got == pytest.approx(want, rel=1e-6, nan_ok=True)


def test_half_precision_gradients_do_not_overflow():
    assert float(norm([torch.full((10_000,), 60_000.0, dtype=torch.float16)])) == pytest.approx(6e6, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_entry_that_is_not_finite_is_seen_and_sums_that_overflow_are_not_mistaken_for_it(dtype):
    large = min(torch.finfo(dtype).max, 1e150)
    assert all_finite([])
    assert all_finite([torch.full((1000,), large, dtype=dtype), torch.ones(3, dtype=dtype)])
    for bad in (math.nan, math.inf, -math.inf):
        x = torch.randn(1001).to(dtype)
        x[700] = bad
        assert not all_finite([torch.ones(3, dtype=dtype), x])
    assert not all_finite([torch.tensor(math.inf, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)])


def test_reciprocal_of_nothing_is_nothing():
    lengths = torch.tensor([0.0, 1e-300, 4.0, float("inf")], dtype=torch.float64)
    assert reciprocal(lengths).tolist() == [0.0, 0.0, 0.25, 0.0]
    assert torch.isnan(reciprocal(torch.tensor(float("nan"))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", [add_scaled_, _add_scaled_fused_])
def test_add_scaled_rounds_once(add, dtype):
    if add is _add_scaled_fused_ and dtype.itemsize == 2:
        pytest.skip("the fused kernel is used on CUDA only; on a CPU it computes in half precision itself")
    g = torch.Generator().manual_seed(0)
    w, d = (torch.randn(1000, generator=g).to(dtype) for _ in range(2))
    alpha = torch.tensor(0.37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = (w.double() + alpha.double() * d.double()).to(dtype)
    add([w], alpha, [d])
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(w, want, rtol=2 * ulp, atol=2 * ulp)


def test_add_scaled_takes_a_factor_beyond_half_precision():
    w = torch.zeros(2, dtype=torch.float16)
    add_scaled_([w], torch.tensor(1e6, dtype=torch.float64), [torch.full((2,), 1e-5, dtype=torch.float16)])
    assert torch.allclose(w.float(), torch.full((2,), 10.0), rtol=1e-2)


def test_the_fused_sum_takes_what_a_view_can_make_alike_and_leaves_the_rest():
    """Its kernel on CUDA refuses lists in which a target and its direction have other strides."""
    a, b, c = torch.zeros(3), torch.empty_strided((8, 4, 1, 1), (4, 1, 4, 4)).zero_(), torch.zeros(4, 5)
    along = [torch.ones(3), torch.randn(8, 4, 1, 1), torch.randn(5, 4).t()]
    assert b.stride() != along[1].stride()
    left, directions = _add_scaled_fused_([a, b, c], torch.tensor(0.5), along)
    assert a.tolist() == [0.5] * 3
    torch.testing.assert_close(b, 0.5 * along[1], rtol=0, atol=0, check_stride=False)
    assert left[0] is c
    assert directions[0] is along[2]
    assert len(left) == len(directions) == 1


def test_add_scaled_goes_by_kind():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    targets = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    directions = [torch.full((2,), float(i), dtype=dtype) for i, dtype in enumerate(dtypes[:3])]
    directions.append(torch.full((2,), 3.0, dtype=torch.float64))
    add_scaled_(targets, torch.tensor(0.5, dtype=torch.float64), directions)
    assert [t.tolist() for t in targets] == [[1.0 + 0.5 * i] * 2 for i in range(4)]
    assert [t.dtype for t in targets] == dtypes
    add_scaled_([], torch.tensor(1.0), [])


def test_a_displacement_moves_a_weight_that_is_listed_twice_once():
    w = torch.zeros(2)
    away = Displacement()
    away.move([w, w], torch.tensor(1.0), [torch.ones(2), torch.ones(2)])
    assert w.tolist() == [1.0, 1.0]
    away.restore()
    assert w.tolist() == [0.0, 0.0]


def test_a_displacement_comes_back_exactly_from_several_moves():
    w, v = torch.randn(5), torch.randn(3, dtype=torch.bfloat16)
    before = bits([w, v])
    away = Displacement()
    assert not away.active
    away.restore()
    away.move([w], torch.tensor(0.1), [torch.randn(5)])
    away.move([v], torch.tensor(0.1), [torch.randn(3).bfloat16()])
    once = w.clone()
    away.move([w], torch.tensor(0.1), [torch.ones(5)])
    torch.testing.assert_close(w, once + 0.1)
    assert away.active
    assert bits([w, v]) != before
    away.restore()
    assert bits([w, v]) == before
    assert not away.active


def test_a_displacement_as_a_context_restores_on_an_exception():
    w = torch.tensor([0.1, 0.2])
    before = bits([w])
    with pytest.raises(KeyError), Displacement().at([w], torch.tensor(3.0), [torch.ones(2)]):
        assert bits([w]) != before
        raise KeyError
    assert bits([w]) == before


def test_a_displacement_follows_a_weight_that_changed_its_shape_or_dtype():
    w = torch.nn.Parameter(torch.ones(2))
    away = Displacement()
    for data in (torch.ones(2), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        w.data = data
        before = bits([w])
        with away.at([w], torch.tensor(0.5), [torch.ones_like(data)]):
            assert bits([w]) != before
        assert bits([w]) == before
