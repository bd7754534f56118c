"""Eigen-SAM against its formula with the dense Hessian, and the authors' code; checkpoints, protections and errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from own_step_problem import STABLE_BASES, assert_close, base_step, flat, gradient, loss, start

import steppe
from checks import split
from peer_copies import load
from steppe import closures, flatness, variants
from steppe.rules.ops import normal
from support import batch, bits, by_closure, model_bits, net, saved_and_loaded

RHO, ALPHA, INTERVAL, ITERATIONS = 0.2, 0.7, 4, 3


def e(g, v, rho=RHO, alpha=ALPHA):
    """arXiv 2501.12666: along g, and along the part of v orthogonal to g, on the side of g."""
    unit = g / g.norm()
    return rho * (unit + alpha * torch.sign(g @ v) * (v - (v @ unit) * unit))


def reference(base, rho=RHO, alpha=ALPHA, interval=INTERVAL):
    w = start().requires_grad_()
    optimizer, v = STABLE_BASES[base]([w]), torch.zeros(10, dtype=torch.float64)
    for t in range(20):
        if t and t % interval == 0:
            if not v.any():
                v = flat(normal("EigenvectorAligned", 0, t, split(start())))
            H = torch.autograd.functional.hessian(lambda w, t=t: loss(w, t), w.detach())
            for _ in range(ITERATIONS):
                v = H @ v / (H @ v).norm()
        g = gradient(loss, w, t)
        base_step(optimizer, w, gradient(loss, w.detach() + e(g, v, rho, alpha), t))
    return w.detach()


def trained(base, alpha=ALPHA):
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = variants.eigen_sam(STABLE_BASES[base](params), RHO, alpha=alpha)
    for t in range(20):
        if t and t % INTERVAL == 0:
            closures.update_eigenvector(optimizer, lambda t=t: loss(flat(params), t), iterations=ITERATIONS)
        by_closure(optimizer, lambda t=t: loss(flat(params), t))
    return flat(params).detach()


@pytest.mark.parametrize("base", STABLE_BASES)
def test_method_matches_its_slow_reference(base):
    torch.testing.assert_close(trained(base), reference(base), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("arguments", [{"alpha": -ALPHA}, {"alpha": 0.999 * ALPHA}, {"rho": -RHO}, {"interval": 5}])
def test_mutant_other_perturbation_is_killed(arguments):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained("sgd"), reference("sgd", **arguments), rtol=1e-8, atol=1e-8)


def test_alpha_zero_is_sam():
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = steppe.SAM(STABLE_BASES["sgd"](params), RHO)
    for t in range(20):
        by_closure(optimizer, lambda t=t: loss(flat(params), t))
    assert_close(trained("sgd", alpha=0.0), flat(params).detach())


def updated(model, optimizer, seed=0):
    x, y = batch(seed)
    return closures.update_eigenvector(optimizer, lambda: F.cross_entropy(model(x), y), iterations=2)


def test_update_leaves_model_gradients_and_generators_and_further_ones_continue():
    model = net()
    optimizer = variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x, y = batch()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    before = model_bits(model), bits(p.grad for p in model.parameters()), bits([torch.get_rng_state()])
    values = [updated(model, optimizer) for _ in range(15)]
    assert model.layers[5].training
    assert before == (model_bits(model), bits(p.grad for p in model.parameters()), bits([torch.get_rng_state()]))
    assert values[-1] == pytest.approx(values[-2].item(), rel=0.02)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("through_base", [False, True])
def test_checkpoint_has_the_eigenvector_also_before_the_first_step(steps, through_base):
    model = net(dropout=0.0)
    optimizer = variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), 0.5, alpha=1.0, model=model)
    for _ in range(steps):
        by_closure(optimizer, lambda: F.cross_entropy(model(batch()[0]), batch()[1]))
    updated(model, optimizer)
    state, start = saved_and_loaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    x, y = batch()
    results = []
    for load_it in (None, True, False):
        network = model
        stepped = optimizer
        if load_it is not None:
            network = net(dropout=0.0)
            network.load_state_dict(start)
            base = torch.optim.SGD(network.parameters(), lr=0.1)
            stepped = variants.eigen_sam(base, 0.5, alpha=1.0, model=network)
            if load_it:
                (base if through_base else stepped).load_state_dict(state)
        by_closure(stepped, lambda n=network: F.cross_entropy(n(x), y))
        results.append(model_bits(network))
    assert results[0] == results[1] != results[2]


def test_parameters_without_curvature_or_effect_have_no_part_in_the_eigenvector():
    a, b, c = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    optimizer = variants.eigen_sam(torch.optim.SGD([a, b, c], lr=0.1))
    value = closures.update_eigenvector(optimizer, lambda: (a**2).sum() + b.sum())
    assert value == pytest.approx(2.0)
    assert closures.update_eigenvector(optimizer, lambda: b.sum()) == 0.0
    by_closure(optimizer, lambda: (a**2).sum() + b.sum())
    assert a.isfinite().all()


def test_call_out_of_place_is_an_error():
    model = net()
    optimizer = variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for sam_pass in optimizer.passes():
        with sam_pass:
            with pytest.raises(RuntimeError, match="call it between two steps"):
                updated(model, optimizer)
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    with pytest.raises(TypeError, match=r"needs an optimizer of steppe\.variants\.eigen_sam.*L2"):
        updated(model, steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(ValueError, match="iterations must be 1 or more"):
        closures.update_eigenvector(optimizer, lambda: None, iterations=0)
    with pytest.raises(ValueError, match="alpha must be finite and not negative"):
        variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), alpha=-1.0)
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="some are complex"):
        closures.update_eigenvector(variants.eigen_sam(torch.optim.SGD([z], lr=0.1)), lambda: z.abs().sum())


# The authors' code, where STEPPE_OFFICIAL_EIGEN_SAM names a copy of utils.py of github.com/RitianLuo/EigenSAM.


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_eigenvector_and_perturbation_are_those_of_the_official_code():
    official = load("STEPPE_OFFICIAL_EIGEN_SAM")
    model = net(dropout=0.0, dtype=torch.float64)
    optimizer = variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), RHO, alpha=ALPHA, model=model)
    x, y = batch(dtype=torch.float64)
    v = normal("EigenvectorAligned", 0, 0, [p.detach() for p in model.parameters()])
    theirs = official.estimate_largest_eigenvector(model, F.cross_entropy, tuple(v), x, y, steps=ITERATIONS)
    closures.update_eigenvector(optimizer, lambda: F.cross_entropy(model(x), y), iterations=ITERATIONS)
    ours = [optimizer._engine.memory["EigenvectorAligned"][p]["v"] for p in model.parameters()]
    torch.testing.assert_close(ours, list(theirs), rtol=1e-9, atol=1e-9)
    before = [p.detach().clone() for p in model.parameters()]
    for sam_pass in optimizer.passes():
        with sam_pass:
            F.cross_entropy(model(x), y).backward()
            if not sam_pass.is_perturbed:
                gradients = [p.grad.clone() for p in model.parameters()]
            else:
                found = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    for p, g in zip(model.parameters(), gradients, strict=True):
        p.grad = g
    official.modify_gradient_with_projection(model, theirs, alpha=ALPHA)
    torch.testing.assert_close(found, [RHO * p.grad for p in model.parameters()], rtol=1e-9, atol=1e-9)


def test_eigenvector_of_a_model_with_weight_norm_is_that_of_its_exact_hessian():
    torch.manual_seed(0)
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2).double())
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    optimizer = variants.eigen_sam(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    found = closures.update_eigenvector(optimizer, lambda: F.cross_entropy(model(x), y), iterations=200)
    objective = flatness.Objective(model, (x, y), loss=F.cross_entropy)
    steps = 1e-5 * torch.eye(objective.n).double()
    hessian = torch.stack([(objective.gradient(e)[1] - objective.gradient(-e)[1]) / 2e-5 for e in steps])
    values = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    assert found.item() == pytest.approx(values[values.abs().argmax()].item(), rel=1e-4)
