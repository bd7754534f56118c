"""GAM and C-Flat, against their slow references and official code; their special cases, passes and arguments."""

import pytest
import torch
from own_step_problem import STABLE_BASES, assert_close, base_step, flat, gradient, loss, normalized, start, trained

import steppe
from checks import split
from peer_copies import load
from steppe import closures
from steppe.methods.c_flat import CFlat
from steppe.methods.gam import GAM
from support import BASES, by_closure, model_bits, net, train

RHO = 0.2
BETAS = {"beta1": 0.8, "beta2": 0.5, "beta3": 0.6, "gamma": 0.3}


def gradients(w, t, rho, rho_prime):
    """The gradients of arXiv 2303.03108, algorithm 2: at w, w + e_0, w + e_1 and w + e_1 + e_2."""
    g_0 = gradient(loss, w, t)
    g_1 = gradient(loss, w + rho_prime * normalized(g_0), t)
    e_1 = rho * normalized(g_1 - g_0)
    g_2 = gradient(loss, w + e_1, t)
    return g_0, g_1, g_2, gradient(loss, w + e_1 + rho_prime * normalized(g_2), t)


def gam_update(w, t, rho=RHO, ratio=0.3, beta1=0.8, beta2=0.5, beta3=0.6, gamma=0.3):
    g_0, g_1, g_2, g_3 = gradients(w, t, rho, ratio * rho)
    u, m = beta1 * g_1 + beta3 * g_3, g_0 + beta2 * g_2
    cosine = (u @ m) / (u.norm() * m.norm())
    return u - gamma * (m - cosine * m.norm() * u / u.norm())


def c_flat_update(w, t, rho=RHO, lmbda=0.4):
    _, g_1, g_2, g_3 = gradients(w, t, rho, rho)
    return g_1 + lmbda * (g_3 - g_2)


def reference(base, update, **arguments):
    w = start().requires_grad_()
    optimizer = STABLE_BASES[base]([w])
    for t in range(20):
        base_step(optimizer, w, update(w.detach(), t, **arguments))
    return w.detach()


def gam(base, **arguments):
    return trained(lambda ps: GAM(STABLE_BASES[base](ps), RHO, **{"ratio": 0.3, **BETAS, **arguments}))


def c_flat(base, rho=RHO, lmbda=0.4):
    return trained(lambda ps: CFlat(STABLE_BASES[base](ps), rho, lmbda=lmbda))


@pytest.mark.parametrize("drive", ["closure", "passes"])
@pytest.mark.parametrize("base", STABLE_BASES)
def test_method_matches_its_slow_reference(base, drive):
    for make, update in (
        (lambda ps: GAM(STABLE_BASES[base](ps), RHO, ratio=0.3, **BETAS), gam_update),
        (lambda ps: CFlat(STABLE_BASES[base](ps), RHO, lmbda=0.4), c_flat_update),
    ):
        assert_close(trained(make, drive), reference(base, update))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["rho", "ratio", *BETAS])
def test_mutant_other_hyperparameter_is_killed(base, name):
    value = {"rho": RHO, "ratio": 0.3, **BETAS}[name] * 0.99
    with pytest.raises(AssertionError):
        assert_close(gam(base), reference(base, gam_update, **{name: value}))


@pytest.mark.parametrize("arguments", [{"lmbda": 0.399}, {"lmbda": -0.4}, {"rho": 0.199}, {"rho": -RHO}])
def test_mutant_other_c_flat_is_killed(arguments):
    with pytest.raises(AssertionError):
        assert_close(c_flat("sgd"), reference("sgd", c_flat_update, **arguments))


@pytest.mark.parametrize("base", BASES)
def test_c_flat_without_its_term_is_sam(base):
    model, twin = net(), net()
    one = CFlat(BASES[base](model.parameters()), 0.1, lmbda=0.0, model=model)
    two = steppe.SAM(BASES[base](twin.parameters()), 0.1, model=twin)
    for m, o in ((model, one), (twin, two)):
        torch.manual_seed(7)
        train(m, o, by_closure, 5)
    assert model_bits(model) == model_bits(twin)


def test_c_flat_with_rho_zero_is_the_base():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    train(model, CFlat(BASES["momentum"](model.parameters()), 0.0, model=model), by_closure, 5)
    train(twin, steppe.SAM(BASES["momentum"](twin.parameters()), 0.0, model=twin), by_closure, 5)
    assert model_bits(model) == model_bits(twin)


