"""The contract as checks that anyone can run on a rule, or on any combination of rules.

Every check takes ``make``, which builds your optimizer around a model that the check gives it, and raises
``AssertionError`` when the statement in its first line does not hold. :data:`CHECKS` has all of them:

>>> import steppe, torch
>>> def make(model):
...     base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
...     return steppe.SAM(base, rho=0.1, model=model, perturbation=steppe.Adaptive())
>>> for check in CHECKS:
...     check(make)

They know nothing of what the rule should do; :func:`matches_reference` compares it with your own slow reference. Under
pytest, ``@pytest.mark.parametrize("check", steppe.testing.CHECKS)`` makes a test of each. They run on the CPU in a few
seconds; no GPU is needed to see that a rule does not wait for one.
"""

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from steppe._tensors import random as random_tensors
from steppe.rules import ascent_steps, needs_gradient
from steppe.rules.perturbed import Perturbed
from steppe.sam import SAM

Make = Callable[[nn.Module], SAM]
Check = Callable[[Make], None]


class Net(nn.Module):
    """A small network with all that a second pass can spoil: BatchNorm, a cumulative one too, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8, momentum=None),
            nn.Dropout(0.3),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (n, 3) for inputs of shape (n, 6)."""
        logits: Tensor = self.layers(x)
        return logits


def resumes_to_the_bit(make: Make) -> None:
    """A run that goes through a checkpoint, at any step, ends with the same bits as one that does not."""
    straight = _net()
    _train(straight, make(straight), 9)
    for after in (1, 4):
        model = _net()
        optimizer = make(model)
        _train(model, optimizer, after)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        model = _net(seed=9)
        optimizer = make(model)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        _train(model, optimizer, 9 - after, start=after)
        _same_bits(straight, model, f"a checkpoint after step {after} does not hold all that the next steps depend on")


def copies_go_on_alike(make: Make) -> None:
    """A deep copy of model and optimizer takes the same next steps, to the bit."""
    model = _net()
    optimizer = make(model)
    _train(model, optimizer, 3)
    twin, theirs = copy.deepcopy((model, optimizer))
    _train(model, optimizer, 3, start=3)
    _train(twin, theirs, 3, start=3)
    _same_bits(model, twin, "something that the next step depends on is not copied with the optimizer")


def rules_are_stateless(make: Make) -> None:
    """Two optimizers that share the rule objects do not disturb each other."""
    alone = _net()
    _train(alone, make(alone), 6)
    model, other = _net(), _net(seed=5)
    optimizer = make(model)
    base = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    neighbor = SAM(
        base,
        0.3,
        model=other,
        perturbation=optimizer.perturbation,
        combination=optimizer.combination,
        cadence=optimizer.cadence,
    )
    for step in range(6):
        _train(other, neighbor, 1, start=step + 50)
        _train(model, optimizer, 1, start=step)
    _same_bits(alone, model, "a rule keeps state in itself: memory belongs into Point.memory_of(self)")


def weights_come_back_exactly(make: Make) -> None:
    """Between two passes, and after an exception in any of them, the weights are at w, to the bit, in place."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _net().to(dtype)
        optimizer = make(model)
        _train(model, optimizer, 2)
        for fail_in in (None, *range(ascent_steps(optimizer.perturbation) + 1)):
            before = _bits(model.parameters())
            try:
                for number, sam_pass in enumerate(optimizer.passes()):
                    with sam_pass:
                        _loss(model, 7).backward()  # type: ignore[no-untyped-call]
                        if number == fail_in:
                            raise _InterruptedError
                    _expect(_bits(model.parameters()) == before, f"the weights are not at w after a pass ({dtype})")
            except _InterruptedError:
                pass
            _expect(_bits(model.parameters()) == before, f"the weights did not come back in place ({dtype})")
            optimizer.restore()
        _train(model, optimizer, 3)
        _expect(all(p.isfinite().all() for p in model.parameters()), f"the weights are not finite ({dtype})")


def surroundings_are_those_of_one_pass(make: Make) -> None:
    """Buffers and random generators are what one ordinary pass at w would have left."""
    model, twin = _net(), _net()
    optimizer = make(model)
    _train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    states = []
    for network in (twin, model):
        torch.manual_seed(11)
        if network is twin:
            _loss(twin, 7)
        else:
            for sam_pass in optimizer.passes():
                with sam_pass:
                    _loss(model, 7).backward()  # type: ignore[no-untyped-call]
                    climbed_only = sam_pass.is_perturbed and sam_pass.is_first
        states.append(torch.get_rng_state())
    _expect(torch.equal(*states), "the random generators moved on by more than one pass")
    if not climbed_only:  # where the only pass is at w + e, its statistics are those of w + e
        _expect(
            _values(model.buffers()) == _values(twin.buffers()), "a pass at w + e left its trace in the model's buffers"
        )


def radius_zero_is_the_base(make: Make) -> None:
    """With rho = 0 the steps are the base optimizer's: to the bit where g_s goes down, else up to rounding."""
    model, twin = _net(), _net()
    optimizer, plain = make(model), make(twin).base
    for group in (*optimizer.param_groups, *plain.param_groups):
        group["sam_rho"] = 0.0
    for step in range(6):
        torch.manual_seed(step)
        optimizer.step(_closure(model, optimizer, step))
        torch.manual_seed(step)
        plain.zero_grad()
        _loss(twin, step).backward()  # type: ignore[no-untyped-call]
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    if isinstance(optimizer.combination, Perturbed):
        _same_bits(model, twin, "with rho = 0 it is not the base optimizer")


