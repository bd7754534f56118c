"""examples/quantization_aware.py against SAQ by hand: e is added to the rounded weights."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from example_files import load_example

RHO, LR, MOMENTUM, STEPS = 0.2, 0.1, 0.9, 20
x = torch.rand(30, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y = torch.randint(10, (30,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def example():
    return load_example("quantization_aware.py")


def rounded(w, bits=3):
    step = w.abs().max() / (2 ** (bits - 1) - 1)
    return (w / step).round() * step


def gradients(weights, biases):
    """The gradients by the weights that the layers multiply with, and by the biases."""
    parts = [t.detach().clone().requires_grad_() for t in (*weights, *biases)]
    hidden = F.linear(x, parts[0], parts[2]).relu()
    return torch.autograd.grad(F.cross_entropy(F.linear(hidden, parts[1], parts[3]), y), parts)


def by_hand(model, rho=RHO, *, on_latent=False):
    """arXiv 2111.12273, with the straight-through estimator: e along the gradient by the rounded weights."""
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    moments = [torch.zeros_like(t) for t in (*weights, *biases)]
    for _ in range(STEPS):
        g = gradients([rounded(w) for w in weights], biases)
        length = torch.cat([part.flatten() for part in g]).norm()
        e = [rho * part / length for part in g]
        pairs = list(zip(weights, e[:2], strict=True))
        moved = [rounded(w + d) for w, d in pairs] if on_latent else [rounded(w) + d for w, d in pairs]
        g_s = gradients(moved, [b + d for b, d in zip(biases, e[2:], strict=True)])
        for t, m, part in zip((*weights, *biases), moments, g_s, strict=True):
            m.mul_(MOMENTUM).add_(part)
            t.sub_(LR * m)
    return torch.cat([t.flatten() for t in (*weights, *biases)])


def trained(example, perturb):
    model, optimizer = example.make(perturb, rho=RHO, dtype=torch.float64)
    start, _ = example.make(perturb, rho=RHO, dtype=torch.float64)
    for _ in range(STEPS):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    found = [model[i].weight for i in (0, 2)] + [model[i].bias for i in (0, 2)]
    assert all((model[i].offset == 0).all() for i in (0, 2))
    return start, torch.cat([t.detach().flatten() for t in found])


def test_example_is_saq_by_hand(example):
    start, found = trained(example, "rounded")
    torch.testing.assert_close(found, by_hand(start), rtol=1e-11, atol=1e-12)
    assert (found - by_hand(start, 0.0)).norm() > 1e-3 * found.norm()


def test_perturbation_of_the_latent_weights_is_another_method_and_works_too(example):
    start, found = trained(example, "latent")
    torch.testing.assert_close(found, by_hand(start, on_latent=True), rtol=1e-11, atol=1e-12)
    assert (found - by_hand(start)).norm() > 1e-3 * found.norm()


def test_small_perturbation_of_the_latent_weights_is_rounded_away(example):
    """So the second pass evaluates the weights of the first one, but for the biases."""
    model, optimizer = example.make("latent", rho=1e-6, dtype=torch.float64)
    weights = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            weights.append(rounded(model[0].weight.detach()))
            F.cross_entropy(model(x), y).backward()
    inside = weights[0].abs() < weights[0].abs().max()  # the step of Q follows the largest weight
    steps = (weights[1] / weights[1].abs().max()).mul(3).round(), (weights[0] / weights[0].abs().max()).mul(3).round()
    assert torch.equal(steps[0][inside], steps[1][inside])
