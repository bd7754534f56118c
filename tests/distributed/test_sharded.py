"""C23, C24: FSDP2, tensor parallelism and partly sharded models equal one process; FSDP1 and DeepSpeed raise."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from named_methods import WRAPPERS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import steppe
import steppe._tensors.reductions
from layouts import (
    LAYOUTS,
    WHOLE_BATCH_LAYOUTS,
    close,
    fsdp,
    fully_shard,
    method,
    network,
    own_share,
    plain,
    run,
    samples,
    train,
    weights,
)
from ranks import start_ranks
from steppe._tensors.dtensor import local
from support import DRIVES, bits, each_in_turn


def train_in_layout(layout: str, name: str, steps: int):
    return train(LAYOUTS[layout], method(name), steps, whole_batch=layout in WHOLE_BATCH_LAYOUTS)


@pytest.mark.parametrize(
    ("name", "layout"),
    each_in_turn(WRAPPERS, LAYOUTS),
)
def test_every_method_equals_one_process(name, layout):
    expected = train(plain, method(name), 4)
    for found in start_ranks()(train_in_layout, layout, name, 4):
        close(found, expected)


def train_with_norms_of_own_shards(layout: str):
    """Divide by the norm of the own shard on each rank, as a library that does not support shards does."""
    over_ranks, steppe._tensors.reductions.sum_over_ranks = (
        steppe._tensors.reductions.sum_over_ranks,
        lambda summand, placement: summand,
    )
    try:
        return train_in_layout(layout, "sam", 4)
    finally:
        steppe._tensors.reductions.sum_over_ranks = over_ranks


@pytest.mark.parametrize("layout", ["fsdp2", "partly sharded", "tensor parallel"])
def test_mutant_norms_of_own_shards_is_killed(layout):
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(train_with_norms_of_own_shards, layout):
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 1e-6


def train_by(drive):
    model = fsdp(network())
    optimizer = method("gsam")(model)
    x, y = own_share(*samples(0))
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    return weights(model)


@pytest.mark.parametrize("drive", DRIVES)
def test_each_api_equals_one_process(drive):
    model = network()
    optimizer = method("gsam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in start_ranks()(train_by, drive):
        close(found, weights(model))


def perturb_and_restore():
    """With lr = 0, return if bits and storage of the shards are unchanged, and in which passes they were displaced."""
    model = fsdp(network())
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1, model=model)
    x, y = own_share(*samples(0))
    model(x)  # the first forward of torch 2.8's FSDP2 moves padded shards
    model.reshard()
    shards = [local(p.detach()) for p in model.parameters()]
    before, storage = bits(shards), [s.data_ptr() for s in shards]
    displaced = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            displaced.append(bits(local(p.detach()) for p in model.parameters()) != before)
            F.cross_entropy(model(x), y).backward()
    optimizer.step()
    try:
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
                if sam_pass.is_perturbed:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        displaced.append(bits(local(p.detach()) for p in model.parameters()) != before)
    after = [local(p.detach()) for p in model.parameters()]
    return bits(after) == before, [s.data_ptr() for s in after] == storage, displaced


def test_shards_are_restored_to_the_bit_in_the_same_storage():
    assert start_ranks()(perturb_and_restore) == [(True, True, [False, True, False])] * 2


def train_with_gathered_weights():
    """Keep the weights gathered after a backward, as for accumulation without communication."""
    model = fsdp(network())
    model.set_reshard_after_backward(False)
    optimizer = method("sam")(model)
    run(model, optimizer, range(4))
    return weights(model)


def test_second_pass_does_not_run_on_stale_gathered_weights():
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(train_with_gathered_weights):
        close(found, expected)


def make_after_an_evaluation():
    """Make the optimizer while the weights that FSDP2 has gathered are the parameters of the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(network(), mesh=mesh)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        model(samples(0)[0])
    optimizer = steppe.SAM(base, rho=0.1, model=model)
    run(model, optimizer, range(4))
    with torch.no_grad():
        model(samples(0)[0])
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="are weights that FSDP2 has gathered"):
        steppe.SAM(late, rho=0.1, model=model)
    return weights(model)


