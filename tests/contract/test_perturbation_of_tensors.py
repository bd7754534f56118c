"""Contract C10 to C12: radius 0, maximize, extreme gradients; complex, sparse and tied parameters."""

import math

import pytest
import torch

import steppe
from steppe import SAM
from support import BASES, DRIVES, bits, every_base, every_drive, model_bits, net, parameter, plain, train


@every_drive
@every_base
def test_c10_rho_zero_equals_the_base_bit_for_bit(base, drive):
    model, twin = net(), net()
    optimizer = SAM(BASES[base](model.parameters()), rho=0.0, model=model)
    twin_optimizer = BASES[base](twin.parameters())
    torch.manual_seed(7)
    train(model, optimizer, DRIVES[drive], 6)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    train(twin, twin_optimizer, plain, 6)
    assert model_bits(model) == model_bits(twin)
    assert torch.equal(torch.get_rng_state(), after)


@every_drive
def test_c11_maximize_flips_the_perturbation(drive):
    w, v = parameter(3.0, 4.0), parameter(3.0, 4.0)
    down = SAM(torch.optim.SGD([w], lr=1e-3), rho=0.5)
    up = SAM(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5)
    for _ in range(5):
        DRIVES[drive](down, lambda: w.pow(4).sum())
        DRIVES[drive](up, lambda: -v.pow(4).sum())
    assert bits([w]) == bits([v])


@every_drive
def test_c11_perturbation_is_finite_for_zero_missing_and_huge_gradients(drive):
    for scale in (0.0, 1e-44, 1e-30, 1e30, 3e38):
        w = parameter(1.0, 1.0)
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.5)
        weights = []

        def loss(w=w, scale=scale, weights=weights):
            weights.append(w.detach().clone())
            return (w * scale).sum()

        DRIVES[drive](optimizer, loss)
        length = float((weights[1] - 1).norm())
        assert length == pytest.approx(0.5 if 1e-31 < scale < 1e38 else length, rel=1e-5)
        assert math.isfinite(length)
        assert length <= 0.5001
    for rule in (steppe.L2(), steppe.Adaptive()):
        a, b = parameter(1.0), parameter(1.0)
        optimizer = SAM(torch.optim.SGD([a, b], lr=0.1), rho=0.5, perturbation=rule)
        other = parameter(2.0)
        DRIVES[drive](optimizer, lambda other=other: other.square().sum())  # neither a nor b has a gradient
        assert (a.item(), b.item()) == (1.0, 1.0)


@every_drive
def test_c12_complex_parameters_train_as_pairs_of_real_numbers(drive):
    z = torch.nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0 - 2.0j]))
    r = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    for rule in (steppe.L2(), steppe.Adaptive()):
        a = SAM(torch.optim.SGD([z], lr=1e-3, momentum=0.9), rho=0.5, perturbation=rule)
        b = SAM(torch.optim.SGD([r], lr=1e-3, momentum=0.9), rho=0.5, perturbation=rule)
        for _ in range(3):
            DRIVES[drive](a, lambda: torch.view_as_real(z).pow(4).sum())
            DRIVES[drive](b, lambda: r.pow(4).sum())
        torch.testing.assert_close(torch.view_as_real(z), r)


@every_drive
def test_c12_sparse_gradients_raise_and_leave_weights_unchanged(drive):
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(torch.optim.SGD(table.parameters(), lr=0.1))
    before = bits(table.parameters())
    with pytest.raises(RuntimeError, match=r"sparse gradient.*sparse=False"):
        DRIVES[drive](optimizer, lambda: table(torch.tensor([1, 2])).square().sum())
    assert bits(table.parameters()) == before


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@every_drive
def test_c12_tied_parameters_are_perturbed_once(drive):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w, w], lr=0.0), rho=0.5)
    visited = []
    DRIVES[drive](optimizer, lambda: (visited.append(w.detach().clone()), w.square().sum())[1])
    torch.testing.assert_close(visited[1], torch.tensor([3.3, 4.4]))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    tied = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.5, model=model)
    before = bits(model.parameters())
    DRIVES[drive](tied, lambda: model(torch.ones(3, 2)).square().sum())
    assert bits(model.parameters()) == before


@every_drive
def test_c12_complex_gradients_that_backward_leaves_conjugated_are_read(drive):
    z = torch.nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0 - 2.0j]))
    optimizer = SAM(torch.optim.SGD([z], lr=0.5), rho=0.5)
    factor = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])
    DRIVES[drive](optimizer, lambda: (z.conj() * factor.conj()).real.sum())
    torch.testing.assert_close(z.detach(), torch.tensor([3.0 + 4.0j, 1.0 - 2.0j]) - 0.5 * factor.conj())
