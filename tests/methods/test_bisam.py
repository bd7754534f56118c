"""A perturbation on another loss than the update's, against the formulas of BiSAM, DISAM, Focal-SAM and ImbSAM."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from peer_copies import load
from steppe import SAM, closures
from support import BASES, batch, bits, by_closure, by_passes, each_in_turn, model_bits, net, plain

RHO = 0.3
x = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(2))
domain = torch.arange(12) % 3
share_of_class = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


class Network(nn.Module):
    """Logits of three classes, as a function of 24 weights in one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return f(self.w, x)


def f(w: Tensor, x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w[:12].reshape(4, 3)) ** 2
    return hidden @ w[12:21].reshape(3, 3) + w[21:].sin()


# The losses of the papers, as a user writes them: functions of the logits, the targets and the domains.


def loss(z, y, d=None):
    return F.cross_entropy(z, y)


def disam(z, y, d):
    """arXiv 2405.18861: the loss minus lambda times the variance of the losses of the domains."""
    of_domains = torch.stack([F.cross_entropy(z[d == i], y[d == i]) for i in d.unique()])
    return F.cross_entropy(z, y) - 0.4 * of_domains.var(correction=0)


def weighted(c):
    return lambda z, y, d=None: (c[y] * F.cross_entropy(z, y, reduction="none")).mean()


C_FOCAL = 0.7 * (1 - share_of_class) ** 2.0
C_TAIL = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

METHODS = {
    "bisam": (lambda z, y, d: closures.bisam_loss(z, y), loss, None),
    "disam": (disam, loss, None),
    "focal": (weighted(C_FOCAL), weighted(C_FOCAL), weighted(1 - C_FOCAL)),
    "imbsam": (weighted(C_TAIL), weighted(C_TAIL), weighted(1 - C_TAIL)),
}
"""P, L and A."""


# Slow references: each gradient is taken of a sum over samples or domains, written once more.


def log_p(w, i):
    return f(w, x[i : i + 1]).log_softmax(1)[0, y[i]]


def P_bisam(w, mu=10.0, alpha=0.1):
    """arXiv 2407.12993: 1/n sum_i 1/mu log sum_j exp(mu phi(F_j)), phi(x) = tanh(alpha x), F_j = f_j - f_y."""
    total = 0.0
    for i in range(12):
        z = f(w, x[i : i + 1])[0]
        total += (mu * torch.tanh(alpha * (z - z[y[i]]))).exp().sum().log() / mu
    return total / 12


def P_disam(w):
    of_domains = [-sum(log_p(w, i) for i in range(12) if domain[i] == d) / 4 for d in range(3)]
    mean = sum(of_domains) / 3
    return mean - 0.4 * sum((part - mean) ** 2 for part in of_domains) / 3


def mean_loss(w):
    return -sum(log_p(w, i) for i in range(12)) / 12


def of_classes(c):
    return lambda w: -sum(c[y[i]] * log_p(w, i) for i in range(12)) / 12


REFERENCES = {
    "bisam": (P_bisam, mean_loss, lambda w: 0.0 * w.sum()),
    "disam": (P_disam, mean_loss, lambda w: 0.0 * w.sum()),
    "focal": (of_classes(C_FOCAL), of_classes(C_FOCAL), of_classes(1 - C_FOCAL)),
    "imbsam": (of_classes(C_TAIL), of_classes(C_TAIL), of_classes(1 - C_TAIL)),
}
every_method = pytest.mark.parametrize("method", METHODS)


def gradient(L, w):
    w = w.detach().clone().requires_grad_()
    return torch.autograd.grad(L(w), w)[0]


def update(method, w, rho=RHO):
    P, L, A = REFERENCES[method]
    e = gradient(P, w)
    return gradient(L, w + rho * e / e.norm()) + gradient(A, w)


def reference(base, update, steps=20):
    w = Network().w
    optimizer = BASES[base]([w])
    for _ in range(steps):
        w.grad = update(w.detach())
        optimizer.step()
    return w.detach()


def built(method, base="sgd", **options):
    model = Network()
    optimizer = SAM(BASES[base](model.parameters()), RHO, model=model, **options)
    P, L, A = METHODS[method]
    return model, optimizer, closures.perturb_on(optimizer, P, L, loss_at_w=A)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@functools.cache
def sam_reference(base):
    return reference(base, lambda w: gradient(mean_loss, w + RHO * normalized(gradient(mean_loss, w))))


