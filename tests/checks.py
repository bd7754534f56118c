"""Checks of the contract, shared by the tests."""

import copy
import functools
from collections.abc import Callable

import torch

import steppe
from reference import asam_e, sam_e, trajectory
from support import BASES, DRIVES, bits, model_bits, net, saved_and_loaded, train

# Ten numbers in three tensors, and a loss that is neither quadratic nor symmetric.
SHAPES = [(2, 3), (3,), ()]


def bumpy(w: torch.Tensor) -> torch.Tensor:
    a = torch.linspace(-1.0, 1.5, w.numel(), dtype=w.dtype)
    return (torch.sin(3 * w) + (w - a).square() * torch.linspace(0.3, 2.0, w.numel(), dtype=w.dtype)).sum() + (
        w.prod() + w.roll(1).mul(w).sum()
    )


def split(w: torch.Tensor) -> list[torch.Tensor]:
    sizes = [torch.Size(s).numel() for s in SHAPES]
    return [part.clone().reshape(s) for part, s in zip(w.split(sizes), SHAPES, strict=True)]


RULES = {
    "sam": (steppe.L2(), lambda w, g: sam_e(w, g, 0.3)),
    "asam": (steppe.Adaptive(eta=0.01), lambda w, g: asam_e(w, g, 0.3)),
}


def start() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(10, dtype=torch.float64)


@functools.cache  # the mutants of a rule are compared with the same weights
def weights_of_reference(rule: str, base: str, steps: int, interval: int) -> torch.Tensor:
    return trajectory(bumpy, start(), RULES[rule][1], BASES[base], steps, interval)


def matches_reference(rule: str, base: str, drive: str, *, interval: int = 1, steps: int = 20) -> None:
    """Assert that 20 steps in float64 agree with the slow reference to 1e-12."""
    want = weights_of_reference(rule, base, steps, interval)
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = steppe.SAM(BASES[base](params), rho=0.3, perturbation=RULES[rule][0], cadence=steppe.Periodic(interval))
    for _ in range(steps):
        DRIVES[drive](optimizer, lambda: bumpy(torch.cat([p.reshape(-1) for p in params])))
    got = torch.cat([p.detach().reshape(-1) for p in params])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def restores_exactly(drive: str, dtype: torch.dtype, *, rho: float = 0.7) -> None:
    """Assert that steps with lr = 0 leave the same bits in the same storage."""
    model = net(dtype=dtype)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = steppe.SAM(base, rho=rho, model=model)
    before, pointers = bits(model.parameters()), [p.data_ptr() for p in model.parameters()]
    train(model, optimizer, DRIVES[drive], 5)
    assert bits(model.parameters()) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers


class MeanGradient(steppe.Adaptive):
    """A rule with a memory: perturb along an exponential mean of the gradient."""

    def __call__(self, point: steppe.Point) -> steppe.ScaledDirection:
        direction = []
        for memory, g in zip(point.memory_of(self), point.gradients, strict=True):
            memory["mean"] = g.clone() if "mean" not in memory else memory["mean"].lerp(g, 0.2)
            direction.append(memory["mean"])
        return steppe.ScaledDirection(direction, 1.0)


def build_with_memory(base: str, model: torch.nn.Module) -> steppe.SAM:
    return steppe.SAM(
        BASES[base](model.parameters()), rho=0.1, model=model, perturbation=MeanGradient(), cadence=steppe.Periodic(2)
    )


def resumes(make: Callable[[torch.nn.Module], steppe.SAM], drive: str, *, after: int = 3, steps: int = 8) -> None:
    """Assert that a run resumed from a file after some steps ends with the same bits as one without interruption."""
    straight = net()
    torch.manual_seed(11)
    train(straight, make(straight), DRIVES[drive], steps)

    model = net()
    torch.manual_seed(11)
    optimizer = make(model)
    train(model, optimizer, DRIVES[drive], after)
    saved_model, saved_optimizer, rng = saved_and_loaded(
        [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    )

    fresh = net(seed=99)
    fresh_optimizer = make(fresh)
    fresh.load_state_dict(saved_model)
    fresh_optimizer.load_state_dict(state_dict=copy.deepcopy(saved_optimizer))
    torch.set_rng_state(rng)
    train(fresh, fresh_optimizer, DRIVES[drive], steps - after, start=after)
    assert model_bits(fresh) == model_bits(straight)
