"""The toolbox for authors of rules."""

import math

import pytest
import torch

from steppe._tensors import reductions
from steppe.rules import ops
from steppe.rules.ops import dot, normal, orthogonal, scaled, uniform, uniform_number, widen


def test_module_docstring_documents_each_operation():
    assert all(f"``{name}(" in ops.__doc__ for name in ops.__all__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dot_product_of_many_shapes_and_layouts(monkeypatch, dtype):
    monkeypatch.setattr(reductions, "_CHUNK", 500)
    g = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (257,), (300, 7), (8, 16, 3, 3), (500,), (501,)]
    xs, ys = ([torch.randn(s, generator=g).to(dtype) * 100 for s in shapes] for _ in range(2))
    xs.append(xs[5].to(memory_format=torch.channels_last))
    ys.append(ys[5])
    xs.append(xs[4].t())
    ys.append(ys[4].t().contiguous())
    want = math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(xs, ys, strict=True))
    assert float(dot(xs, ys)) == pytest.approx(want, rel=1e-11)
    assert dot(xs, ys).dtype == torch.float64
    assert dot([], []).item() == 0.0


def test_dot_product_is_exact_where_float32_would_round():
    x = torch.full((3_000_000,), 0.1)
    # a float64 sum over runs of 2^20 entries is right to 2^20 eps = 2e-10, however it is cut among threads
    assert float(dot([x], [x])) == pytest.approx(3_000_000 * float(x[0].double()) ** 2, rel=2e-10)
    big = torch.full((3,), 3e38)
    assert float(dot([big], [big])) == pytest.approx(3 * float(big[0].double()) ** 2, rel=1e-12)
    near = [torch.tensor([1e8, 1.0, -1e8])], [torch.tensor([1.0, 1.0, 1.0])]
    assert float(dot(*near)) == 1.0


def test_orthogonal_part_is_zero_for_equal_and_x_for_zero_vectors():
    xs = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    zeros = [torch.zeros(2), torch.tensor(0.0)]
    assert all((part == 0).all() for part in orthogonal(xs, xs))
    torch.testing.assert_close(orthogonal(xs, zeros), xs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scaled_keeps_the_dtype_and_accepts_factors_beyond_it(dtype):
    x = scaled(torch.tensor([1e-3], dtype=dtype), torch.tensor(1e6, dtype=torch.float64))
    assert x.dtype == dtype
    assert x.item() == pytest.approx(1e3, rel=0.01)
    assert widen(x).dtype == (torch.float32 if dtype.itemsize == 2 else dtype)


def test_uniform_numbers_depend_on_name_seed_step_and_position_only():
    numbers = {
        uniform_number(*arguments) for arguments in [("A", 0, 0, 0), ("B", 0, 0, 0), ("A", 1, 0, 0), ("A", 0, 1, 0)]
    }
    assert len(numbers) == 4
    assert all(0 <= number < 1 for number in numbers)
    assert uniform_number("A", 0, 0, 0) in numbers


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize(
    "like",
    [
        torch.empty(8, 16, 3, 3).to(memory_format=torch.channels_last),
        torch.empty(5, 40).t(),
        torch.empty(6, 40)[:, ::2],
    ],
    ids=["channels_last", "transposed", "every other column"],
)
def test_random_numbers_depend_on_no_memory_format(draw, like):
    (drawn,), (contiguous,) = draw("A", 0, 7, [like]), draw("A", 0, 7, [like.contiguous()])
    assert torch.equal(drawn, contiguous)
    assert drawn.stride() == torch.empty_like(like).stride()