@pytest.mark.parametrize(("method", "base"), each_in_turn(METHODS, BASES))
def test_step_is_that_of_the_formula(method, base):
    want = reference(base, lambda w: update(method, w))
    for drive in (by_closure, by_passes):
        model, optimizer, criterion = built(method, base)
        for _ in range(20):
            drive(optimizer, lambda model=model, criterion=criterion: criterion(model(x), y, domain))
        assert_close(model.w.detach(), want)
    others = [reference(base, lambda w, rho=rho: update(method, w, rho)) for rho in (-RHO, 0.0)]
    for other in (*others, sam_reference(base)):
        assert (want - other).norm() > 1e-5 * want.norm()


def normalized(g):
    return g / g.norm()


@every_method
def test_same_losses_as_the_update_are_sam(method):
    model, twin = Network(), Network()
    for network, wrap in ((model, True), (twin, False)):
        optimizer = SAM(BASES["adamw"](network.parameters()), RHO, model=network)
        criterion = closures.perturb_on(optimizer, loss, loss) if wrap else loss
        for _ in range(5):
            by_closure(optimizer, lambda n=network, c=criterion: c(n(x), y))
    assert bits([model.w]) == bits([twin.w])


@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_to_the_bit(base):
    def trained(wrap, drive):
        model = net()
        optimizer = wrap(BASES[base](model.parameters()), model)
        criterion = F.cross_entropy
        if drive is not plain:
            criterion = closures.perturb_on(optimizer, closures.bisam_loss, F.cross_entropy)
        torch.manual_seed(5)
        for t in range(3):
            inputs, targets = batch(t)
            drive(optimizer, lambda inputs=inputs, targets=targets: criterion(model(inputs), targets))
        return model_bits(model), bits([torch.get_rng_state()])

    ours = trained(lambda base, model: SAM(base, 0.0, model=model), by_closure)
    assert ours == trained(lambda base, model: base, plain)


@every_method
def test_value_is_the_loss_of_the_update_in_every_pass(method):
    model, optimizer, criterion = built(method)
    w, values = model.w.detach().clone(), []
    P, L, A = REFERENCES[method]

    def closure():
        values.append(criterion(model(x), y, domain))
        return values[-1]

    returned = optimizer.step(closure)
    e = gradient(P, w)
    want = [A(w) + L(w), A(w) + L(w + RHO * e / e.norm())]
    assert_close(torch.stack(values).detach(), torch.stack(want))
    assert_close(returned, mean_loss(w))


@every_method
def test_outside_of_a_pass_and_without_a_graph_it_is_the_loss_of_the_update(method):
    model, optimizer, criterion = built(method)
    want = mean_loss(model.w)
    assert_close(criterion(model(x), y, domain), want)
    assert_close(gradient(lambda w: criterion(f(w, x), y, domain), model.w), gradient(mean_loss, model.w))

    def closure():
        with torch.no_grad():
            assert_close(criterion(model(x), y, domain), mean_loss(model.w))  # a measurement within the closure
        return criterion(model(x), y, domain)

    optimizer.step(closure)
    assert_close(model.w.detach(), reference("sgd", lambda w: update(method, w), steps=1))


@every_method
def test_steps_that_are_not_perturbed_minimize_the_loss(method):
    model, optimizer, criterion = built(method, cadence=steppe.Periodic(2))
    for _ in range(4):
        optimizer.step(lambda: criterion(model(x), y, domain))
    steps = iter(range(4))
    want = reference("sgd", lambda w: gradient(mean_loss, w) if next(steps) % 2 else update(method, w), steps=4)
    assert_close(model.w.detach(), want)


# Micro-batches, several ascent steps, other perturbations, a loss scaler, and an interrupted step.


@pytest.mark.parametrize("method", ["bisam", "focal"])
def test_micro_batches_inside_each_pass_are_the_whole_batch(method):
    model, optimizer, criterion = built(method)
    for _ in range(20):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for begin, end in ((0, 4), (4, 9), (9, 12)):
                    share = (end - begin) / len(x)
                    (criterion(model(x[begin:end]), y[begin:end], None) * share).backward()
        optimizer.step()
    assert_close(model.w.detach(), reference("sgd", lambda w: update(method, w)))


def test_each_micro_batch_can_have_its_own_perturbation():
    model, optimizer, criterion = built("focal")
    for _ in range(20):
        closures.micro_batches(optimizer, lambda x, y: criterion(model(x), y), (x, y), m=5)

    def mean(w):
        total = torch.zeros_like(w)
        for begin in (0, 5, 10):
            part, targets = x[begin : begin + 5], y[begin : begin + 5]

            def of(c, part=part, targets=targets):
                return lambda w: weighted(c)(f(w, part), targets)

            e = gradient(of(C_FOCAL), w)
            g = gradient(of(C_FOCAL), w + RHO * e / e.norm()) + gradient(of(1 - C_FOCAL), w)
            total += g * len(part) / len(x)
        return total

    assert_close(model.w.detach(), reference("sgd", mean))


