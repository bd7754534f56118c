"""The tests that every perturbation must pass: subclass :class:`PerturbationTests` in the test file of the method."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from slow_reference import Reference, trajectory
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from checks import bumpy, resumes
from steppe._engine import engine, wrapper
from steppe._engine import state_dict as checkpoints
from steppe._tensors import random as random_tensors
from steppe.rules import Perturbation, Point, ScaledDirection
from support import BASES, DRIVES, batch, bits, by_closure, net, train

RHO = 0.1
SHAPES = [(3, 4), (2, 2, 3), (5,), ()]


def start() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def loss(w: list[torch.Tensor], t: int) -> torch.Tensor:
    """A bumpy loss with another slope for each batch: without noise, F-SAM's perturbation would vanish."""
    flat = torch.cat([part.reshape(-1) for part in w])
    slope = torch.randn(flat.numel(), dtype=flat.dtype, generator=torch.Generator().manual_seed(t))
    return bumpy(flat) + slope @ flat


def point(g: list[torch.Tensor], memory: dict | None = None, w: list[torch.Tensor] | None = None) -> Point:
    w = [torch.zeros_like(part) for part in g] if w is None else w
    return Point(w, g, [RHO] * len(g), [{}] * len(g), 0, {} if memory is None else memory)


def e(rule: Perturbation, point: Point) -> list[torch.Tensor]:
    direction, scale = rule(point)
    parts = zip(point.rho, direction, point.weights, strict=True)
    return [torch.zeros_like(w) if d is None else rho * scale * d for rho, d, w in parts]


def length(x: list[torch.Tensor]) -> float:
    return float(torch.cat([part.reshape(-1) for part in x]).norm())


