"""Contract C34: the flatness of a model with activation checkpointing is that of the same model without it."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision_stand_in import torchvision_stand_in

from steppe.flatness import Hessian, Objective, sharpness
from support import rest_is_slow

BATCH = 8


class Block(nn.Module):
    """A residual block with BatchNorm and dropout, whose forward may be run again in the backward."""

    def __init__(self, kind: bool | None) -> None:
        super().__init__()
        self.kind = kind
        """use_reentrant of the checkpointing; None for none."""
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6))

    def forward(self, x):
        return x + (self.layers(x) if self.kind is None else checkpoint(self.layers, x, use_reentrant=self.kind))


class Sequential(nn.Sequential):
    """torch's other form of activation checkpointing."""

    def forward(self, x):
        return checkpoint_sequential(self, 2, x, use_reentrant=False)


def networks(kind):
    """Return a network with activation checkpointing and the same without; the first block gets the data themselves."""
    torch.manual_seed(0)
    plain = nn.Sequential(Block(None), Block(None), nn.Linear(6, 3))
    if kind == "sequential":
        return Sequential(*copy.deepcopy(plain)), plain
    checkpointed = copy.deepcopy(plain)
    for block in checkpointed[:2]:
        block.kind = kind
    return checkpointed, plain


def objective_of(model, **options):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(2 * BATCH, 6, generator=g), torch.randint(3, (2 * BATCH,), generator=g)
    return Objective(model, data, loss=F.cross_entropy, batch_size=BATCH, **options)


KINDS = pytest.mark.parametrize("kind", [False, True, "sequential"], ids=["non-reentrant", "reentrant", "sequential"])


@KINDS
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["own dtype", "float64"])
def test_c34_gradient_away_from_w_is_that_without_checkpointing(kind, batch_norm, dtype):
    ours, plain = (objective_of(model, batch_norm=batch_norm, dtype=dtype) for model in networks(kind))
    e = 0.3 * torch.randn(ours.n, generator=torch.Generator().manual_seed(1))
    for at in (None, e):
        for found, expected in zip(ours.gradient(at), plain.gradient(at), strict=True):
            torch.testing.assert_close(found, expected)
    assert (ours.gradient(e)[1] - ours.gradient()[1]).norm() > 0.1 * ours.gradient()[1].norm()
    assert all(p.grad is None for p in ours.model.parameters())


@KINDS
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_c34_hessian_products_are_those_without_checkpointing(kind, batch_norm):
    ours, plain = (objective_of(m, batch_norm=batch_norm, dtype=torch.float64) for m in networks(kind))
    vectors = torch.randn(3, ours.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(Hessian(ours)(vectors), Hessian(plain)(vectors))
    e = 0.3 * vectors[0]
    with ours.at_weights(ours.weights + e) as there, plain.at_weights(plain.weights + e) as there_too:
        torch.testing.assert_close(Hessian(there)(vectors), Hessian(there_too)(vectors))


@KINDS
def test_c34_kept_graph_of_one_batch_gives_the_same_products(kind):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(BATCH, 6, generator=g), torch.randint(3, (BATCH,), generator=g)
    ours, plain = (Hessian(Objective(m, data, loss=F.cross_entropy, dtype=torch.float64)) for m in networks(kind))
    for seed in range(2):  # the second product uses the kept graph
        v = torch.randn(2, ours.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(ours(v), plain(v))


@pytest.mark.parametrize("kind", rest_is_slow([False, True, "sequential"], lambda kind: kind == "sequential"))
def test_c34_sharpness_is_that_without_checkpointing(kind):
    ours, plain = (sharpness(objective_of(model), rho=0.5) for model in networks(kind))
    assert ours.value == pytest.approx(plain.value, rel=1e-4)


def test_measuring_leaves_checkpointing_of_the_training_as_it_was():
    model, _ = networks(True)
    before = torch.utils.checkpoint.CheckpointFunction
    objective_of(model).gradient()
    assert torch.utils.checkpoint.CheckpointFunction is before


def vision_transformer():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with torchvision_stand_in():
        return importlib.import_module("timm.models.vision_transformer")


def test_c34_vision_transformer_of_timm_with_its_own_switch():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    plain = vision_transformer().VisionTransformer(**options)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)
    g = torch.Generator().manual_seed(0)
    data = torch.randn(4, 3, 16, 16, generator=g), torch.randint(3, (4,), generator=g)
    ours, theirs = (Objective(m, data, loss=F.cross_entropy) for m in (checkpointed, plain))
    e = 0.02 * torch.randn(ours.n, generator=g)
    torch.testing.assert_close(ours.gradient(e)[1], theirs.gradient(e)[1])
    v = torch.randn(1, ours.n, generator=g)
    torch.testing.assert_close(Hessian(ours)(v), Hessian(theirs)(v), rtol=1e-4, atol=1e-5)
