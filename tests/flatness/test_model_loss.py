"""Models that return their loss: the objective is that of all data in one batch, weighted by what the loss averages."""

import math

import pytest
import torch
import torch.nn.functional as F
from known_hessians import DOUBLE
from small_networks import unchanged
from torch import nn

from steppe.flatness import Budget, EmpiricalFisher, GaussNewton, Hessian, Objective, m_sharpness, measure

CLASSES, LENGTH = 5, 6


class LanguageModel(nn.Module):
    """A network in the form of Hugging Face: ``labels`` in, a dictionary with loss and logits out."""

    def __init__(self, *, causal: bool, uniform: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.embedding, self.head = nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES)
        if uniform:
            nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)
        self.double()

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        logits = self.head(torch.tanh(x.cumsum(1) if self.causal else x + x.mean(1, keepdim=True)))
        if labels is None:
            return {"logits": logits}
        predictions, targets = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
        return {"loss": F.cross_entropy(predictions.transpose(1, 2), targets), "logits": logits}


def tokens(n=9, length=LENGTH):
    """Return rows of tokens, whose labels are left out from a different position on; those of the last row all are."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(CLASSES, (n, length), generator=g)
    labels = ids.clone()
    for i, row in enumerate(labels):
        row[1 + (3 * i) % length :] = -100
    labels[0, 1:] = ids[0, 1:]
    labels[-1] = -100
    return {"input_ids": ids, "labels": labels}


def split(batch, *sizes):
    parts = [torch.split(t, sizes) for t in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


def whole_gradient(model, batch):
    loss = model(**batch)["loss"]
    return loss.detach(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])


SPLITS = pytest.mark.parametrize("sizes", [(9,), (1, 7, 1), (5, 4)], ids=str)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "masked"])
UNIFORM = pytest.mark.parametrize("uniform", [True, False], ids=["all tokens have the same loss", "random weights"])


@SPLITS
@CAUSAL
@UNIFORM
def test_batches_are_weighted_by_the_tokens_that_count(sizes, causal, uniform):
    model, batch = LanguageModel(causal=causal, uniform=uniform), tokens()
    expected, gradient = whole_gradient(model, batch)
    objective = Objective(model, split(batch, *sizes))
    loss, found = objective.gradient()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
    labels = batch["labels"][:, 1:] if causal else batch["labels"]
    assert objective.samples == int((labels != -100).sum())
    assert objective.weighted_by == "tokens"


def test_weights_by_rows_would_be_wrong():
    model, batch = LanguageModel(causal=True), tokens()
    by_rows = Objective(model, split(batch, 5, 3, 1)[:2], size=lambda b: len(b["labels"]))
    assert abs(by_rows.loss() - model(**batch)["loss"].detach()) > 1e-4
    assert by_rows.weighted_by == "size(batch)"


@CAUSAL
def test_matrices_do_not_depend_on_the_batches(causal):
    model, batch = LanguageModel(causal=causal), tokens()
    for kind in (Hessian, GaussNewton, lambda o: EmpiricalFisher(o, per="token")):
        one, many = (kind(Objective(model, split(batch, *sizes))) for sizes in ((9,), (2, 6, 1)))
        identity = torch.eye(one.n, dtype=DOUBLE)
        torch.testing.assert_close(many(identity), one(identity), rtol=1e-10, atol=1e-14)


@CAUSAL
def test_empirical_fisher_matrix_per_token_is_that_of_the_tokens(causal):
    model, batch = LanguageModel(causal=causal), tokens()
    logits, labels = model(**batch)["logits"], batch["labels"]
    logits, labels = (logits[:, :-1], labels[:, 1:]) if causal else (logits, labels)
    losses = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    o = Objective(model, split(batch, 4, 5))
    g = torch.stack([o.flatten(torch.autograd.grad(x, list(model.parameters()), retain_graph=True)) for x in losses])
    found = EmpiricalFisher(o, per="token")(torch.eye(o.n, dtype=DOUBLE))
    torch.testing.assert_close(found, g.T @ g / len(g), rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="choose per='token'"):
        EmpiricalFisher(o)(torch.eye(o.n, dtype=DOUBLE))


def test_dictionary_of_tensors_is_split_into_batches():
    model, batch = LanguageModel(causal=True), tokens()
    whole, split_up = Objective(model, batch), Objective(model, batch, batch_size=2)
    assert (whole.is_single_batch, split_up.is_single_batch) == (True, False)
    torch.testing.assert_close(split_up.loss(), whole.loss(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="tensors of 9, 8 entries"):
        Objective(model, batch | {"labels": batch["labels"][:8]})


class Classifier(nn.Module):
    def __init__(self, penalty=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.penalty = nn.Linear(3, 4).double(), penalty

    def forward(self, x, labels):
        logits = self.layer(x)
        batch_term = self.penalty * logits.square().mean(0).sqrt().sum()
        kind = F.mse_loss if labels.is_floating_point() else F.cross_entropy
        return kind(logits, labels) + batch_term, logits  # a tuple, as with return_dict=False


@pytest.mark.parametrize("labels", [torch.arange(7) % 4, torch.randn(7, 4, dtype=DOUBLE)], ids=["classes", "numbers"])
def test_losses_of_samples_are_weighted_by_samples(labels):
    model, x = Classifier(), torch.randn(7, 3, dtype=DOUBLE)
    o = Objective(model, {"x": x, "labels": labels}, batch_size=3)
    torch.testing.assert_close(o.loss(), model(x, labels)[0].detach(), rtol=1e-12, atol=0)
    assert (o.weighted_by, o.samples) == ("samples", 7)
    whole = GaussNewton(Objective(model, {"x": x, "labels": labels}))
    identity = torch.eye(o.n, dtype=DOUBLE)
    torch.testing.assert_close(GaussNewton(o)(identity), whole(identity), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(GaussNewton(o)(identity), Hessian(o)(identity), rtol=1e-10, atol=1e-14)


def test_loss_that_is_not_a_mean_raises():
    batch = {"x": torch.randn(6, 3, dtype=DOUBLE), "labels": torch.arange(6) % 4}
    with pytest.raises(ValueError, match="over its parts, so it is not a mean over samples"):
        Objective(Classifier(penalty=1.0), batch).loss()
    assert math.isfinite(Objective(Classifier(penalty=1.0), batch, size=lambda b: len(b["x"])).loss())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            [{"input_ids": torch.zeros(2, 3, dtype=torch.int64)}],
            ValueError,
            "returned no loss for a batch of input_ids",
        ),
        ([(torch.zeros(2, 3), torch.zeros(2))], TypeError, "a batch is tuple, but without loss= and evaluate="),
    ],
)
def test_batches_without_a_loss_raise(data, error, message):
    with pytest.raises(error, match=message):
        Objective(LanguageModel(causal=True), data).loss()


def test_parts_without_a_label_are_left_out_of_m_sharpness():
    model = LanguageModel(causal=False)
    found = m_sharpness(Objective(model, tokens()), rho=0.1, m=1, ascent_steps=1, restarts=1)
    assert found.n == 8
    assert math.isfinite(found.value)


def test_parts_are_counted_in_rows_even_if_fewer_tokens_have_a_label():
    batch = tokens()
    batch["labels"][:, 1:] = -100
    found = m_sharpness(Objective(LanguageModel(causal=False), batch), rho=0.1, m=9, ascent_steps=1, restarts=1)
    assert (found.n, found.samples) == (1, 8)
    with pytest.raises(ValueError, match="m=10, but a batch has 9 samples"):
        m_sharpness(Objective(LanguageModel(causal=False), batch), rho=0.1, m=10)


def test_measuring_states_the_weights_and_leaves_the_model_unchanged():
    model = LanguageModel(causal=True)
    few = Budget(ascent_steps=1, restarts=1, m=9, pairs=1, probes=2, density_probes=1, density_iterations=2, points=0)
    with unchanged(model):
        settings = measure(Objective(model, tokens()), few).settings
    assert settings["weighted_by"] == "tokens"
