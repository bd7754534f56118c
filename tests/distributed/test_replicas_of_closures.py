"""Losses of the passes, GAM, Eigen-SAM and SASSHA: replicas train as one process does, shards or raise."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import steppe
from layouts import LAYOUTS, close, ddp, fully_shard, network, own_share, plain, samples, weights
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
        "sassha": lambda: variants.sassha(model.parameters(), 0.05, 0.3, interval=2, model=model),
    }[name]()
    criterion = F.cross_entropy
    if name == "perturb_on":
        criterion = closures.perturb_on(optimizer, weighted(C), weighted(C), loss_at_w=weighted(1 - C))
    if name == "sassha":
        criterion = closures.hessian_diagonal(optimizer, F.cross_entropy)
    for t in range(4):
        x, y = own_share(*samples(t))
        if name == "eigen_sam":
            closures.update_eigenvector(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.step(lambda x=x, y=y: criterion(model(x), y))
    return weights(model)


@pytest.mark.parametrize("name", ["perturb_on", "gam", "eigen_sam", "sassha"])
def test_replicas_equal_one_process(name):
    expected = train(plain, name)
    for found in start_ranks()(train, ddp, name):
        close(found, expected)


def refusals(layout):
    """Return the errors of the losses that differentiate by the parameters themselves."""
    model = LAYOUTS[layout](network())
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    sam, eigen_sam = steppe.SAM(base, 0.3, model=model), variants.eigen_sam(base, 0.3, model=model)
    sassha = variants.sassha(model.parameters(), model=model)
    x, y = own_share(*samples(0))
    criterion = closures.perturb_on(sam, weighted(C), weighted(C), loss_at_w=weighted(1 - C))
    estimating = closures.hessian_diagonal(sassha, F.cross_entropy)
    messages = []
    for call in (
        lambda: sam.step(lambda: criterion(model(x), y)),
        lambda: closures.update_eigenvector(eigen_sam, lambda: F.cross_entropy(model(x), y)),
        lambda: sassha.step(lambda: estimating(model(x), y)),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("layout", ["fsdp2", "tensor parallel"])
def test_losses_that_need_whole_gradients_are_refused_on_shards(layout):
    for loss_at_w, eigenvector, estimate in start_ranks()(refusals, layout):
        assert "loss_at_w with sharded parameters" in loss_at_w
        assert "some of these are sharded" in eigenvector
        assert "an estimate of the Hessian with SASSHA: it takes derivatives with respect to whole weights" in estimate


def step_without_replicas():
    model = network()
    optimizer = variants.sassha(model.parameters(), model=model)
    criterion = closures.hessian_diagonal(optimizer, F.cross_entropy)
    before = weights(model)
    x, y = own_share(*samples(0))
    with pytest.raises(RuntimeError, match="2 processes without a DistributedDataParallel module.*Give model="):
        optimizer.step(lambda: criterion(model(x), y))
    close(weights(model), before)


def test_estimates_of_processes_that_average_their_gradients_by_hand_are_refused():
    start_ranks()(step_without_replicas)


def train_on_frozen_shards(name, sharded):
    """Return the trained weights after steps of a network of which a part is frozen, and sharded or not."""
    model = network()
    for layer in (model[0], model[5]):
        layer.requires_grad_(False)
        if sharded:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if name == "update_eigenvector":
        optimizer = variants.eigen_sam(base, 0.3, alpha=0.8, model=model)
        x, y = samples(0)
        return closures.update_eigenvector(optimizer, lambda: F.cross_entropy(model(x), y))
    optimizer = steppe.SAM(base, 0.3, model=model)
    if name == "perturb_on":
        criterion = closures.perturb_on(optimizer, weighted(C), weighted(C), loss_at_w=weighted(1 - C))
    else:
        criterion = closures.functional(optimizer, F.cross_entropy)
    for t in range(3):
        x, y = samples(t)  # all samples on each rank: the gradients of weights that are not sharded are not averaged
        optimizer.step(lambda x=x, y=y: criterion(model(x), y))
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["perturb_on", "functional"])
def test_frozen_weights_may_be_sharded(name):
    expected = train_on_frozen_shards(name, sharded=False)
    for found in start_ranks()(train_on_frozen_shards, name, True):
        close(found, expected)


def eigenvector_of_frozen_shards():
    with pytest.raises(RuntimeError, match="some of these are sharded"):
        train_on_frozen_shards("update_eigenvector", sharded=True)


def test_eigenvector_on_frozen_shards_is_refused():
    start_ranks()(eigenvector_of_frozen_shards)