def test_further_ascent_steps_follow_the_loss_of_the_perturbation():
    model, optimizer, criterion = built("focal", perturbation=steppe.AscentSteps(steppe.L2(), 2))
    optimizer.step(lambda: criterion(model(x), y))
    P, L, A = REFERENCES["focal"]
    w = Network().w.detach()
    once = w + RHO / 2 * normalized(gradient(P, w))
    twice = once + RHO / 2 * normalized(gradient(P, once))
    assert_close(model.w.detach(), w - 0.1 * (gradient(L, twice) + gradient(A, w)))


def test_any_perturbation_is_along_the_loss_of_the_perturbation():
    model, optimizer, criterion = built("bisam", perturbation=steppe.LInf())
    optimizer.step(lambda: criterion(model(x), y, domain))
    w = Network().w.detach()
    assert_close(model.w.detach(), w - 0.1 * gradient(mean_loss, w + RHO * gradient(P_bisam, w).sign()))


@every_method
def test_gradient_is_that_of_a_step_without_a_loss_scaler(method):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model, optimizer, criterion = built(method, scaler=scaler)
    for _ in range(20):
        optimizer.step(lambda: criterion(model(x), y, domain))
        scaler.update()
    assert_close(model.w.detach(), reference("sgd", lambda w: update(method, w)))


@pytest.mark.parametrize("at_perturbed_weights", [False, True])
def test_stopped_step_leaves_nothing_for_the_next_one(at_perturbed_weights):
    model, optimizer, criterion = built("focal")
    w = model.w.detach().clone()

    def stop():
        value = criterion(model(x), y)
        if optimizer.current_pass.is_perturbed == at_perturbed_weights:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(stop)
    assert torch.equal(model.w, w)
    for _ in range(2):
        optimizer.step(lambda: criterion(model(x), y))
    assert_close(model.w.detach(), reference("sgd", lambda w: update("focal", w), steps=2))


def test_parameters_that_the_loss_at_w_does_not_reach_and_frozen_ones_have_no_gradient_of_it():
    a, b, frozen = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 2.0, 3.0))
    frozen.requires_grad_(False)
    optimizer = SAM(torch.optim.SGD([a, b, frozen], lr=0.1), RHO)
    criterion = closures.perturb_on(optimizer, lambda: b**2, lambda: b**2, loss_at_w=lambda: frozen * a**2)
    optimizer.step(criterion)
    assert_close(a.detach(), torch.tensor([1.0 - 0.1 * 3.0 * 2.0], dtype=torch.float64))
    assert_close(b.detach(), torch.tensor([2.0 - 0.1 * 2.0 * (2.0 + RHO)], dtype=torch.float64))
    assert frozen.item() == 3.0


# BiSAM's loss.


@pytest.mark.parametrize(("mu", "alpha"), [(10.0, 0.1), (3.0, 0.7), (1.0, None)])
def test_bisam_loss_is_that_of_the_paper(mu, alpha):
    z = f(Network().w.detach(), x)
    total = 0.0
    for logits, target in zip(z.tolist(), y.tolist(), strict=True):
        F_j = [value - logits[target] for value in logits]
        gamma = math.log(math.e - 1)
        phi = [math.tanh(alpha * F) if alpha else 1 - math.log(1 + math.exp(gamma - F)) for F in F_j]
        total += math.log(sum(math.exp(mu * value) for value in phi)) / mu
    assert closures.bisam_loss(z, y, mu=mu, alpha=alpha).item() == pytest.approx(total / 12, rel=1e-13)


