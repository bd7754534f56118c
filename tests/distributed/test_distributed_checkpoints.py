"""C2, C23, C24: checkpoints of several processes, and ZeroRedundancyOptimizer as the base.

A run resumed on the same ranks has the same bits; on other ranks it is equal to 1e-12.
"""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import steppe
from layouts import (
    LAYOUTS,
    WHOLE_BATCH_LAYOUTS,
    close,
    ddp,
    method,
    network,
    plain,
    run,
    train,
    weights,
)
from ranks import start_ranks
from support import bits, each_in_turn

# Methods whose memory has tensors, numbers, a mask, or nothing, and one that implements the whole step itself.
METHODS = ["friendly_sam", "aesam", "sparse_sam", "looksam", "sam", "sampa"]


def build(layout, name, seed=0):
    model = layout(network(seed))
    return model, method(name)(model)


def save(layout, name, folder, options=None):
    model, optimizer = build(LAYOUTS[layout], name)
    run(model, optimizer, range(3), whole_batch=layout in WHOLE_BATCH_LAYOUTS)
    parts = get_state_dict(model, optimizer, options=options and StateDictOptions(**options))
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)


def load_and_train(layout, name, folder, options=None):
    """Load a checkpoint into a network with other weights and another optimizer state, and take three further steps."""
    model, optimizer = build(LAYOUTS[layout] if layout else plain, name, seed=7)
    options = options and StateDictOptions(**options)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"], options=options
    )
    run(model, optimizer, range(3, 6), whole_batch=layout in WHOLE_BATCH_LAYOUTS)
    return weights(model), sizes_of_memory(optimizer)


def sizes_of_memory(optimizer):
    """Return the number of steps taken, and for each rule the number of parameters that it keeps a memory for."""
    return optimizer._engine.steps, {rule: len(own) for rule, own in optimizer._engine.memory.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [("fsdp2", 2), ("fsdp2", 4), ("ddp", 2), ("tensor parallel", 2)])
@pytest.mark.parametrize("name", METHODS)
def test_distributed_checkpoint_loads_in_another_layout(name, layout, ranks):
    model, optimizer = build(plain, name)
    run(model, optimizer, range(6))
    with tempfile.TemporaryDirectory() as folder:
        start_ranks()(save, "fsdp2", name, folder)
        for found, kept in start_ranks(ranks)(load_and_train, layout, name, folder):
            close(found, weights(model))
            assert kept == sizes_of_memory(optimizer)


FLATTENED = {"flatten_optimizer_state_dict": True}


@pytest.mark.parametrize("name", METHODS)
def test_flattened_checkpoint_holds_step_and_memory(name, tmp_path):
    model, optimizer = build(plain, name)
    run(model, optimizer, range(6))
    start_ranks()(save, "fsdp2", name, tmp_path, FLATTENED)
    for found, kept in start_ranks()(load_and_train, "fsdp2", name, tmp_path, FLATTENED):
        close(found, weights(model))
        assert kept == sizes_of_memory(optimizer)


def resume_in_place(layout, name):
    """Return True if a run has the same bits after state_dict() and load_state_dict() on the same ranks."""
    whole_batch = layout in WHOLE_BATCH_LAYOUTS
    model, optimizer = build(LAYOUTS[layout], name)
    run(model, optimizer, range(3), whole_batch=whole_batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(3, 6), whole_batch=whole_batch)
    other, other_optimizer = build(LAYOUTS[layout], name, seed=7)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    run(other, other_optimizer, range(3, 6), whole_batch=whole_batch)
    return bits(weights(model)) == bits(weights(other))


@pytest.mark.parametrize(("name", "layout"), each_in_turn(METHODS, LAYOUTS))
def test_run_resumed_on_the_same_ranks_has_the_same_bits(name, layout):
    assert start_ranks()(resume_in_place, layout, name) == [True, True]


# ZeroRedundancyOptimizer as the base.


def zero_redundancy(params, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns of torch.jit

    return ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9, **options)


def train_with_zero(name, resume):
    """Train with ZeroRedundancyOptimizer as the base; if ``resume``, save and load its state after three steps."""
    model = ddp(network())

    def make(model):
        base = zero_redundancy(model.parameters())
        return steppe.SAM(base, rho=0.1, model=model, **rules(name))

    optimizer = make(model)
    run(model, optimizer, range(3))
    if resume:
        optimizer.base.consolidate_state_dict(to=0)
        saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved, src=0)
        optimizer = make(model)
        optimizer.load_state_dict(saved[0])
    run(model, optimizer, range(3, 6))
    return weights(model)


def rules(name):
    optimizer = method(name)(network())
    return {slot: getattr(optimizer, slot) for slot in ("perturbation", "combination", "cadence")}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["sam", "gsam", "friendly_sam", "looksam"])
def test_zero_redundancy_optimizer_as_base_equals_one_process(name, resume):
    expected = train(plain, method(name), 6)
    for found in start_ranks()(train_with_zero, name, resume):
        close(found, expected)


def save_unconsolidated_state():
    model = ddp(network())
    base = zero_redundancy(model.parameters())
    optimizer = steppe.SAM(base, rho=0.1, model=model)
    run(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()


def test_state_of_zero_redundancy_optimizer_that_is_not_consolidated_is_an_error():
    start_ranks()(save_unconsolidated_state)


def train_on_uneven_data_with_zero(method_name):
    model = ddp(network())
    base = zero_redundancy(model.parameters())
    make = steppe.SAM if method_name == "sam" else steppe.variants.rwp
    optimizer = make(base, rho=0.1, model=model)
    before = weights(model)
    with Join([model, base]):
        if method_name == "sam":
            with pytest.raises(RuntimeError, match="a step of SAM has two"):
                run(model, optimizer, range(1))
        else:  # one backward a step
            run(model, optimizer, range(2 + dist.get_rank()))
    return bits(weights(model)) == bits(before), bits(weights(model))


def test_zero_redundancy_optimizer_on_uneven_data_is_refused_for_two_passes():
    assert all(unchanged for unchanged, _ in start_ranks()(train_on_uneven_data_with_zero, "sam"))
    (unchanged, first), (_, second) = start_ranks()(train_on_uneven_data_with_zero, "rwp")
    assert not unchanged
    assert first == second


def wrap_overlapping_zero():
    model = ddp(network())
    base = zero_redundancy(model.parameters(), overlap_with_ddp=True)
    with pytest.raises(TypeError, match="it steps inside of every backward"):
        steppe.SAM(base, rho=0.1, model=model)


def test_zero_redundancy_optimizer_that_steps_in_the_backward_is_an_error():
    start_ranks()(wrap_overlapping_zero)
