"""Gradients that the engine gives to a combination."""

import torch
from torch import nn

import steppe
from steppe import SAM
from support import by_passes


def test_combination_receives_both_gradients_and_zeros_for_missing_ones():
    class Sum:
        needs_unperturbed_gradient = True

        def __call__(self, point, perturbed):
            if perturbed is None:
                return point.gradients
            return [g + 10 * g_s for g, g_s in zip(point.gradients, perturbed, strict=True)]

    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = SAM(torch.optim.SGD([a, b], lr=1.0), rho=0.0, combination=Sum(), cadence=steppe.Periodic(2))
    for sam_pass in optimizer.passes():
        with sam_pass:
            (a + b if not sam_pass.is_perturbed else a * 2).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (21.0, 1.0)
    optimizer.step()
    by_passes(optimizer, lambda: (a + b).sum())
    assert (a.grad.item(), b.grad.item()) == (1.0, 1.0)


def test_subclass_of_sams_combination_is_called():
    class Doubled(steppe.PerturbedGradient):
        def __call__(self, point, perturbed):
            return [2 * g for g in super().__call__(point, perturbed)]

    w = nn.Parameter(torch.tensor([2.0]))
    by_passes(SAM(torch.optim.SGD([w], lr=1.0), rho=0.0, combination=Doubled()), lambda: (3 * w).sum())
    assert w.grad.item() == 6.0