def test_unperturbed_step_is_one_of_the_base():
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = GAM(torch.optim.SGD([w], lr=0.1), cadence=steppe.Periodic(2))
    by_closure(optimizer, lambda: w.square().sum())
    before = w.item()
    by_closure(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(before - 0.1 * 2 * before)


def test_gradient_of_every_pass_is_marked_as_used_for_the_update():
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = GAM(torch.optim.SGD([w], lr=0.1))
    used = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            used.append((sam_pass.is_perturbed, sam_pass.is_last))
            w.square().sum().backward()
    assert used == [(False, True)] + 3 * [(True, True)]


def test_maximize_mirrors_minimization():
    w, v = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    down = GAM(torch.optim.SGD([w], lr=1e-3), rho=0.5)
    up = GAM(torch.optim.SGD([v], lr=1e-3, maximize=True), rho=0.5)
    for _ in range(4):
        by_closure(down, lambda: w.pow(4).sum())
        by_closure(up, lambda: -v.pow(4).sum())
    assert torch.equal(w, v)


def test_each_micro_batch_has_its_own_perturbations():
    w = torch.nn.Parameter(start())
    optimizer = CFlat(torch.optim.SGD([w], lr=0.02), RHO, lmbda=0.4)
    for _ in range(3):
        closures.micro_batches(optimizer, lambda t: loss(w, int(t)), (torch.arange(2),), m=1)
    want = start()
    for _ in range(3):
        want = want - 0.02 * (c_flat_update(want, 0) + c_flat_update(want, 1)) / 2
    assert_close(w.detach(), want)


def test_gradient_is_that_of_a_step_without_a_loss_scaler():
    params, scaler = [torch.nn.Parameter(p) for p in split(start())], torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = GAM(STABLE_BASES["momentum"](params), RHO, ratio=0.3, **BETAS, scaler=scaler)
    for t in range(20):
        optimizer.step(lambda t=t: loss(flat(params), t))
        scaler.update()
    torch.testing.assert_close(flat(params).detach(), reference("momentum", gam_update), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda base: GAM(base, ratio=0.0), ValueError, "ratio must be finite and more than 0"),
        (lambda base: GAM(base, beta1=-1.0), ValueError, "beta1 must be finite and not negative"),
        (lambda base: GAM(base, gamma=float("inf")), ValueError, "gamma must be finite"),
        (lambda base: CFlat(base, lmbda=-0.1), ValueError, "lmbda must be finite and not negative"),
        (lambda base: GAM(base, perturbation=steppe.LInf()), TypeError, "leave perturbation= out"),
        (lambda base: GAM(base).first_step(), RuntimeError, r"it makes four passes. Use step\(closure\) or passes"),
    ],
)
def test_argument_out_of_range_or_place_is_an_error(make, kind, message):
    with pytest.raises(kind, match=message):
        make(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


# The authors' code, where an environment variable names a copy of it, with the functions of util.py in place of their
# relative import: STEPPE_OFFICIAL_GAM, gam/gam.py of github.com/xxgege/GAM; STEPPE_OFFICIAL_C_FLAT, optims/c_flat.py of
# github.com/WanNaa/C-Flat.


@pytest.mark.parametrize("base", STABLE_BASES)
def test_gam_matches_the_official_code(base):
    official = load("STEPPE_OFFICIAL_GAM").GAM
    params = [torch.nn.Parameter(p) for p in split(start())]
    names = {"grad_beta_1": "beta1", "grad_beta_2": "beta2", "grad_beta_3": "beta3", "grad_gamma": "gamma"}
    theirs = {theirs: BETAS[ours] for theirs, ours in names.items()}
    optimizer = official(params, STABLE_BASES[base](params), torch.nn.Module(), args=type("Args", (), theirs))
    optimizer.grad_rho, optimizer.grad_norm_rho = 0.3 * RHO, RHO
    for t in range(20):

        def get_grad(t=t):
            optimizer.zero_grad()
            with torch.enable_grad():
                value = loss(flat(params), t)
            value.backward()
            return None, value

        optimizer.step(get_grad)
    # the official code restores w by a subtraction and adds 1e-12 to the norms
    torch.testing.assert_close(gam(base), flat(params).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", STABLE_BASES)
def test_c_flat_matches_the_official_code(base):
    official = load("STEPPE_OFFICIAL_C_FLAT").C_Flat
    params = [torch.nn.Parameter(p) for p in split(start())]
    optimizer = official(params, STABLE_BASES[base](params), torch.nn.Module(), cflat=True, rho=RHO, lamb=0.4)
    for t in range(20):
        optimizer.set_closure(lambda t=t: (None, [loss(flat(params), t)]))
        optimizer.step()
    torch.testing.assert_close(c_flat(base), flat(params).detach(), rtol=1e-9, atol=1e-9)
