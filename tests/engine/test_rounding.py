"""Perturbations of half-precision weights: a warning if they round to nothing, and stochastic rounding."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from live_memory import LiveMemory
from steppe._engine.rounding import add_scaled_stochastically_, surviving_share
from steppe._tensors import in_place
from steppe._tensors.in_place import add_scaled_
from support import BASES, DRIVES, batch, bits, net, plain

HALF = [torch.bfloat16, torch.float16]


def neighbors(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest number of the dtype below x and the smallest above, by search among all its numbers."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    above = torch.searchsorted(numbers, x.double())
    below = torch.where(numbers[above] == x, above, above - 1)
    return numbers[below], numbers[above]


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_gives_a_neighbor_and_is_unbiased(dtype):
    torch.manual_seed(0)
    w = torch.randn(50).to(dtype)
    e = torch.randn(50) * 10.0 ** torch.randint(-4, 0, (50,))
    exact = w.double() + e.double() * 0.5
    below, above = neighbors(exact.float(), dtype)
    total, num_draws = torch.zeros(50, dtype=torch.float64), 4000
    for step in range(num_draws):
        target = w.clone()
        add_scaled_stochastically_([target], torch.tensor(0.5), [e], step=step)
        assert ((target == below) | (target == above)).all()
        total += target.double()
    deviation = (above - below) / 2 / num_draws**0.5
    assert ((total / num_draws - exact).abs() <= 5 * deviation + 1e-7 * exact.abs()).all()
    assert ((w.double() + (e * 0.5).to(dtype).double()).to(dtype) == w).sum() > 5, "rounding to nearest loses some"


def test_rounding_draws_depend_on_the_step_and_the_position():
    def rounded(step):
        targets = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)]
        add_scaled_stochastically_(targets, torch.tensor(1.0), [torch.full((64,), 2**-9)] * 2, step=step)
        return bits(targets)

    assert rounded(3) == rounded(3)
    assert rounded(3) != rounded(4)
    assert rounded(3)[0] != rounded(3)[1]


def test_float32_weights_are_added_without_stochastic_rounding():
    a, b, step = torch.randn(9), torch.randn(9), torch.randn(9)
    mixed = [a.clone(), b.bfloat16()]
    add_scaled_stochastically_(mixed, torch.tensor(0.1), [step, step], step=0)
    add_scaled_([a], torch.tensor(0.1), [step])
    assert torch.equal(mixed[0], a)


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("base", ["sgd", "momentum"])  # AdamW's eps of 1e-8 is 0 in float16
@pytest.mark.parametrize("dtype", HALF)
def test_rho_zero_with_stochastic_rounding_equals_the_base(dtype, base, drive):
    model, twin = net(dropout=0.0, dtype=dtype), net(dropout=0.0, dtype=dtype)
    optimizer = steppe.SAM(BASES[base](model.parameters()), rho=0.0, model=model, stochastic_rounding=True)
    other = BASES[base](twin.parameters())
    for step in range(3):
        x, y = batch(step, dtype=dtype)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        plain(other, lambda x=x, y=y: F.cross_entropy(twin(x), y))
    assert bits(model.parameters()) == bits(twin.parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_perturbation_that_rounds_to_nothing_warns_once(dtype):
    w = nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.0), rho=1e-3)
    with pytest.warns(
        UserWarning,
        match=rf"only 0% of the perturbation survives rounding to {dtype} weights.*autocast.*stochastic_rounding=True",
    ):
        DRIVES["passes"](optimizer, lambda: w.sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DRIVES["passes"](optimizer, lambda: w.sum())


@pytest.mark.parametrize(("rho", "stochastic"), [(0.5, False), (1e-3, True)])
def test_perturbation_that_survives_rounding_does_not_warn(rho, stochastic):
    """A large perturbation survives rounding; a small one does on average, with stochastic rounding."""
    w = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.0), rho=rho, stochastic_rounding=stochastic)
    DRIVES["passes"](optimizer, lambda: w.sum())


def test_gradient_with_stochastic_rounding_is_close_to_that_of_float32_weights():
    """With rounding to nearest, the perturbation of a wide layer is lost and g_s is g; stochastic rounding keeps it."""
    torch.manual_seed(0)
    weights = torch.randn(20_000).bfloat16()
    a = torch.randn(20_000)

    def g_s(dtype, **options):
        w = nn.Parameter(weights.to(dtype))
        optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.0), rho=0.05, **options)
        for sam_pass in optimizer.passes():
            with sam_pass:
                (20 * torch.tanh((w.float() * a).sum() / 100)).backward()
        return w.grad.float()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lost = g_s(torch.bfloat16)
    exact = g_s(torch.float32)
    found = g_s(torch.bfloat16, stochastic_rounding=True)
    change = (exact - lost).norm()
    assert (exact - found).norm() < 0.1 * change
    assert change > 0.01 * exact.norm()


def test_surviving_share_takes_little_memory_beside_the_weights(monkeypatch):
    """Float32 copies of all half-precision weights would take more memory than anything else in the step."""
    widened = 1 << 12
    monkeypatch.setattr(in_place, "_PIECE", widened)
    before = [torch.ones(shape, dtype=torch.bfloat16) for shape in [(), (14 * widened,), (2, widened // 2)]]
    e = [torch.full(b.shape, size) for b, size in zip(before, (0.0, 2**-9, 2**-7), strict=True)]  # 2**-9 rounds away
    after = [(b + d).bfloat16() for b, d in zip(before, e, strict=True)]
    with LiveMemory() as memory:
        share = surviving_share(after, before, torch.tensor(1.0), e)
    assert float(share) == pytest.approx(16 / (16 + 14))
    assert memory.peak < sum(t.nbytes for t in (*after, *before, *e)) + 6 * 4 * widened + 1000
