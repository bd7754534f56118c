"""C23: FSDP2, tensor parallelism and mixtures train as one process does."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import steppe
import steppe._tensors.ops
from layouts import LAYOUTS, SEE_ALL, fsdp, mine, named, network, plain, run, samples, train, weights
from named_methods import WRAPPERS
from ranks import together
from steppe._tensors.dtensor import local
from support import DRIVES, bits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def ranked(layout: str, name: str, steps: int):
    return train(LAYOUTS[layout], named(name), steps, whole_batch=layout in SEE_ALL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_method_equals_one_process(name, layout):
    expected = train(plain, named(name), 4)
    for found in together()(ranked, layout, name, 4):
        close(found, expected)


def with_norms_of_their_own(layout: str):
    """What happens where a library does not know of shards: every rank divides by the norm of its own part."""
    over_ranks, steppe._tensors.ops.sum_over_ranks = steppe._tensors.ops.sum_over_ranks, lambda summand, spread: summand
    try:
        return ranked(layout, "sam", 4)
    finally:
        steppe._tensors.ops.sum_over_ranks = over_ranks


@pytest.mark.parametrize("layout", ["fsdp2", "partly", "tensor parallel"])
def test_that_test_can_fail(layout):
    expected = train(plain, named("sam"), 4)
    for found in together()(with_norms_of_their_own, layout):
        assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) > 1e-6


def driven(drive):
    model = fsdp(network())
    optimizer = named("gsam")(model)
    x, y = mine(*samples(0))
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    return weights(model)


@pytest.mark.parametrize("drive", DRIVES)
def test_every_way_to_drive_a_step(drive):
    model = network()
    optimizer = named("gsam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in together()(driven, drive):
        close(found, weights(model))


def comes_back():
    """With lr = 0: the bits and the storage of each shard before and after, and whether it was away in between."""
    model = fsdp(network())
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.1, model=model)
    shards = [local(p.detach()) for p in model.parameters()]
    before, places = bits(shards), [s.data_ptr() for s in shards]
    away = []
    x, y = mine(*samples(0))
    for sam_pass in optimizer.passes():
        with sam_pass:
            away.append(bits(local(p.detach()) for p in model.parameters()) != before)
            F.cross_entropy(model(x), y).backward()
    optimizer.step()
    try:
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
                if sam_pass.is_perturbed:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        away.append(bits(local(p.detach()) for p in model.parameters()) != before)
    after = [local(p.detach()) for p in model.parameters()]
    return bits(after) == before, [s.data_ptr() for s in after] == places, away


def test_shards_come_back_to_the_bit_in_the_same_storage():
    assert together()(comes_back) == [(True, True, [False, True, False])] * 2


def kept_gathered():
    """The weights stay gathered after a backward, as for an accumulation without communication."""
    model = fsdp(network())
    model.set_reshard_after_backward(False)
    optimizer = named("sam")(model)
    run(model, optimizer, range(4))
    return weights(model)


def test_weights_that_stay_gathered_are_not_stale_in_the_second_pass():
    expected = train(plain, named("sam"), 4)
    for found in together()(kept_gathered):
        close(found, expected)


def micro_batches():
    """FSDP2's accumulation: gradients meet at the last micro-batch."""
    model = fsdp(network())
    optimizer = named("wsam")(model)
    x, y = mine(*samples(0))
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for last, part in enumerate((slice(2), slice(2, None))):
                    model.set_requires_gradient_sync(bool(last))
                    (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
        optimizer.step()
    return weights(model)


def test_accumulation_inside_a_walk_is_one_big_batch():
    model = network()
    optimizer = named("wsam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in together()(micro_batches):
        close(found, weights(model))


def in_bfloat16(shard):
    """Weights in float32, passes in bfloat16."""
    model = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if shard:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    optimizer = named("sam")(model)
    x, y = (t.float() if t.is_floating_point() else t for t in mine(*samples(0)))
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


def test_mixed_precision_of_fsdp():
    expected = in_bfloat16(shard=False)
    moved = max((a - b).detach().abs().max() for a, b in zip(expected, network().float().parameters(), strict=True))
    for found in together()(in_bfloat16, True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(moved))


def in_two_dimensions(name):
    """Four ranks: tensor parallelism in one dimension of the mesh, FSDP2 in the other; some shards are empty."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"3": ColwiseParallel(), "5": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = named(name)(model)
    for step in range(4):
        x, y = (t.chunk(2)[mesh.get_local_rank("data")] for t in samples(step))
        DRIVES["passes"](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    return weights(model)


def fsdp_over_four(name):
    """Three rows on four ranks: the last one's shard is empty."""
    return train(fsdp, named(name), 4)


@pytest.mark.parametrize("name", ["gsam", "layerwise_sam", "zsharp", "sparse_sam", "esam", "rwp", "looksam"])
@pytest.mark.parametrize("function", [in_two_dimensions, fsdp_over_four])
@pytest.mark.xdist_group("four ranks")
def test_four_ranks(function, name):
    expected = train(plain, named(name), 4)
    for found in together(4)(function, name):
        close(found, expected)


def nan_on_one_rank(climbed):
    model = fsdp(network())
    optimizer = named("wsam")(model)
    before = bits(weights(model))
    x, y = mine(*samples(0))
    for sam_pass in optimizer.passes():
        with sam_pass:
            bad = dist.get_rank() == 1 and sam_pass.is_perturbed == climbed
            F.cross_entropy(model(x * float("nan") if bad else x), y).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    return bits(weights(model)) == before, optimizer.skipped_steps


@pytest.mark.parametrize("climbed", [False, True], ids=["at w", "at w + e"])
def test_a_nan_on_one_rank_skips_the_step_on_all(climbed):
    assert together()(nan_on_one_rank, climbed) == [(True, 1)] * 2


def scaled(scaler):
    model = fsdp(network().float())
    optimizer = named("friendly_sam", scaler=scaler)(model)
    for step in range(4):
        x, y = (t.float() if t.is_floating_point() else t for t in mine(*samples(step)))
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


def test_a_loss_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    assert together()(scaled, scaler) == together()(scaled, None)


# Engines that are refused.


def under_fsdp1(use_orig_params):
    messages = []
    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    for given in ({"model": model}, {}):
        with pytest.raises(TypeError, match=r"FSDP1.*fully_shard") as error:
            steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), **given)
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(use_orig_params):
    together()(under_fsdp1, use_orig_params)


def test_deepspeed_is_refused():
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(2, 2)
    with pytest.raises(TypeError, match=r"DeepSpeed.*FSDP2"):
        steppe.SAM(torch.optim.SGD(engine.parameters(), lr=0.1), model=engine)
    w = nn.Parameter(torch.zeros(2))
    w.ds_id = 0
    with pytest.raises(TypeError, match=r"DeepSpeed.*FSDP2"):
        steppe.SAM(torch.optim.SGD([w], lr=0.1))


def per_rank_on_shards():
    model = fsdp(network())
    with pytest.raises(ValueError, match="no rank has a whole gradient"):
        steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, per_rank=True)


def test_one_perturbation_a_rank_of_shards_is_refused():
    together()(per_rank_on_shards)
