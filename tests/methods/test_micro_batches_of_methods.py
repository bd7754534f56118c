"""A perturbation for each micro-batch, with every method: against slow references of the papers, or an error."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from linear_batch import gradient, per_sample, problem
from named_methods import RULE_METHODS, TOTAL_STEPS
from torch import Tensor, nn

import steppe
from steppe import closures, variants
from steppe.methods.registry import CARDS, FUNCTIONS

LR, RHO, STEPS, M = 0.05, 0.3, 6, 3  # 8 samples in micro-batches of 3, 3 and 2


def sgd(params, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=momentum)


def by_function(optimizer, p, x):
    return closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=M)


def by_passes(optimizer, p, x):
    optimizer.zero_grad()
    for part in x.split(M):
        share = len(part) / len(x)
        for sam_pass in optimizer.passes(accumulate=True, loss_weight=share):
            with sam_pass:
                (share * per_sample(p, part).mean()).backward()
    optimizer.step()


DRIVES = {"micro_batches": by_function, "passes": by_passes}
both_drives = pytest.mark.parametrize("drive", DRIVES)


def trained(make, drive: str, steps: int = STEPS) -> tuple[Tensor, steppe.SAM]:
    w, x = problem()
    p = nn.Parameter(w.clone())
    optimizer = make([p])
    for _ in range(steps):
        DRIVES[drive](optimizer, p, x)
    return p.detach(), optimizer


def normal(name: str, step: int, micro_batch: int) -> Tensor:
    """The noise of a rule with seed 0 for the first parameter, of three numbers."""
    text = f"{name}/0/{step}/0" + (f"/{micro_batch}" if micro_batch else "")
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.empty(3, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(key))


# Slow references: the update gradient of one micro-batch, and what it keeps.


class Reference:
    """Base with the mean over the micro-batches of ``update(w, part)``, and the mean of what each keeps."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None  # what the method keeps from step to step

    def e(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        """The perturbation of a micro-batch, and what it would keep if it were the whole batch."""
        return RHO * g / g.norm(), None

    def update(self, g: Tensor, g_s: Tensor) -> Tensor:
        return g_s

    def run(self) -> Tensor:
        w, x = problem()
        w.requires_grad_()
        base = sgd([w])
        for step in range(STEPS):
            self.step, update, kept = step, torch.zeros_like(w), None
            self.outside = torch.zeros_like(w)
            for i, part in enumerate(x.split(M)):
                self.micro_batch, share = i, len(part) / len(x)
                g = gradient(w.detach(), part)
                e, own = self.e(g)
                g_s = gradient(w.detach() + e, part)
                update += share * self.update(g, g_s)
                self.outside += share * (g_s - g)
                if own is not None:
                    kept = share * own + (0 if kept is None else kept)
            self.kept = kept
            w.grad = update
            base.step()
            self.after(w)
        return w.detach()

    def after(self, w: Tensor) -> None:
        """Change w after the step of the base."""


class FisherReference(Reference):
    def e(self, g):  # rho F^-1 g / sqrt(g' F^-1 g), F = 1 + g^2
        d = g / (1 + g.square())
        return RHO * d / (g @ d).sqrt(), None


class VassoReference(Reference):
    def e(self, g):  # d_t = (1 - theta) d_{t-1} + theta g_t, from the first g
        d = g if self.kept is None else 0.1 * self.kept + 0.9 * g
        return RHO * d / d.norm(), d


class FriendlyReference(Reference):
    def e(self, g):  # d = g - sigma m, m_t = lambda m_{t-1} + (1 - lambda) g_t
        m = 0.9 * (torch.zeros_like(g) if self.kept is None else self.kept) + 0.1 * g
        d = g - 0.5 * m
        return RHO * d / d.norm(), m


class GsamReference(Reference):
    def update(self, g, g_s):  # g_s - alpha times the part of g orthogonal to g_s
        return g_s - 0.4 * (g - (g @ g_s) / (g_s @ g_s) * g_s)


class PgnReference(Reference):
    def update(self, g, g_s):
        return 0.2 * g + 0.8 * g_s


class WsamReference(Reference):
    def update(self, g, g_s):
        return g + 0.75 / 0.25 * (g_s - g)


class DecoupledReference(Reference):
    def update(self, g, g_s):
        return g

    def after(self, w):
        with torch.no_grad():
            w -= LR * 0.75 / 0.25 * self.outside


class NoiseReference(Reference):
    def e(self, g):  # each micro-batch has its own noise
        r = normal("Random", self.step, self.micro_batch)
        return RHO * r / r.norm(), None


REFERENCES: dict[str, tuple[Callable[..., steppe.SAM], type[Reference]]] = {
    "sam": (lambda base: variants.sam(base, RHO), Reference),
    "fisher_sam": (lambda base: variants.fisher_sam(base, RHO), FisherReference),
    "vasso": (lambda base: variants.vasso(base, RHO, theta=0.9), VassoReference),
    "friendly_sam": (lambda base: variants.friendly_sam(base, RHO, sigma=0.5, lmbda=0.9), FriendlyReference),
    "gsam": (lambda base: variants.gsam(base, RHO, alpha=0.4), GsamReference),
    "pgn": (lambda base: variants.pgn(base, RHO, alpha=0.8), PgnReference),
    "wsam": (lambda base: variants.wsam(base, RHO, gamma=0.75), WsamReference),
    "decoupled_wsam": (lambda base: variants.wsam(base, RHO, gamma=0.75, decoupled=True), DecoupledReference),
    "rwp": (lambda base: steppe.SAM(base, RHO, perturbation=steppe.GaussianNoise()), NoiseReference),
}


@both_drives
@pytest.mark.parametrize("name", REFERENCES)
def test_c19_micro_batches_match_the_slow_reference_of_the_method(name, drive):
    make, reference = REFERENCES[name]
    w, _ = trained(lambda params: make(sgd(params)), drive)
    torch.testing.assert_close(w, reference().run(), rtol=1e-12, atol=1e-12)


BSAM = {"n_data": 40, "betas": (0.8, 0.7), "weight_decay": 0.01, "damping": 0.2}


@both_drives
def test_c19_bsam_matches_algorithm_one_with_a_batch_in_parts(drive):
    w, optimizer = trained(lambda params: variants.bsam(params, 0.02, 0.2, **BSAM), drive)
    mean, x = problem()
    s, g_m = torch.ones_like(mean), torch.zeros_like(mean)
    for step in range(STEPS):
        g_e, size = torch.zeros_like(mean), torch.zeros_like(mean)
        for i, part in enumerate(x.split(M)):
            share = len(part) / len(x)
            g = gradient(mean + normal(f"BSAM/{i}", step, 0) / (40 * s).sqrt(), part)
            g_e += share * gradient(mean + 0.2 * g / s, part)
            size += share * g.abs()
        g_m = 0.8 * g_m + 0.2 * (g_e + 0.01 * mean)
        s = 0.7 * s + 0.3 * (s.sqrt() * size + 0.01 + 0.2)
        mean = mean - 0.02 * g_m / s
    torch.testing.assert_close(w, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(next(iter(optimizer.state.values()))["scale"], s, rtol=1e-12, atol=1e-12)


# Every method of the registry.

RANDOM = {"rwp", "mixed_rwp", "esam", "bsam"}  # micro-batches differ by their noise
REFUSED = {
    *("arwp", "mixed_arwp", "aesam", "looksam", "stale_sam"),
    *("sparse_sam", "dynamic_sparse_sam", "lookbehind_sam", "sampa"),
}
WRAPPERS = sorted({*RULE_METHODS, "lookbehind_sam", "sampa"})


def build(name: str, params) -> steppe.SAM:
    arguments = {"rho": RHO, **CARDS[name].short_arguments(total_steps=TOTAL_STEPS)}
    if name == "sam_on":
        arguments["only"] = params
    if name == "layerwise_sam":
        arguments.pop("model", None)
    return FUNCTIONS[name](sgd(params), **arguments)


def one_step(name: str, parts: list[Tensor], steps: int = 2) -> Tensor:
    p = nn.Parameter(problem()[0].clone())
    optimizer = build(name, [p])
    x = torch.cat(parts)
    for _ in range(steps):
        closures.micro_batches(optimizer, lambda x: per_sample(p, x).mean(), (x,), m=len(parts[0]))
    return p.detach()


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in REFUSED | RANDOM | {"sam_on"}])
def test_c19_equal_micro_batches_are_one_and_their_order_has_no_effect(name):
    a, b = problem()[1].split(4)
    torch.testing.assert_close(one_step(name, [a, a]), one_step(name, [a]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one_step(name, [a, b]), one_step(name, [b, a]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name in REFUSED])
def test_c19_method_that_cannot_have_micro_batches_raises_before_any_pass(name):
    p = nn.Parameter(problem()[0].clone())
    optimizer, calls = build(name, [p]), []
    with pytest.raises(RuntimeError, match=r"micro-batch.*[Rr]un all micro-batches inside each pass"):
        closures.micro_batches(optimizer, calls.append, (problem()[1],), m=4)
    assert not calls
    optimizer.step(lambda: (optimizer.zero_grad(), per_sample(p, problem()[1]).mean().backward())[0])  # still usable


@pytest.mark.parametrize("name", ["fisher_sam", "vasso", "friendly_sam", "bsam"])
def test_c19_rule_that_depends_on_the_size_of_the_gradient_needs_the_loss_weight(name):
    p = nn.Parameter(problem()[0].clone())
    optimizer = variants.bsam([p], n_data=10) if name == "bsam" else build(name, [p])
    with pytest.raises(RuntimeError, match=r"depends on the size of the gradients.*loss_weight=len\(part\)"):
        next(optimizer.passes(accumulate=True))


def test_loss_weight_for_some_micro_batches_only_raises():
    w, x = problem()
    p = nn.Parameter(w)
    optimizer = variants.sam(sgd([p]), RHO)
    for sam_pass in optimizer.passes():
        with sam_pass:
            per_sample(p, x).mean().backward()
    with pytest.raises(RuntimeError, match="for some micro-batches of this step only"):
        next(optimizer.passes(accumulate=True, loss_weight=0.5))


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_loss_weight_out_of_range_raises(share):
    with pytest.raises(ValueError, match="loss_weight must be more than 0 and at most 1"):
        next(variants.sam(sgd([nn.Parameter(torch.ones(1))])).passes(loss_weight=share))


def test_micro_batches_of_one_step_do_not_affect_the_next_step():
    w, x = problem()
    ends = []
    for drive in (True, False):
        p = nn.Parameter(w.clone())
        optimizer = variants.fisher_sam(sgd([p]), RHO)
        for step in range(3):
            if drive and step == 1:
                for sam_pass in optimizer.passes(loss_weight=0.25):
                    with sam_pass:
                        (per_sample(p, x).mean() / 4).backward()
                optimizer.zero_grad()  # discarded
            optimizer.step(lambda: per_sample(p, x).mean())  # noqa: B023
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_noise_of_each_micro_batch_is_its_own_and_the_same_in_another_run():
    p, runs = nn.Parameter(torch.zeros(3, dtype=torch.float64)), []
    for _ in range(2):
        optimizer, seen = variants.rwp(sgd([p]), RHO, filterwise=False), []
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                for sam_pass in optimizer.passes(accumulate=True):
                    with sam_pass:
                        seen.append(tuple(p.tolist()))
                        (0 * p).sum().backward()
            optimizer.step()
        runs.append(seen)
    assert len(set(runs[0])) == 6
    assert runs[0] == runs[1]