def what_is_not_finite_is_skipped(make: Make) -> None:
    """A NaN in any pass skips the step, weights untouched, and is never remembered."""
    for bad in range(max(_passes(make, 20))):
        model = _net()
        optimizer = make(model)
        _train(model, optimizer, 2)
        calls: list[int] = []

        def poisoned(model: nn.Module = model, calls: list[int] = calls, bad: int = bad) -> Tensor:
            calls.append(1)
            return _loss(model, 7) * (float("nan") if len(calls) == bad + 1 else 1.0)

        for _ in range(20):
            before = _bits(model.parameters())
            calls.clear()
            with _skips_are_expected():
                optimizer.step(_backward(optimizer, poisoned))
            if optimizer.skipped_steps:
                break
        _expect(optimizer.skipped_steps == 1, f"a NaN in pass {bad + 1} did not skip the step")
        _expect(_bits(model.parameters()) == before, "a skipped step changed the weights")
        with _skips_are_expected():
            _train(model, optimizer, 12, start=8)
        _expect(optimizer.skipped_steps == 1, "a NaN was remembered: later steps were skipped too")
        _expect(all(p.isfinite().all() for p in model.parameters()), "a NaN was remembered: the weights are not finite")


def gradients_may_be_absent_or_zero(make: Make) -> None:
    """A parameter with a gradient in one pass only, or in none, and gradients that are zero, stay finite."""
    for absent in (
        (lambda sam_pass: sam_pass.is_perturbed),
        (lambda sam_pass: not sam_pass.is_perturbed),
        (lambda sam_pass: True),
    ):
        model = _net()
        optimizer = make(model)
        for step in range(4):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    _loss(model, step).backward()  # type: ignore[no-untyped-call]
                    if absent(sam_pass):
                        model.layers[3].weight.grad = None
            optimizer.step()
        _expect(
            all(p.isfinite().all() for p in model.parameters()), "an absent gradient made weights that are not finite"
        )
    model = _net()
    optimizer = make(model)
    with _skips_are_expected():
        for step in range(3):
            optimizer.step(_backward(optimizer, lambda: _loss(model, step) * 0.0))  # noqa: B023
    _expect(not optimizer.skipped_steps, "a zero gradient made a climb that is not finite: 0 / 0? The step was skipped")
    _expect(all(p.isfinite().all() for p in model.parameters()), "a zero gradient made weights that are not finite")


def complex_parameters_work(make: Make) -> None:
    """A complex parameter climbs and goes down like the real one of twice the size that it is."""
    ends = []
    for as_complex in (True, False):
        model = _Complex(as_complex)
        optimizer = make(model)
        for _ in range(4):
            optimizer.step(_backward(optimizer, model))
        ends.append(torch.view_as_real(model.w.detach()) if as_complex else model.w.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def nothing_waits_for_the_device(make: Make) -> None:
    """No value is read on the host: shown with fake CUDA tensors. A cadence that goes by the gradient has to."""
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(random_tensors, "generator", return_value=None):
        model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.LayerNorm(3, device="meta"))
        for layer in model:
            for name, p in layer.named_parameters():
                setattr(layer, name, nn.Parameter(torch.empty(p.shape, device="cuda")))
        optimizer = make(model)
        if needs_gradient(optimizer.cadence):
            return

        def give() -> None:
            for p in model.parameters():
                p.grad = torch.ones_like(p)

        for _ in range(12):
            optimizer.step(give)


CHECKS: tuple[Check, ...] = (
    resumes_to_the_bit,
    copies_go_on_alike,
    rules_are_stateless,
    weights_come_back_exactly,
    surroundings_are_those_of_one_pass,
    radius_zero_is_the_base,
    what_is_not_finite_is_skipped,
    gradients_may_be_absent_or_zero,
    complex_parameters_work,
    nothing_waits_for_the_device,
)
"""Every check that takes ``make`` alone."""


def passes_per_step(make: Make, steps: int = 60) -> float:
    """Count what a step costs: forward+backward passes over the batch, on average over so many steps.

    >>> import steppe
    >>> def looksam(model):
    ...     return steppe.variants.looksam(torch.optim.SGD(model.parameters(), lr=0.1), k=5, model=model)
    >>> passes_per_step(looksam)
    1.2
    """
    counts = list(_passes(make, steps))
    return sum(counts) / len(counts)


