"""Averaged weights over processes equal those of one process."""

import warnings

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

import steppe
from layouts import (
    LAYOUTS,
    WHOLE_BATCH_LAYOUTS,
    close,
    full_tensor,
    method,
    network,
    own_share,
    plain,
    run,
    samples,
    weights,
)
from ranks import start_ranks
from steppe.averaging import EMA
from support import bits


def averaged_weights(layout: str) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    """Train; return the average, the weights and outputs of the average, and True if the model is restored."""
    make = LAYOUTS.get(layout, plain)
    model = make(network())
    optimizer = method("sam")(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*_shard_tensor.*|.*redistribut.*")
        own = make(network(seed=1)) if layout in ("fsdp2", "partly sharded") else None
        averaged = EMA(model, optimizer, 0.5, module=own)
        run(model, optimizer, range(4), whole_batch=layout in WHOLE_BATCH_LAYOUTS)
        before = weights(model)
        x, _ = samples(9) if layout in WHOLE_BATCH_LAYOUTS or layout == "plain" else own_share(*samples(9))
        with torch.no_grad(), averaged.applied():
            inside, applied = full_tensor(model(x)), weights(model)
            outside = full_tensor(averaged.module(x))
        torch.testing.assert_close(inside, outside)
        after = full_tensor(model(x)).detach()
    assert not torch.equal(after, inside)
    return weights(averaged.module), applied, bits(weights(model)) == bits(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_average_in_each_layout_equals_one_process(layout):
    expected, _, _ = averaged_weights("plain")
    for average, applied, restored in start_ranks()(averaged_weights, layout):
        close(average, expected)
        close(applied, expected)
        assert restored


def without_own_module() -> str:
    model = LAYOUTS["fsdp2"](network())
    optimizer = method("sam")(model)
    with pytest.raises(ValueError, match="pass it as module="):
        steppe.averaging.EMA(model, optimizer)
    return "raised"


def test_sharded_model_without_a_second_one_is_refused():
    assert start_ranks()(without_own_module) == ["raised", "raised"]


def average_of_fsdp1(use_orig_params: bool) -> str:
    model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options in ({}, {"module": network()}):
        with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
            EMA(model, optimizer, **options)
    return "raised"


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_average_of_fsdp1_is_refused(use_orig_params):
    assert start_ranks()(average_of_fsdp1, use_orig_params) == ["raised", "raised"]
