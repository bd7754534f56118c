"""The list of methods that are not here."""

import torch

import steppe
from steppe.methods._absent import ABSENT, absent_methods
from steppe.methods.cards import index
from steppe.methods.registry import CARDS


def test_each_absent_method_has_a_reason_on_the_page_and_no_card():
    page = " ".join(index().split())
    for (name, _, reason), entry in zip(ABSENT, absent_methods(), strict=True):
        assert name.lower() not in {card.label.lower() for card in CARDS.values()}
        assert reason.endswith(".")
        assert entry in page


def test_hessian_at_the_perturbed_weights_can_be_estimated_in_the_last_pass():
    """What SASSHA's entry says of the estimate z (H z); H is diagonal here, so that one z is exact."""
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.3)
    z = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = w.pow(4).sum() / 12
            if sam_pass.is_last:
                (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
                (product,) = torch.autograd.grad(gradient, w, z, retain_graph=True)
                perturbed = w.detach().clone()
            loss.backward()
    optimizer.step()
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = start**3 / 3
    torch.testing.assert_close(perturbed, start + 0.3 * g / g.norm())
    torch.testing.assert_close(z * product, perturbed**2)
    torch.testing.assert_close(w.detach(), start - 0.1 * perturbed**3 / 3)
