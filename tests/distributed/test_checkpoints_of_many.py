"""C2, C23, C24 on many devices: what is saved by so many ranks goes on, to the bit or the last digit, on others."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import steppe
from layouts import LAYOUTS, SEE_ALL, ddp, named, network, plain, run, train, weights
from ranks import together
from support import bits

# A rule with a memory of tensors, one with numbers, one with a mask, one with a base's momentum only.
REMEMBER = ["friendly_sam", "aesam", "sparse_sam", "looksam", "sam", "sampa"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def started(layout, name, seed=0):
    model = layout(network(seed))
    return model, named(name)(model)


def save(layout, name, folder, options=None):
    model, optimizer = started(LAYOUTS[layout], name)
    run(model, optimizer, range(3), whole_batch=layout in SEE_ALL)
    parts = get_state_dict(model, optimizer, options=options and StateDictOptions(**options))
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)


def load_and_go_on(layout, name, folder, options=None):
    """In another network, whose own weights and optimizer state are different ones."""
    model, optimizer = started(LAYOUTS[layout] if layout else plain, name, seed=7)
    options = options and StateDictOptions(**options)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"], options=options
    )
    run(model, optimizer, range(3, 6), whole_batch=layout in SEE_ALL)
    return weights(model), remembered(optimizer)


def remembered(optimizer):
    """What the rules know and when: by rule, how many parameters they know it of."""
    return optimizer._engine.steps, {rule: len(own) for rule, own in optimizer._engine.memory.items()}


FOUR = pytest.param("fsdp2", 4, marks=pytest.mark.xdist_group("four ranks"))


@pytest.mark.slow
@pytest.mark.parametrize(("there", "ranks"), [("fsdp2", 2), FOUR, ("ddp", 2), ("tensor parallel", 2)])
@pytest.mark.parametrize("name", REMEMBER)
def test_a_distributed_checkpoint_goes_on_with_other_ranks(name, there, ranks):
    model, optimizer = started(plain, name)
    run(model, optimizer, range(6))
    with tempfile.TemporaryDirectory() as folder:
        together()(save, "fsdp2", name, folder)
        for found, kept in together(ranks)(load_and_go_on, there, name, folder):
            close(found, weights(model))
            assert kept == remembered(optimizer)


def resume_in_place(layout, name):
    """state_dict() and load_state_dict() of the optimizer itself, on the same ranks: to the bit."""
    whole_batch = layout in SEE_ALL
    model, optimizer = started(LAYOUTS[layout], name)
    run(model, optimizer, range(3), whole_batch=whole_batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(3, 6), whole_batch=whole_batch)
    other, its_optimizer = started(LAYOUTS[layout], name, seed=7)
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    run(other, its_optimizer, range(3, 6), whole_batch=whole_batch)
    return bits(weights(model)) == bits(weights(other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", REMEMBER)
def test_a_checkpoint_of_each_rank_goes_on_to_the_bit(name, layout):
    assert together()(resume_in_place, layout, name) == [True, True]


# ZeroRedundancyOptimizer.


def zero_redundancy(params):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # the import warns of torch.jit

    return ZeroRedundancyOptimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9)


def zero(name, save_at=None):
    """The base's state is spread over the ranks."""
    model = ddp(network())

    def make(model):
        base = zero_redundancy(model.parameters())
        return steppe.SAM(base, rho=0.1, model=model, **rules(name))

    optimizer = make(model)
    run(model, optimizer, range(3))
    if save_at is not None:
        optimizer.base.consolidate_state_dict(to=0)
        saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved, src=0)
        optimizer = make(model)
        optimizer.load_state_dict(saved[0])
    run(model, optimizer, range(3, 6))
    return weights(model)


def rules(name):
    like = named(name)(network())
    return {slot: getattr(like, slot) for slot in ("perturbation", "combination", "cadence")}


@pytest.mark.parametrize("resume", [None, 3])
@pytest.mark.parametrize("name", ["sam", "gsam", "friendly_sam", "looksam"])
def test_zero_redundancy_optimizer_as_the_base(name, resume):
    expected = train(plain, named(name), 6)
    for found in together()(zero, name, resume):
        close(found, expected)


def unconsolidated():
    model = ddp(network())
    base = zero_redundancy(model.parameters())
    optimizer = steppe.SAM(base, rho=0.1, model=model)
    run(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()


def test_its_state_must_be_consolidated_first_as_ever():
    together()(unconsolidated)
