"""The tests that every combination must pass: subclass :class:`CombinationTests` in the test file of the method."""

import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

import steppe
from checks import bumpy, split, start
from reference import loss_and_gradient, sam_e
from steppe.rules import Cadence, Combination
from steppe.rules.periodic import Periodic
from support import BASES, DRIVES, by_closure, in_pairs, model_bits, net, plain, train

RHO = 0.3
# Learning rates at which no rule is chaotic: otherwise 20 steps would amplify a rounding error to 1e-9.
CALM = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.03),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}

# (g, g_s, memory) -> the update gradient; g_s is None at a step without perturbation.
Reference = Callable[[Tensor, Tensor | None, dict[str, Tensor]], Tensor]


def norm(x: Tensor) -> Tensor:
    return x.square().sum().sqrt()


def trajectory(
    L: Callable[[Tensor], Tensor],
    w: Tensor,
    reference: Reference,
    base: Callable[[list[Tensor]], Optimizer],
    steps: int,
    rho: float,
    is_perturbed: Callable[[int], bool],
) -> Tensor:
    """w after some steps: g at w, at perturbed steps g_s at w + rho g / |g|; the base gets the reference's gradient."""
    w = w.detach().clone().requires_grad_()
    optimizer = base([w])
    memory: dict[str, Tensor] = {}
    for t in range(steps):
        _, g = loss_and_gradient(L, w)
        g_s = loss_and_gradient(L, w.detach() + sam_e(w.detach(), g, rho))[1] if is_perturbed(t) else None
        w.grad = reference(g, g_s, memory)
        optimizer.step()
    return w.detach()


@functools.cache  # the mutants of a combination are compared with the same weights
def weights_of_reference(reference: Reference, base: str, interval: int) -> Tensor:
    return trajectory(bumpy, start(), reference, CALM[base], 20, RHO, lambda t: t % interval == 0)


def trained(
    base: str, drive: str, combination: Combination, cadence: Cadence, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """The first and the last weights of a training with the package."""
    first = start()
    params = [torch.nn.Parameter(p) for p in split(first)]
    optimizer = steppe.SAM(CALM[base](params), rho=RHO, combination=combination, cadence=cadence)
    for _ in range(steps):
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    return first, torch.cat([p.detach().reshape(-1) for p in params])


def assert_is_base(combination: Combination) -> None:
    first, got = trained("adamw", "closure", combination, Periodic(1))
    want = trajectory(bumpy, first, lambda g, *_: g, CALM["adamw"], 20, RHO, lambda t: True)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def assert_is_sam(combination: Combination, interval: int = 1) -> None:
    _, got = trained("adamw", "closure", combination, Periodic(interval))
    _, want = trained("adamw", "closure", steppe.PerturbedGradient(), Periodic(interval))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def unperturbed_and_perturbed() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    g = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(3, 4), (5,), ()]]
    return g, [c + torch.randn(c.shape, generator=generator, dtype=torch.float64) for c in g]


class Mutant:
    """The right combination, moved by a factor between an anchor (g or g_s) and itself."""

    needs_unperturbed_gradient = True

    def __init__(self, right: Combination, anchor: str, factor: float) -> None:
        self.right, self.anchor, self.factor = right, anchor, factor

    def __call__(self, point, perturbed):
        right = self.right(point, perturbed)
        anchor = perturbed if self.anchor == "g_s" and perturbed is not None else point.gradients
        return [a + self.factor * (r - a) for a, r in zip(anchor, right, strict=True)]