@pytest.mark.parametrize("alpha", [0.1, None])
def test_bisam_loss_bounds_the_error_from_below_up_to_the_number_of_classes(alpha):
    """phi is a lower bound of the step function, and the soft maximum is the maximum to log(K) / mu."""
    z = 20 * torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(3, (500,), generator=torch.Generator().manual_seed(1))
    error = (z.argmax(1) != targets).double().mean()
    value = closures.bisam_loss(z, targets, mu=50.0, alpha=alpha)
    assert error - 0.5 < value <= error + math.log(3) / 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: closures.bisam_loss(z[0], y), r"logits of shape \(3,\).*is that of a classification"),
        (lambda z: closures.bisam_loss(z, z), "targets of shape"),
        (lambda z: closures.bisam_loss(z, y, mu=0.0), "mu must be finite and more than 0"),
        (lambda z: closures.bisam_loss(z, y, alpha=-1.0), "alpha must be finite and more than 0"),
    ],
)
def test_arguments_of_another_shape_or_range_are_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(f(Network().w.detach(), x))


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: SAM(base, RHO, perturbation=steppe.Momentum()), "not at w"),
        (lambda base: SAM(base, RHO, perturbation=steppe.GaussianNoise()), "not at w"),
        (steppe.variants.sampa, "not at w"),
        (lambda base: SAM(base, RHO, combination=steppe.SurrogateGap()), "is in the update, too"),
        (steppe.variants.lookbehind_sam, "is in the update, too"),
        (lambda base: steppe.variants.wsam(base, decoupled=True), "is in the update, too"),
        (lambda base: steppe.variants.aesam(base, total_steps=10), "it is not known whether"),
    ],
)
def test_method_in_which_the_first_gradient_has_another_meaning_is_an_error(make, message):
    model = Network()
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    criterion = closures.perturb_on(optimizer, closures.bisam_loss, F.cross_entropy)
    with pytest.raises(RuntimeError, match=message):
        for _ in range(2):  # momentum begins with the second step
            optimizer.step(lambda: criterion(model(x), y))


def test_classic_api_is_an_error():
    model, optimizer, criterion = built("bisam")
    w = model.w.detach().clone()
    criterion(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="Take perturbation_loss before first_step"):
        criterion(model(x), y)
    optimizer.restore()
    assert torch.equal(model.w, w)


def test_more_calls_at_the_perturbed_weights_than_at_w_are_an_error():
    model, optimizer, criterion = built("focal")
    w = model.w.detach().clone()

    def twice():
        value = criterion(model(x), y)
        return value + criterion(model(x), y) if optimizer.current_pass.is_perturbed else value

    with pytest.raises(RuntimeError, match="as often in the pass at w"):
        optimizer.step(twice)
    assert torch.equal(model.w, w)


@pytest.mark.parametrize("which", range(3))
def test_loss_that_is_not_one_number_is_an_error(which):
    losses = [weighted(C_FOCAL)] * 3
    losses[which] = lambda z, y: F.cross_entropy(z, y, reduction="none")
    model = Network()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO)
    criterion = closures.perturb_on(optimizer, losses[0], losses[1], loss_at_w=losses[2])
    with pytest.raises(ValueError, match=r"shape \(12,\).*return the mean"):
        optimizer.step(lambda: criterion(model(x), y))


# The authors' code, where an environment variable names a copy of it: STEPPE_OFFICIAL_BISAM, loss_fnc.py of
# github.com/LIONS-EPFL/BiSAM; STEPPE_OFFICIAL_FOCAL_SAM, focal_sam.py of github.com/scongl/Focal-SAM.


@pytest.mark.parametrize(("name", "mu", "alpha"), [("tanh", 10.0, 0.1), ("log", 1.0, None)])
def test_bisam_loss_is_that_of_the_official_code(name, mu, alpha):
    official = load("STEPPE_OFFICIAL_BISAM")
    z = f(Network().w.detach(), x)
    function = getattr(official, f"perturbation_loss_{name}")
    arguments = {} if alpha is None else {"alpha": alpha}
    want = function(z.clone(), y, mu=mu, **arguments).mean() / mu
    # the official gamma of -log is in float32
    torch.testing.assert_close(closures.bisam_loss(z, y, mu=mu, alpha=alpha), want, rtol=1e-7, atol=1e-7)


def test_focal_sam_matches_the_official_code():
    official = load("STEPPE_OFFICIAL_FOCAL_SAM").FocalSAM
    theirs = Network()
    optimizer = official(theirs.parameters(), torch.optim.SGD, rho=RHO, lr=0.1)
    for _ in range(20):
        z = theirs(x)
        weighted(1 - C_FOCAL)(z, y).backward(retain_graph=True)
        optimizer.first_step()
        weighted(C_FOCAL)(z, y).backward()
        optimizer.second_step()
        weighted(C_FOCAL)(theirs(x), y).backward()
        optimizer.third_step()
    model, ours, criterion = built("focal")
    for _ in range(20):
        ours.step(lambda: criterion(model(x), y))
    torch.testing.assert_close(model.w, theirs.w, rtol=1e-10, atol=1e-11)  # theirs adds 1e-12 to the norm
