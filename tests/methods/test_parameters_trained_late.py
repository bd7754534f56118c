"""Parameters whose first gradient comes after the first step (two heads, tasks in turn), with each method."""

import copy

import pytest
import torch
import torch.nn.functional as F
from named_methods import WRAPPERS, build
from torch import nn

from steppe import variants
from support import model_bits, observed, saved_and_loaded

OWN_OPTIMIZERS = {
    "bsam": lambda model: variants.bsam(model.parameters(), lr=0.1, rho=0.05, n_data=50, model=model),
    "sassha": lambda model: variants.sassha(model.parameters(), lr=0.02, rho=0.1, interval=2, model=model),
}
MAKE = OWN_OPTIMIZERS | {name: build(name) for name in WRAPPERS}


class TwoHeads(nn.Module):
    """Two heads, one of which a forward uses."""

    def __init__(self, *, freezes: bool) -> None:
        super().__init__()
        self.freezes = freezes
        self.body, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 2)])
        self.double()

    def forward(self, x, head):
        if self.freezes:  # the other head, as loops for GANs do
            for i, one in enumerate(self.heads):
                one.requires_grad_(i == head)
        return self.heads[head](torch.tanh(self.norm(self.body(x))))


def two_heads(name: str, *, freezes: bool = False):
    torch.manual_seed(0)
    model = TwoHeads(freezes=freezes)
    return model, MAKE[name](model)


def train_in_turn(model, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator, dtype=torch.float64)

        def loss(x=x, step=step):
            return F.mse_loss(model(x, step % 2), x[:, : 3 - step % 2])

        optimizer.step(observed(optimizer, loss))


@pytest.mark.filterwarnings("ignore:.*frozen .requires_grad=False. when a step began")
@pytest.mark.parametrize("freezes", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_heads_in_turn_are_trained_with_model_as_without(name, freezes):
    results = []
    for protected in (True, False):
        model, optimizer = two_heads(name, freezes=freezes)
        if not protected:
            optimizer.model = None
        torch.manual_seed(1)
        train_in_turn(model, optimizer, range(6))
        results.append(model_bits(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("way", ["resumed", "copied"])
@pytest.mark.parametrize("name", ["bsam", "sampa"])
def test_heads_in_turn_are_trained_after_an_interruption_as_without(name, way, after):
    straight, optimizer = two_heads(name)
    train_in_turn(straight, optimizer, range(6))

    model, optimizer = two_heads(name)
    train_in_turn(model, optimizer, range(after))
    if way == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        saved = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
        model, optimizer = two_heads(name)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    train_in_turn(model, optimizer, range(after, 6))
    assert model_bits(model) == model_bits(straight)


def test_state_of_the_model_that_a_method_displaces_begins_the_second_pass_at_w():
    """A parameter without a gradient that the forward reads; bSAM's noise displaces it in the first pass only."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(4, 2), "codes": nn.Embedding(1, 2)}).double()
    w, seen = model["codes"].weight.detach().clone(), []
    optimizer = variants.bsam(model.parameters(), lr=0.1, rho=0.05, n_data=50, model=model)

    def loss():
        codes = model["codes"].weight.detach()
        seen.append(codes.clone())
        return (model["linear"](torch.ones(3, 4, dtype=torch.float64)) - codes).square().mean()

    for _ in range(3):
        optimizer.step(loss)
    assert not any(torch.equal(codes, w) for codes in seen[::2])
    assert all(torch.equal(codes, w) for codes in seen[1::2])