def test_optimizer_may_be_made_after_an_evaluation_with_a_base_of_before():
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(make_after_an_evaluation):
        close(found, expected)


def micro_batches():
    """Reduce gradients at the last micro-batch only, as FSDP2 accumulates."""
    model = fsdp(network())
    optimizer = method("wsam")(model)
    x, y = own_share(*samples(0))
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for last, part in enumerate((slice(2), slice(2, None))):
                    model.set_requires_gradient_sync(bool(last))
                    (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        optimizer.step()
    return weights(model)


def test_micro_batches_in_a_pass_equal_one_batch():
    model = network()
    optimizer = method("wsam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in start_ranks()(micro_batches):
        close(found, weights(model))


def interrupted(perturbed):
    """Interrupt a pass between two micro-batches, before FSDP2 has reduced the gradient of the first one."""
    model = fsdp(network())
    optimizer = method("sam")(model)
    x, y = own_share(*samples(9))
    with contextlib.suppress(KeyboardInterrupt):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for last in (False, True):
                    model.set_requires_gradient_sync(last)
                    F.cross_entropy(model(x), y).backward()
                    if sam_pass.is_perturbed == perturbed:
                        raise KeyboardInterrupt
    model.set_requires_gradient_sync(True)
    run(model, optimizer, range(4))
    return weights(model)


@pytest.mark.parametrize("perturbed", [False, True], ids=["at w", "at w + e"])
def test_interrupted_micro_batches_leave_nothing_in_the_next_step(perturbed):
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(interrupted, perturbed):
        close(found, expected)


def in_micro_batches(optimizer, backward):
    """Give each micro-batch a perturbation of its own, but reduce the gradients of the last one only."""
    for last in (False, True):
        for sam_pass in optimizer.passes(accumulate=last):
            with sam_pass:
                backward(sync=last)


def in_last_pass(optimizer, backward):
    for sam_pass in optimizer.passes():
        with sam_pass:
            backward(sync=sam_pass.is_last)


def by_closure(optimizer, backward):
    optimizer.step(lambda: backward(sync=optimizer.current_pass.is_last))


def by_classic_calls(optimizer, backward):
    backward(sync=False)
    optimizer.first_step(zero_grad=True)


def by_second_classic_call(optimizer, backward):
    backward(sync=True)
    optimizer.first_step(zero_grad=True)
    backward(sync=False)
    optimizer.second_step(zero_grad=True)


UNREDUCED = (in_micro_batches, in_last_pass, by_closure, by_classic_calls, by_second_classic_call)


def leave_gradients_unreduced(loop):
    """Return if a loop is refused, and the weights after it and further steps."""
    model = fsdp(network())
    optimizer = method("sam")(model)
    x, y = own_share(*samples(9))

    def backward(*, sync):
        model.set_requires_gradient_sync(sync)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="a pass ended with gradients that FSDP2 has not reduced"):
        loop(optimizer, backward)
    optimizer.zero_grad()
    model.set_requires_gradient_sync(True)
    run(model, optimizer, range(4))
    return weights(model)


@pytest.mark.parametrize("loop", UNREDUCED)
def test_pass_that_leaves_gradients_unreduced_is_an_error(loop):
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(leave_gradients_unreduced, loop):
        close(found, expected)


def accumulate_before_the_passes():
    model = fsdp(network())
    optimizer = method("sam")(model)
    x, y = own_share(*samples(9))
    model.set_requires_gradient_sync(False)
    F.cross_entropy(model(x), y).backward()
    model.set_requires_gradient_sync(True)
    with pytest.warns(UserWarning, match="are not part of the step"):
        run(model, optimizer, range(4))
    return weights(model)


def test_unreduced_gradients_from_before_the_passes_are_dropped_with_a_warning():
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(accumulate_before_the_passes):
        close(found, expected)


def train_in_bfloat16(shard):
    """Train with weights in float32 and passes in bfloat16."""
    model = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if shard:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    optimizer = method("sam")(model)
    x, y = (t.float() if t.is_floating_point() else t for t in own_share(*samples(0)))
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                logits = (
                    model(x)
                    if shard
                    else torch.func.functional_call(
                        model, {k: p.bfloat16() for k, p in model.named_parameters()}, x.bfloat16()
                    )
                )
                F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
    return weights(model)


def test_mixed_precision_policy_is_close_to_one_process():
    expected = train_in_bfloat16(shard=False)
    moved = max((a - b).detach().abs().max() for a, b in zip(expected, network().float().parameters(), strict=True))
    for found in start_ranks()(train_in_bfloat16, True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(moved))


def in_two_dimensions(name):
    """Train on four ranks, by tensor parallelism and FSDP2 in the two dimensions of a mesh; some shards are empty."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"3": ColwiseParallel(), "5": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = method(name)(model)
    for step in range(4):
        x, y = (t.chunk(2)[mesh.get_local_rank("data")] for t in samples(step))
        DRIVES["passes"](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    return weights(model)


def fsdp_over_four(name):
    """Train on four ranks with three rows, so that the shard of the last rank is empty."""
    return train(fsdp, method(name), 4)


METHODS_ON_FOUR = ["gsam", "layerwise_sam", "zsharp", "sparse_sam", "esam", "rwp", "looksam"]


ON_FOUR = [in_two_dimensions, fsdp_over_four]


@pytest.mark.parametrize(("function", "name"), each_in_turn(ON_FOUR, METHODS_ON_FOUR))
def test_four_ranks_equal_one_process(function, name):
    expected = train(plain, method(name), 4)
    for found in start_ranks(4)(function, name):
        close(found, expected)


def nan_on_one_rank(perturbed):
    model = fsdp(network())
    optimizer = method("wsam")(model)
    before = bits(weights(model))
    x, y = own_share(*samples(0))
    for sam_pass in optimizer.passes():
        with sam_pass:
            bad = dist.get_rank() == 1 and sam_pass.is_perturbed == perturbed
            F.cross_entropy(model(x * float("nan") if bad else x), y).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    return bits(weights(model)) == before, optimizer.skipped_steps


@pytest.mark.parametrize("perturbed", [False, True], ids=["at w", "at w + e"])
def test_nan_on_one_rank_skips_the_step_on_all(perturbed):
    assert start_ranks()(nan_on_one_rank, perturbed) == [(True, 1)] * 2


def train_with_scaler(scaler):
    model = fsdp(network().float())
    optimizer = method("friendly_sam", scaler=scaler)(model)
    for step in range(4):
        x, y = (t.float() if t.is_floating_point() else t for t in own_share(*samples(step)))
        for sam_pass in optimizer.passes():
            with sam_pass:
                loss = F.cross_entropy(model(x), y)
                (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return bits(weights(model))


def test_loss_scale_of_fsdp_changes_no_bit():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    assert start_ranks()(train_with_scaler, scaler) == start_ranks()(train_with_scaler, None)


# Engines and options that are errors.


def build_under_fsdp1(use_orig_params):
    messages = []
    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    for options in ({"model": model}, {}):
        with pytest.raises(TypeError, match=r"FSDP1.*fully_shard") as error:
            steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), **options)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_an_error(use_orig_params):
    start_ranks()(build_under_fsdp1, use_orig_params)


def test_deepspeed_is_an_error():
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(2, 2)
    with pytest.raises(TypeError, match=r"DeepSpeed.*FSDP2"):
        steppe.SAM(torch.optim.SGD(engine.parameters(), lr=0.1), model=engine)
    w = nn.Parameter(torch.zeros(2))
    w.ds_id = 0
    with pytest.raises(TypeError, match=r"DeepSpeed.*FSDP2"):
        steppe.SAM(torch.optim.SGD([w], lr=0.1))


def build_per_rank_on_shards():
    model = fsdp(network())
    with pytest.raises(ValueError, match="no rank has a whole gradient"):
        steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, per_rank=True)


def test_per_rank_on_shards_is_an_error():
    start_ranks()(build_per_rank_on_shards)
