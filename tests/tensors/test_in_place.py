"""Scaled addition in place, and the pieces that lists of tensors are processed in."""

import math

import pytest
import torch

from steppe._tensors import in_place
from steppe._tensors.in_place import _add_scaled_fused_, add_scaled_, pieces


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


def test_add_scaled_fused_returns_tensors_whose_strides_no_view_can_match():
    """The fused CUDA kernel raises if a target and its direction have different strides."""
    a, b, c = torch.zeros(3), torch.empty_strided((8, 4, 1, 1), (4, 1, 4, 4)).zero_(), torch.zeros(4, 5)
    along = [torch.ones(3), torch.randn(8, 4, 1, 1), torch.randn(5, 4).t()]
    assert b.stride() != along[1].stride()
    left, directions = _add_scaled_fused_([a, b, c], torch.tensor(0.5), along)
    assert a.tolist() == [0.5] * 3
    torch.testing.assert_close(b, 0.5 * along[1], rtol=0, atol=0, check_stride=False)
    assert left[0] is c
    assert directions[0] is along[2]
    assert len(left) == len(directions) == 1


def test_add_scaled_handles_mixed_dtypes():
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    targets = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    directions = [torch.full((2,), float(i), dtype=dtype) for i, dtype in enumerate(dtypes[:3])]
    directions.append(torch.full((2,), 3.0, dtype=torch.float64))
    add_scaled_(targets, torch.tensor(0.5, dtype=torch.float64), directions)
    assert [t.tolist() for t in targets] == [[1.0 + 0.5 * i] * 2 for i in range(4)]
    assert [t.dtype for t in targets] == dtypes
    add_scaled_([], torch.tensor(1.0), [])


def test_pieces_are_views_of_few_entries_that_cover_all(monkeypatch):
    monkeypatch.setattr(in_place, "_PIECE", 6)
    shapes = ((), (2, 2), (7, 2), (3,), (1, 8), (0,))
    a = [torch.arange(math.prod(s), dtype=torch.float32).reshape(s) for s in shapes]
    a[2] = a[2].t().contiguous().t()  # a layout that no flat view has
    b = [t + 100 for t in a]
    found = list(pieces(a, b))
    assert all(sum(t.numel() for t in xs) <= 6 or len(xs) == 1 for xs, _ in found)
    assert max(sum(t.numel() for t in xs) for xs, _ in found) == 8, "one row of eight entries cannot be split"
    for xs, ys in found:
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(x + 100, y)
            x.zero_()
    assert all(not t.any() for t in a)
    assert list(pieces([], [])) == []
