"""Flatness of replicas: over the data of all ranks, in unequal shares, every number equals that of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layouts import network
from ranks import start_ranks
from steppe.flatness import (
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Objective,
    average_sharpness,
    batch_sharpness,
    by_layer,
    density,
    eigenvalues,
    m_sharpness,
    sharpness,
    trace,
)

N, SHARES = 12, (slice(0, 8), slice(8, 12))  # parts of four samples lie within one rank
EXACT, CLOSE = {"rtol": 1e-12, "atol": 1e-14}, {"rtol": 1e-10, "atol": 1e-12}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, 5, generator=generator, dtype=torch.float64), torch.randint(3, (N,), generator=generator)


def objective(**options) -> Objective:
    """Return the loss over this rank's share, whose last batch is smaller; in a single process over all data."""
    x, y = data()
    if not dist.is_initialized():
        return Objective(network(), (x, y), loss=F.cross_entropy, batch_size=4, **options)
    share = SHARES[dist.get_rank()]
    model = DistributedDataParallel(network())
    return Objective(model, (x[share], y[share]), loss=F.cross_entropy, batch_size=5 - dist.get_rank(), **options)


def vectors(n: int, k: int = 2) -> Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loss_gradient_and_hessian() -> tuple:
    o = objective()
    (e,) = vectors(o.n, 1)
    hessian = Hessian(o)
    return o.samples, o.loss(), o.loss(0.1 * e), *o.gradient(0.1 * e), hessian(vectors(o.n))


def spectrum_values() -> tuple:
    hessian = Hessian(objective())
    top, bottom = eigenvalues(hessian, 2, tol=1e-8), eigenvalues(hessian, which="smallest", tol=1e-8)
    found = density(hessian, probes=2, num_iterations=4)
    estimated = trace(hessian, probes=4, top=top)
    return top.values, bottom.values, found.nodes, found.weights, torch.tensor([estimated.value, estimated.error])


def sharpness_values() -> tuple:
    o = objective()
    worst = sharpness(o, 0.3, ascent_steps=4, restarts=2)
    average = average_sharpness(o, 0.05, pairs=3)
    return torch.tensor([worst.value, *worst.restarts, worst.first_order, average.value, average.error]), worst.e


def matrix_values() -> tuple:
    o = objective()
    kinds = (GaussNewton, EmpiricalFisher, FiniteDifferenceHessian)
    tops = [row.lambda_max.value for row in by_layer(o, probes=1, tol=1e-8)]
    return *(kind(o)(vectors(o.n)) for kind in kinds), torch.tensor(tops)


def objective_of_whole_parts() -> Objective:
    """Return the same with parts of four samples that are parts of one process, too."""
    x, y = data()
    if dist.is_initialized():
        share = SHARES[dist.get_rank()]
        return Objective(DistributedDataParallel(network()), (x[share], y[share]), loss=F.cross_entropy, batch_size=8)
    return Objective(network(), (x, y), loss=F.cross_entropy)


def batch_sharpness_values() -> tuple:
    found = batch_sharpness(objective_of_whole_parts(), 4)
    return found.n, torch.tensor([found.value, found.error])


def m_sharpness_values() -> tuple:
    found = m_sharpness(objective_of_whole_parts(), 0.3, 4, ascent_steps=3, restarts=2)
    return found.n, found.samples, torch.tensor([found.value, found.error, found.one_step.value, found.one_step.error])


@pytest.mark.parametrize(
    ("measurement", "tolerance"),
    [
        (loss_gradient_and_hessian, EXACT),
        (spectrum_values, CLOSE),
        (sharpness_values, CLOSE),
        (m_sharpness_values, CLOSE),
        (batch_sharpness_values, CLOSE),
        (matrix_values, {"rtol": 1e-7, "atol": 1e-9}),  # finite differences depend on the rounding of the sums
    ],
)
def test_replicas_measure_the_same_as_one_process(measurement, tolerance):
    single, (first, second) = measurement(), start_ranks(2)(measurement)
    torch.testing.assert_close(first, single, **tolerance)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # else the ascents of the ranks would diverge


def loss_of_one_share() -> Tensor:
    x, y = data()
    share = SHARES[0]
    return Objective(network(), (x[share], y[share]), loss=F.cross_entropy).loss()


def test_loss_of_one_share_differs_from_the_loss_of_all_data():
    assert abs(float(loss_of_one_share() - objective().loss())) > 1e-3


def batch_norm_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()


def statistics() -> dict[str, Tensor]:
    x, y = data()
    if dist.is_initialized():
        x, y = x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]
        o = Objective(DistributedDataParallel(batch_norm_network()), (x, y), loss=F.cross_entropy)
    else:
        o = Objective(batch_norm_network(), (x, y), loss=F.cross_entropy, batch_size=N // 2)
    return {k: t for k, t in o.statistics().items() if "running" in k}


def test_statistics_are_the_mean_over_batches_of_all_ranks():
    first, second = start_ranks(2)(statistics)
    torch.testing.assert_close(first, statistics(), **EXACT)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def replica_is_unchanged() -> bool:
    x, y = data()
    model = DistributedDataParallel(network())
    before = [p.detach().clone() for p in model.parameters()]
    o = Objective(model, (x, y), loss=F.cross_entropy)
    sharpness(o, 0.3, ascent_steps=2)
    Hessian(o)(vectors(o.n))
    unchanged = all(p.grad is None for p in model.parameters()) and all(map(torch.equal, before, model.parameters()))
    F.cross_entropy(model(x), y).backward()  # the reducer of DistributedDataParallel still works
    return unchanged and all(p.grad is not None for p in model.parameters())


def test_replicas_are_unchanged_and_can_be_trained():
    assert start_ranks(2)(replica_is_unchanged) == [True, True]


def samples_of_first_part() -> str:
    x, y = data()
    share = SHARES[dist.get_rank()]
    o = Objective(DistributedDataParallel(network()), (x[share], y[share]), loss=F.cross_entropy)
    return str(next(o.split(3)).samples)


def test_parts_lie_within_one_rank():
    assert start_ranks(2)(samples_of_first_part) == ["3", "3"]
