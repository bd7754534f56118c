"""DDP with a loss for the perturbation, GAM, and Eigen-SAM's eigenvector: replicas train as one process does."""

import pytest
import torch
import torch.nn.functional as F

import steppe
from layouts import close, ddp, network, own_share, plain, samples, weights
from ranks import start_ranks
from steppe import closures, variants

C = torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)


def weighted(c):
    return lambda logits, y: F.cross_entropy(logits, y, weight=c, reduction="sum") / len(y)


def train(layout, name):
    model = layout(network())
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = {
        "perturb_on": lambda: steppe.SAM(base, 0.3, model=model),
        "gam": lambda: variants.gam(base, 0.3, model=model),
        "eigen_sam": lambda: variants.eigen_sam(base, 0.3, alpha=0.8, model=model),
    }[name]()
    criterion = F.cross_entropy
    if name == "perturb_on":
        criterion = closures.perturb_on(optimizer, weighted(C), weighted(C), loss_at_w=weighted(1 - C))
    for t in range(4):
        x, y = own_share(*samples(t))
        if name == "eigen_sam":
            closures.update_eigenvector(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.step(lambda x=x, y=y: criterion(model(x), y))
    return weights(model)


@pytest.mark.parametrize("name", ["perturb_on", "gam", "eigen_sam"])
def test_replicas_equal_one_process(name):
    expected = train(plain, name)
    for found in start_ranks()(train, ddp, name):
        close(found, expected)
