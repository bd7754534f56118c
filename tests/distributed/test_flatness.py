"""Flatness of replicas: over all ranks' data, in shares of unequal size, every number is that of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layouts import network
from ranks import together
from steppe.flatness import (
    Hessian,
    Objective,
    average_sharpness,
    density,
    eigenvalues,
    m_sharpness,
    sharpness,
    trace,
)

N, MINE = 12, (slice(0, 8), slice(8, 12))  # parts of four lie within the ranks
EXACT, CLOSE = {"rtol": 1e-12, "atol": 1e-14}, {"rtol": 1e-10, "atol": 1e-12}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(N, 5, generator=generator, dtype=torch.float64), torch.randint(3, (N,), generator=generator)


def objective(**options) -> Objective:
    """Over this rank's share, with a last batch that is smaller; over everything where there is one process."""
    x, y = data()
    if not dist.is_initialized():
        return Objective(network(), (x, y), loss=F.cross_entropy, batch_size=4, **options)
    mine = MINE[dist.get_rank()]
    model = DistributedDataParallel(network())
    return Objective(model, (x[mine], y[mine]), loss=F.cross_entropy, batch_size=5 - dist.get_rank(), **options)


def vectors(n: int, k: int = 2) -> Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def first_and_second() -> tuple:
    o = objective()
    (e,) = vectors(o.n, 1)
    hessian = Hessian(o)
    return o.samples, o.loss(), o.loss(0.1 * e), *o.gradient(0.1 * e), hessian(vectors(o.n))


def spectrum() -> tuple:
    hessian = Hessian(objective())
    top, bottom = eigenvalues(hessian, 2, tol=1e-8), eigenvalues(hessian, which="smallest", tol=1e-8)
    found = density(hessian, probes=2, num_iterations=4)
    estimated = trace(hessian, probes=4, top=top)
    return top.values, bottom.values, found.nodes, found.weights, torch.tensor([estimated.value, estimated.error])


def near() -> tuple:
    o = objective()
    worst = sharpness(o, 0.3, ascent_steps=4, restarts=2)
    average = average_sharpness(o, 0.05, pairs=3)
    return torch.tensor([worst.value, *worst.restarts, worst.first_order, average.value, average.error]), worst.e


def by_parts() -> tuple:
    x, y = data()
    if dist.is_initialized():
        mine = MINE[dist.get_rank()]
        o = Objective(DistributedDataParallel(network()), (x[mine], y[mine]), loss=F.cross_entropy, batch_size=8)
    else:
        o = Objective(network(), (x, y), loss=F.cross_entropy)
    found = m_sharpness(o, 0.3, 4, ascent_steps=3, restarts=2)
    return found.n, found.samples, torch.tensor([found.value, found.error, found.one_step.value, found.one_step.error])


@pytest.mark.parametrize(
    ("what", "tolerance"), [(first_and_second, EXACT), (spectrum, CLOSE), (near, CLOSE), (by_parts, CLOSE)]
)
def test_replicas_measure_what_one_process_does(what, tolerance):
    alone, (first, second) = what(), together(2)(what)
    torch.testing.assert_close(first, alone, **tolerance)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # so that all ranks climb the same way


def one_share() -> Tensor:
    x, y = data()
    mine = MINE[0]
    return Objective(network(), (x[mine], y[mine]), loss=F.cross_entropy).loss()


def test_one_share_would_be_another_loss():
    assert abs(float(one_share() - objective().loss())) > 1e-3


def normalized_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()


def estimated() -> dict[str, Tensor]:
    x, y = data()
    if dist.is_initialized():
        x, y = x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()]
        o = Objective(DistributedDataParallel(normalized_net()), (x, y), loss=F.cross_entropy)
    else:
        o = Objective(normalized_net(), (x, y), loss=F.cross_entropy, batch_size=N // 2)
    return {k: t for k, t in o.statistics().items() if "running" in k}


def test_statistics_are_those_of_all_batches():
    first, second = together(2)(estimated)
    torch.testing.assert_close(first, estimated(), **EXACT)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def untouched() -> bool:
    x, y = data()
    model = DistributedDataParallel(network())
    before = [p.detach().clone() for p in model.parameters()]
    o = Objective(model, (x, y), loss=F.cross_entropy)
    sharpness(o, 0.3, ascent_steps=2)
    Hessian(o)(vectors(o.n))
    clean = all(p.grad is None for p in model.parameters()) and all(map(torch.equal, before, model.parameters()))
    F.cross_entropy(model(x), y).backward()  # and its reducer is as it was
    return clean and all(p.grad is not None for p in model.parameters())


def test_the_replicas_go_on_as_if_nothing_had_been():
    assert together(2)(untouched) == [True, True]


def of_an_uneven_part() -> str:
    x, y = data()
    mine = MINE[dist.get_rank()]
    o = Objective(DistributedDataParallel(network()), (x[mine], y[mine]), loss=F.cross_entropy)
    return str(next(o.split(3)).samples)


def test_a_part_is_a_ranks_own():
    assert together(2)(of_an_uneven_part) == ["3", "3"]