def matches_reference(
    make: Callable[[list[nn.Parameter]], SAM],
    climb: Callable[[Tensor, Tensor], Tensor],
    down: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    *,
    climbs_at: Callable[[int], bool] = lambda step: True,
    steps: int = 20,
    tolerance: float = 1e-12,
) -> None:
    """Compare a trajectory in float64 with your slow reference, written in the paper's notation on one flat vector.

    Args:
        make: builds the optimizer around a list of parameters; its base is built alike around the reference's vector.
        climb: (w, g) -> e, flat; called in the order of the steps, so that it may keep a memory of its own.
        down: (g, g_s) -> what the base gets, with g_s = None at a step that does not climb; by default g_s, or g.
        climbs_at: step -> whether the reference climbs.
        steps: how many steps must agree.
        tolerance: relative and absolute, of the weights after each step.

    Raises:
        AssertionError: they differ; or the test could not fail, because no climb and one the other way end alike.

    >>> import steppe
    >>> def make(parameters):
    ...     return steppe.SAM(torch.optim.SGD(parameters, lr=0.03, momentum=0.9), rho=0.3)
    >>> matches_reference(make, climb=lambda w, g: 0.3 * g / g.norm())
    """
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(10, generator=generator, dtype=torch.float64)
    parts = [nn.Parameter(part.clone()) for part in start.tensor_split((6, 9))]
    parts = [nn.Parameter(p.detach().reshape(s)) for p, s in zip(parts, [(2, 3), (3,), ()], strict=True)]
    optimizer = make(parts)
    flat = start.clone().requires_grad_()
    base = make([flat]).base  # type: ignore[list-item]
    e = torch.zeros_like(start)
    for step in range(steps):
        w = flat.detach()
        (g,) = torch.autograd.grad(_bumpy(flat), flat)
        g_s = None
        if climbs_at(step):
            e = climb(w, g)
            moved = (w + e).requires_grad_()
            (g_s,) = torch.autograd.grad(_bumpy(moved), moved)
        flat.grad = (g if g_s is None else g_s) if down is None else down(g, g_s)
        base.step()
        optimizer.step(_backward(optimizer, lambda: _bumpy(torch.cat([p.reshape(-1) for p in parts]))))
        got = torch.cat([p.detach().reshape(-1) for p in parts])
        torch.testing.assert_close(got, flat.detach(), rtol=tolerance, atol=tolerance)
    _expect(bool(e.norm() > 1e-3), "the reference does not climb, so this comparison could not fail: give it a radius")


def _bumpy(w: Tensor) -> Tensor:
    """A loss that is neither quadratic nor symmetric."""
    a = torch.linspace(-1.0, 1.5, w.numel(), dtype=w.dtype)
    slope = torch.linspace(0.3, 2.0, w.numel(), dtype=w.dtype)
    return (torch.sin(3 * w) + (w - a).square() * slope).sum() + w.prod() + w.roll(1).mul(w).sum()


class _InterruptedError(Exception):
    pass


class _Complex(nn.Module):
    def __init__(self, as_complex: bool) -> None:
        super().__init__()
        start = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
        self.w = nn.Parameter(torch.view_as_complex(start) if as_complex else start)
        self.norm = nn.LayerNorm(2, dtype=torch.float64)  # for rules on normalization layers

    def forward(self) -> Tensor:
        w = torch.view_as_real(self.w) if self.w.is_complex() else self.w
        loss: Tensor = (w.square().sum() - 2).square() + (3 * w).sin().sum() + self.norm(w).square().sum()
        return loss


def _net(seed: int = 0) -> Net:
    with _seeded(seed):
        return Net()


@contextmanager
def _skips_are_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a step was skipped", RuntimeWarning)
        yield


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _loss(model: nn.Module, step: int) -> Tensor:
    """The loss on the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 6, generator=generator), torch.randint(3, (12,), generator=generator)
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def _backward(optimizer: Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    return closure


def _closure(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], Tensor]:
    return _backward(optimizer, lambda: _loss(model, step))


def _train(model: nn.Module, optimizer: SAM, steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        with _seeded(step):
            optimizer.step(_closure(model, optimizer, step))


def _passes(make: Make, steps: int) -> Iterator[int]:
    """How many passes each step has."""
    model = _net()
    optimizer = make(model)
    for step in range(steps):
        calls: list[int] = []

        def loss(step: int = step, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return _loss(model, step)

        optimizer.step(_backward(optimizer, loss))
        yield len(calls)


def _bits(tensors: Iterable[Tensor]) -> list[tuple[int, bytes]]:
    """Where each tensor is, and what is in it, to the bit."""
    return [(t.data_ptr(), t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()) for t in tensors]


def _values(tensors: Iterable[Tensor]) -> list[bytes]:
    return [value for _, value in _bits(tensors)]


def _same_bits(one: nn.Module, other: nn.Module, why_not: str) -> None:
    _expect(_values(one.state_dict().values()) == _values(other.state_dict().values()), why_not)


def _expect(holds: bool, why_not: str) -> None:
    if not holds:
        raise AssertionError(why_not)
