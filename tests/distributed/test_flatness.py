"""Flatness of replicas: over the data of all ranks, in unequal shares, every number equals that of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from layouts import PartlySharded, fsdp, fully_shard, network, tensor_parallel
from ranks import start_ranks
from steppe._tensors.dtensor import is_sharded
from steppe.flatness import (
    EmpiricalFisher,
    FiniteDifferenceHessian,
    GaussNewton,
    Hessian,
    Objective,
    average_sharpness,
    batch_sharpness,
    between,
    by_layer,
    connect,
    density,
    eigenvalues,
    interpolation,
    m_sharpness,
    round_weights,
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


def loss_of_compiled_replica() -> tuple:
    (x, y), share = data(), SHARES[dist.get_rank()]
    model = torch.compile(DistributedDataParallel(network()), backend="eager")
    o = Objective(model, (x[share], y[share]), loss=F.cross_entropy)
    return o.samples, o.gradient()


def test_compiled_replicas_are_measured_over_the_data_of_all_ranks():
    expected = Objective(network(), data(), loss=F.cross_entropy).gradient()
    for samples, found in start_ranks(2)(loss_of_compiled_replica):
        assert samples == N
        torch.testing.assert_close(found, expected, **EXACT)


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


# Sharded weights.


def gathered(model: nn.Module) -> nn.Module:
    """Return a sharded model in which a forward without a backward has left the gathered weights."""
    model = fully_shard(model, reshard_after_forward=False)
    with torch.no_grad():
        model(data()[0])
    assert not any(map(is_sharded, model.parameters()))
    return model


def frozen(model: nn.Module) -> nn.Module:
    """Return a model whose only sharded weights are frozen, as in LoRA on a sharded base."""
    model = PartlySharded(model)
    model.layers[0].requires_grad_(False)
    assert not any(is_sharded(p) for p in model.parameters() if p.requires_grad)
    return model


def frozen_without_hooks(model: nn.Module) -> nn.Module:
    model = tensor_parallel(model)
    model[3:].requires_grad_(False)
    assert not any(is_sharded(p) for p in model.parameters() if p.requires_grad)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


SHARDED = {
    "FSDP2": fsdp,
    "FSDP2 after a forward": gathered,
    "FSDP2 of frozen weights": frozen,
    "tensor parallelism": tensor_parallel,
    "tensor parallelism of frozen weights": frozen_without_hooks,
    "FSDP1": fsdp1,
}


def measure_sharded(layout: str) -> list[str]:
    """Return the errors of all functions of ``steppe.flatness`` that take a model."""
    model, o = SHARDED[layout](network()), Objective(network(), data(), loss=F.cross_entropy)
    entries = [
        lambda: Objective(model, data(), loss=F.cross_entropy),
        lambda: Objective(model, data(), loss=F.cross_entropy, parameters=[next(iter(dict(model.named_parameters())))]),
        lambda: between(o, model),
        lambda: interpolation(o, model),
        lambda: connect(o, model, total_steps=1),
        lambda: round_weights(model, 4).__enter__(),
    ]
    if layout != "FSDP1":  # whose state dicts are full by default
        entries.append(lambda: between(o, model.state_dict()))
    messages = []
    for entry in entries:
        with pytest.raises(TypeError, match="is sharded") as error:
            entry()
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("layout", SHARDED)
def test_sharded_weights_are_refused(layout):
    for messages in start_ranks()(measure_sharded, layout):
        assert all("gather them into a plain model" in message for message in messages)


def loss_of_gathered_weights() -> Tensor:
    state = get_model_state_dict(fsdp(network()), options=StateDictOptions(full_state_dict=True))
    plain = network(seed=1)
    plain.load_state_dict(state)
    return Objective(plain, data(), loss=F.cross_entropy).loss()


def test_gathered_weights_are_measured_as_those_of_one_process():
    expected = objective().loss()
    for found in start_ranks()(loss_of_gathered_weights):
        torch.testing.assert_close(found, expected, **EXACT)