def gradients(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def build_with(rule: Perturbation, base: str) -> Callable[[torch.nn.Module], steppe.SAM]:
    return lambda model: steppe.SAM(BASES[base](model.parameters()), rho=0.1, model=model, perturbation=rule)


def assert_length_is_rho(rule: Perturbation) -> None:
    memory, w = {}, start()
    torch.manual_seed(0)
    for _ in range(3):
        assert length(e(rule, point(gradients(), memory, w))) == pytest.approx(RHO, rel=1e-12)


def assert_equals_sam(rule: Perturbation) -> None:
    """e is SAM's at each of three steps."""
    memory, w = {}, start()
    torch.manual_seed(5)
    for _ in range(3):
        g = gradients()
        torch.testing.assert_close(e(rule, point(g, memory, w)), e(steppe.L2(), point(g, w=w)))


def assert_reads_no_value_on_the_host(rule: Perturbation, monkeypatch: pytest.MonkeyPatch, **rules: Any) -> None:
    """Tensors without values refuse to be read; a build without CUDA has no generators for it.

    ``rules`` are those of the other slots.
    """
    monkeypatch.setattr(random_tensors, "generator", lambda device, key: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in [(3, 4), (5,)]]
        optimizer = steppe.SAM(torch.optim.SGD(params, lr=0.1), rho=0.1, perturbation=rule, **rules)

        def set_gradients():
            for p in params:
                p.grad = torch.ones_like(p)

        for _ in range(8):
            optimizer.step(set_gradients)
        assert optimizer._engine.steps == 8


def assert_float16_gradients_of_any_size_work(rule: Perturbation, size: float) -> None:
    """e agrees with that in float64, although 300 squared, and 1 / 1e-7, are beyond float16."""
    torch.manual_seed(0)
    g = [(size * torch.randn(shape).clamp(-1, 1)).half() for shape in SHAPES]
    w = [torch.randn(shape).half() for shape in SHAPES]
    got = e(rule, point(g, w=w))
    want = e(rule, point([part.double() for part in g], w=[part.double() for part in w]))
    torch.testing.assert_close([part.double() for part in got], want, rtol=2e-3, atol=1e-6)


@functools.cache  # the mutants of a rule are compared with the same weights
def weights_of_reference(make_reference: Callable[[], Reference], base: str, steps: int) -> list[torch.Tensor]:
    return trajectory(loss, start(), make_reference(), BASES[base], rho=RHO, steps=steps)


class PerturbationTests:
    """Compare rules with their slow references, break the package, and check the limits of dtypes and gradients."""

    cases: ClassVar[Mapping[str, tuple[Perturbation, Callable[[], Reference]]]]
    """Rules, each with a function that returns its slow reference: a new one for each run, as some have a memory."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test with each case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))

    def rule(self, case: str) -> Perturbation:
        return self.cases[case][0]

    def matches_reference(self, case: str, base: str, *, rule: Perturbation | None = None, steps: int = 20) -> None:
        """20 steps in float64 agree with the slow reference to 1e-12."""
        own, make_reference = self.cases[case]
        want = weights_of_reference(make_reference, base, steps)
        params = [torch.nn.Parameter(p) for p in start()]
        optimizer = steppe.SAM(BASES[base](params), rho=RHO, perturbation=rule or own)
        for t in range(steps):
            by_closure(optimizer, lambda t=t: loss(params, t))
        torch.testing.assert_close([p.detach() for p in params], want, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("base", ["sgd", "adamw"])
    def test_rule_matches_its_slow_reference(self, case, base):
        self.matches_reference(case, base)

    @pytest.mark.parametrize("factor", [0.0, -1.0, 0.999])
    def test_mutant_wrong_length_or_sign_of_e_is_killed(self, monkeypatch, case, factor):
        perturb = engine.Engine.perturb

        def mutant(self, point, perturbation):
            e = perturbation(point)
            perturb(self, point, lambda _: ScaledDirection(e.direction, e.scale * factor))

        monkeypatch.setattr(engine.Engine, "perturb", mutant)
        with pytest.raises(AssertionError):
            self.matches_reference(case, "sgd")

    def test_mutant_plain_sam_is_killed(self, case):
        with pytest.raises(AssertionError):
            self.matches_reference(case, "sgd", rule=steppe.L2())

    def test_zero_gradient_gives_zero_at_first_and_finite_e_later(self, case):
        rule, memory = self.rule(case), {}
        w = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        zero = [torch.zeros(shape) for shape in SHAPES]
        assert all((part == 0).all() for part in e(rule, point(zero, memory, w)))
        torch.manual_seed(1)
        assert length(e(rule, point(gradients(torch.float32), memory, w))) > 0
        assert all(part.isfinite().all() for part in e(rule, point(zero, memory, w)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_weights_are_restored_exactly(self, case, dtype):
        model = net(dtype=dtype)
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer = steppe.SAM(base, rho=0.7, model=model, perturbation=self.rule(case))
        before, is_moved = bits(model.parameters()), []
        model.register_forward_pre_hook(lambda *_: is_moved.append(bits(model.parameters()) != before))
        train(model, optimizer, DRIVES["closure"], 5)
        assert is_moved == [False, True] * 5
        assert bits(model.parameters()) == before
        assert optimizer.skipped_steps == 0

    def test_gradient_is_only_read(self, case):
        torch.manual_seed(0)
        rule, g, w = self.rule(case), gradients(torch.float32), [torch.zeros(shape) for shape in SHAPES]
        before, memory = bits(g), {}
        for _ in range(2):
            rule(point(g, memory, w))
        assert bits(g) == before
        kept = [t for own in memory.get(type(rule).__name__, {}).values() for t in own.values()]
        assert all(t.data_ptr() != part.data_ptr() for t in kept for part in g)

    def test_no_value_is_read_on_the_host(self, monkeypatch, case):
        assert_reads_no_value_on_the_host(self.rule(case), monkeypatch)

    def test_training_reduces_the_loss(self, case):
        model = net(dropout=0.0)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = steppe.SAM(base, rho=1e-3, model=model, perturbation=self.rule(case))
        x, y = batch()
        values = [
            by_closure(optimizer, lambda: torch.nn.functional.cross_entropy(model(x), y)).item() for _ in range(15)
        ]
        assert values[-1] < 0.7 * values[0]

    def test_complex_parameters_are_perturbed_as_their_real_views(self, case):
        torch.manual_seed(4)
        z = [torch.randn(3, 2, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)]
        slope = torch.randn(20, dtype=torch.float64)
        ends = []
        for params in (
            [torch.nn.Parameter(p.clone()) for p in z],
            [torch.nn.Parameter(torch.view_as_real(p)) for p in z],
        ):
            optimizer = steppe.SAM(torch.optim.SGD(params, lr=0.05), rho=RHO, perturbation=self.rule(case))

            def numbers(params=params):
                real = [torch.view_as_real(p) if p.is_complex() else p for p in params]
                return torch.cat([p.reshape(-1) for p in real])

            for t in range(8):
                by_closure(optimizer, lambda t=t, n=numbers: bumpy(n()) + n() @ slope.roll(t))
            ends.append(numbers().detach())
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)

    def test_each_group_is_perturbed_with_its_own_rho(self, case):
        perturbations = []
        for radii in ((RHO, RHO), (RHO, 3 * RHO)):
            params = [torch.nn.Parameter(p) for p in start()]
            groups = [{"params": params[:2], "sam_rho": radii[0]}, {"params": params[2:], "sam_rho": radii[1]}]
            optimizer = steppe.SAM(torch.optim.SGD(groups, lr=0.0), rho=RHO, perturbation=self.rule(case))
            points = []

            def value(params=params, points=points):
                points.append([p.detach().clone() for p in params])
                return loss(params, 0)

            by_closure(optimizer, value)
            perturbations.append([perturbed - w for w, perturbed in zip(*points, strict=True)])
        (a, b, c, d), other = perturbations
        assert any(part.any() for part in perturbations[0])
        torch.testing.assert_close(other, [a, b, 3 * c, 3 * d])


class PerturbationWithMemoryTests(PerturbationTests):
    """The tests of a perturbation that keeps tensors from step to step."""

    def test_mutant_memory_of_one_step_is_killed(self, monkeypatch, case):
        monkeypatch.setattr(Point, "memory_of", lambda self, rule: [{} for _ in self.parameters])
        with pytest.raises(AssertionError):
            self.matches_reference(case, "sgd")

    @pytest.mark.parametrize("base", ["sgd", "adamw"])
    def test_resumed_run_has_the_same_bits(self, case, base):
        resumes(build_with(self.rule(case), base), "closure")

    def test_mutant_checkpoint_without_memory_is_killed(self, monkeypatch, case):
        monkeypatch.setattr(wrapper, "pack", lambda base, memory, step: checkpoints.pack(base, {}, step))
        with pytest.raises(AssertionError):
            resumes(build_with(self.rule(case), "sgd"), "closure")

    def test_gradient_with_infinity_does_not_change_the_memory(self, case):
        """On an accelerator a rule gets such a gradient, because nothing has been read on the host yet."""
        torch.manual_seed(0)
        rule = self.rule(case)
        w, with_bad, without = start(), {}, {}
        good = gradients()
        bad = [good[0], good[1] * float("inf"), *good[2:]]
        rule(point(good, with_bad, w))
        rule(point(bad, with_bad, w))
        rule(point(good, without, w))
        torch.testing.assert_close(with_bad, without, rtol=0, atol=0)
        first = {}
        rule(point(bad, first, w))
        assert all(part.isfinite().all() for part in e(rule, point(good, first, w)))


class RunningMeanTests(PerturbationWithMemoryTests):
    """The tests of a perturbation along a running mean, whose length is rho."""

    def test_length_of_e_is_rho(self, case):
        assert_length_is_rho(self.rule(case))

    def test_parameter_that_joins_later_starts_its_own_memory(self, case):
        rule, memory = self.rule(case), {}
        w, g = start(), start()
        rule(point(g[:2], memory, w[:2]))
        assert length(e(rule, point(g, memory, w))) == pytest.approx(RHO)
        assert set(memory[type(rule).__name__]) == set(w)