class CombinationTests:
    """Compare a combination with its slow reference, break it, and check its limits."""

    cases: ClassVar[Mapping[str, tuple[Combination, Reference, int]]]
    """Combinations, each with its slow reference and the interval of a periodic cadence; the first one has mutants."""
    interval: ClassVar[int] = 1
    """The interval with which the method is tested where the case does not matter."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test with each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))

    @property
    def combination(self) -> Combination:
        """The rule of the first case."""
        return next(iter(self.cases.values()))[0]

    def matches_reference(
        self,
        case: str,
        base: str,
        drive: str,
        *,
        combination: Combination | None = None,
        cadence: Cadence | None = None,
    ) -> None:
        """20 steps in float64 agree with the slow reference to 1e-12."""
        own, reference, interval = self.cases[case]
        _, got = trained(base, drive, combination or own, cadence or Periodic(interval))
        want = weights_of_reference(reference, base, interval)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("base", "drive"), [("sgd", "passes"), ("momentum", "classic"), *((base, "closure") for base in CALM)]
    )
    def test_combination_matches_its_slow_reference(self, case, base, drive):
        self.matches_reference(case, base, drive)

    @pytest.mark.parametrize(("factor", "anchor", "base"), in_pairs([0.0, -1.0, 0.999], ["g", "g_s"], ["sgd", "adamw"]))
    def test_mutant_wrong_combination_is_killed(self, anchor, factor, base):
        with pytest.raises(AssertionError):
            mutant = Mutant(self.combination, anchor, factor)
            self.matches_reference(next(iter(self.cases)), base, "closure", combination=mutant)

    def test_mutant_with_factor_one_survives(self):
        mutant = Mutant(self.combination, "g", 1.0)
        self.matches_reference(next(iter(self.cases)), "sgd", "closure", combination=mutant)

    @pytest.mark.parametrize("base", BASES)
    def test_rho_zero_is_the_base_to_the_bit(self, base):
        model, other = net(dropout=0.0), net(dropout=0.0)
        rules = {"combination": self.combination, "cadence": Periodic(self.interval)}
        optimizer = steppe.SAM(BASES[base](model.parameters()), rho=0.0, model=model, **rules)
        train(model, optimizer, by_closure, 5)
        train(other, BASES[base](other.parameters()), plain, 5)
        assert model_bits(model) == model_bits(other)

    def test_zero_and_absent_gradients_leave_the_weights_unchanged(self):
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), combination=self.combination, cadence=Periodic(2))
        for _ in range(3):
            by_closure(optimizer, lambda: 0.0 * w.sum())
        by_closure(optimizer, lambda: torch.zeros((), requires_grad=True))
        with pytest.warns(UserWarning, match="no pass of this step made a gradient"):  # from the second such step on
            by_closure(optimizer, lambda: torch.zeros((), requires_grad=True))
        by_closure(optimizer, lambda: torch.zeros((), requires_grad=True))
        assert torch.equal(w.detach(), torch.ones(3))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_lower_precision_is_close_and_gradients_are_only_read(self, dtype):
        generator = torch.Generator().manual_seed(0)
        g = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(30, 4), (5,), (2, 3, 4, 4)]]
        g_s = [c + 0.5 * torch.randn(c.shape, generator=generator, dtype=torch.float64) for c in g]
        outcomes = []
        for kind in (torch.float64, dtype):
            low, low_s = [c.to(kind) for c in g], [p.to(kind) for p in g_s]
            low_s[2] = low_s[2].to(memory_format=torch.channels_last)
            point = steppe.Point(low, low, [0.1] * 3, [{}] * 3, 0)
            outcomes.append([*self.combination(point, low_s), *self.combination(point, None)])
            assert all(torch.equal(x, c.to(kind)) for x, c in zip(low, g, strict=True)), "g was written to"
            assert all(torch.equal(x, p.to(kind)) for x, p in zip(low_s, g_s, strict=True)), "g_s was written to"
            assert {x.dtype for x in outcomes[-1]} == {kind}
        for want, got in zip(*outcomes, strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * eps)

    def test_no_value_is_read_on_the_host(self):
        with FakeTensorMode():  # reading a value raises
            g, g_s = ([torch.empty(s, device="cuda") for s in [(3, 2), (5,)]] for _ in range(2))
            point = steppe.Point(g, g, [0.1] * 2, [{}] * 2, 0)
            for update in (self.combination(point, g_s), self.combination(point, None)):
                assert [d.shape for d in update] == [x.shape for x in g]
                assert {d.device.type for d in update} == {"cuda"}
