"""Gauss-Newton and Fisher matrices against their definitions, over batches of unequal sizes, and their errors."""

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE, dense_hessian, objective, samples, tanh_net
from small_networks import SquareOnce, Squares, unchanged
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

from steppe.flatness import EmpiricalFisher, GaussNewton, Hessian, Objective, eigenvalues, trace

X, Y = samples()
RAGGED = [(X[:13], Y[:13]), (X[13:14], Y[13:14]), (X[14:], Y[14:])]
KINDS = pytest.mark.parametrize("data", [(X, Y), RAGGED], ids=["one batch", "ragged batches"])


def dense(operator):
    return operator(torch.eye(operator.n, dtype=operator.dtype))


def jacobians(net):
    """Return dz_i / dw of each sample, (N, classes, n)."""
    weights = dict(net.named_parameters())
    found = jacrev(lambda w: functional_call(net, w, (X,)))(weights)
    return torch.cat([found[k].flatten(2) for k in weights], dim=2).detach()


@KINDS
def test_gauss_newton_matrix_is_that_of_the_definition(data):
    net = tanh_net()
    J, z = jacobians(net), net(X).detach()
    H = torch.stack([jacrev(jacrev(F.cross_entropy))(z[i : i + 1], Y[i : i + 1])[0, :, 0] for i in range(len(X))])
    expected = torch.einsum("ica,icd,idb->ab", J, H, J) / len(X)
    operator = GaussNewton(objective(net, data))
    for _ in range(2):  # the second product uses the graph that is kept
        torch.testing.assert_close(dense(operator), expected, rtol=1e-10, atol=1e-14)
    assert (dense_hessian(net, X, Y) - expected).norm() > 0.1 * expected.norm()


@KINDS
def test_gauss_newton_matrix_of_a_cross_entropy_is_the_fisher_information(data):
    net = tanh_net()
    J, p = jacobians(net), net(X).softmax(1).detach()
    expected = torch.zeros(J.shape[2], J.shape[2], dtype=DOUBLE)
    for label in range(3):
        g = torch.einsum("ica,ic->ia", J, p - F.one_hot(torch.tensor(label), 3))
        expected += torch.einsum("i,ia,ib->ab", p[:, label], g, g) / len(X)
    torch.testing.assert_close(dense(GaussNewton(objective(net, data))), expected, rtol=1e-10, atol=1e-14)


@KINDS
def test_empirical_fisher_matrix_is_the_mean_of_the_gradients_of_single_samples(data):
    net = tanh_net()
    losses = [F.cross_entropy(net(X[i : i + 1]), Y[i : i + 1]) for i in range(len(X))]
    g = torch.stack([objective(net).flatten(torch.autograd.grad(loss, list(net.parameters()))) for loss in losses])
    operator = EmpiricalFisher(objective(net, data))
    for _ in range(2):
        torch.testing.assert_close(dense(operator), g.T @ g / len(X), rtol=1e-10, atol=1e-14)
    everything = eigenvalues(operator, 5, tol=1e-8)
    torch.testing.assert_close(everything.values, torch.linalg.eigvalsh(g.T @ g / len(X)).flip(0)[:5])


def test_matrices_at_a_linear_network_and_of_some_parameters():
    net = nn.Sequential(nn.Linear(4, 3)).double()
    o = objective(net, batch_size=7)
    torch.testing.assert_close(dense(GaussNewton(o)), dense(Hessian(o)), rtol=1e-10, atol=1e-14)
    net = tanh_net()
    whole, last = GaussNewton(objective(net)), GaussNewton(objective(net, parameters=["4.bias"]))
    torch.testing.assert_close(dense(last), dense(whole)[-3:, -3:], rtol=1e-10, atol=1e-14)
    assert trace(last, probes=1, top=eigenvalues(last, 3)).value == pytest.approx(float(dense(last).trace()))


def test_matrix_follows_a_change_of_the_weights():
    net = tanh_net()
    operators = [GaussNewton(objective(net)), EmpiricalFisher(objective(net))]
    before = [dense(operator) for operator in operators]
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    for operator, old in zip(operators, before, strict=True):
        fresh = dense(type(operator)(objective(net)))
        torch.testing.assert_close(dense(operator), fresh, rtol=1e-12, atol=0)
        assert (fresh - old).norm() > 0.1 * old.norm()


class Checkpointed(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


def test_activation_checkpointing_does_not_change_the_matrices():
    net = tanh_net()
    for kind in (GaussNewton, EmpiricalFisher):
        found = kind(objective(Checkpointed(net), batch_size=7))
        torch.testing.assert_close(dense(found), dense(kind(objective(net))), rtol=1e-10, atol=1e-14)


def test_measuring_leaves_the_model_unchanged():
    net = tanh_net()
    with unchanged(net):
        dense(GaussNewton(objective(net, batch_size=7)))
        dense(EmpiricalFisher(objective(net, batch_size=7)))


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_loss_that_does_not_depend_on_the_outputs_raises(kind):
    with pytest.raises(ValueError, match="depends on no parameter of the model"):
        dense(kind(Objective(tanh_net(), (X, Y), loss=lambda out, y: y.double().mean())))


def test_linear_loss_gives_a_zero_gauss_newton_matrix():
    o = Objective(tanh_net(), (X, Y), loss=lambda out, y: out.mean())
    assert torch.equal(dense(GaussNewton(o)), torch.zeros(o.n, o.n, dtype=DOUBLE))


class TwoOutputs(nn.Module):
    """Returns the features and the logits that are computed from them."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net()

    def forward(self, x):
        features = self.net[:4](x)
        return features, self.net[4](features)


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_outputs_may_come_from_the_evaluation_of_a_batch_also_with_the_loss_among_them(kind):
    net = tanh_net()

    def evaluate(model, batch):
        logits = model(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return loss, {"loss": loss, "logits": logits}

    found = kind(Objective(net, (X, Y), evaluate=evaluate))
    torch.testing.assert_close(dense(found), dense(kind(objective(net, (X, Y)))), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="the loss of a batch is tuple"):
        Objective(net, (X, Y), evaluate=lambda model, batch: (*evaluate(model, batch), 3)).loss()


def test_outputs_that_the_loss_does_not_use_do_not_matter():
    model = TwoOutputs()
    o = Objective(model, (X, Y), loss=lambda out, y: F.cross_entropy(out[1], y))
    for kind in (GaussNewton, EmpiricalFisher):
        torch.testing.assert_close(dense(kind(o)), dense(kind(objective(model.net))), rtol=1e-10, atol=1e-14)


def penalized(model):
    return lambda out, y: F.cross_entropy(out, y) + sum(p.square().sum() for p in model.parameters())


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_loss_that_is_not_a_function_of_the_outputs_raises(kind):
    net, v = tanh_net(), torch.ones(1, objective(tanh_net()).n, dtype=DOUBLE)
    with pytest.raises(ValueError, match="by another way than the model's outputs"):
        kind(Objective(net, (X, Y), loss=penalized(net)))(v)
    with pytest.raises(TypeError, match="evaluate= gives the loss only: return .loss, outputs. from it, or pass loss="):
        kind(Objective(net, (X, Y), evaluate=lambda model, b: F.cross_entropy(model(b[0]), b[1])))(v)
    both = Objective(TwoOutputs(), (X, Y), loss=lambda out, y: F.cross_entropy(out[1], y) + out[0].square().mean())
    with pytest.raises(ValueError, match="one is computed from the other"):
        kind(both)(v)


def test_outputs_that_are_not_one_term_per_sample_raise():
    net, v = tanh_net(), torch.ones(1, objective(tanh_net()).n, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"a mean over 7 samples, but the outputs have shape \(20, 3\)"):
        EmpiricalFisher(objective(net, size=lambda batch: 7))(v)
    with pytest.raises(ValueError, match=r"needs outputs \(batch, positions, classes\)"):
        EmpiricalFisher(objective(net), per="token")(v)
    with pytest.raises(ValueError, match="per='row': choose"):
        EmpiricalFisher(objective(net), per="row")


@pytest.mark.parametrize("kind", [GaussNewton, EmpiricalFisher])
def test_operation_without_a_second_derivative_raises(kind):
    o = objective(Squares(SquareOnce.apply))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        kind(o)(torch.ones(1, o.n, dtype=DOUBLE))
