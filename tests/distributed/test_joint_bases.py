"""C31: several bases on several processes equal one process, in memory and through distributed checkpoints."""

import tempfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from named_methods import TOTAL_STEPS
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from layouts import LAYOUTS, close, network, plain, run, train, weights
from ranks import start_ranks
from steppe.methods.registry import CARDS, FUNCTIONS
from support import each_in_turn

METHODS = ["sam", "gsam", "vasso", "msam", "sampa", "aesam"]


def method(name):
    """Return model -> optimizer of the named method, around SGD for the matrices and AdamW for everything else."""

    def make(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        bases = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]
        arguments = {"rho": 0.1, **CARDS[name].short_arguments(total_steps=TOTAL_STEPS)}
        return FUNCTIONS[name](bases, **arguments, model=model)

    return make


def train_in_layout(layout, name):
    return train(LAYOUTS[layout], method(name), 4)


LAYOUTS_OF_BASES = ["ddp", "fsdp2", "partly sharded"]


@pytest.mark.parametrize(
    ("name", "layout"),
    each_in_turn(METHODS, LAYOUTS_OF_BASES),
)
def test_c31_several_bases_equal_one_process(name, layout):
    expected = train(plain, method(name), 4)
    for found in start_ranks()(train_in_layout, layout, name):
        close(found, expected)


def build(layout, name, seed=0):
    model = layout(network(seed))
    return model, method(name)(model)


def resume(layout, name, folder):
    """Take three steps, save, load into another optimizer, and take three further ones."""
    model, optimizer = build(LAYOUTS[layout], name)
    run(model, optimizer, range(3))
    parts = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)
    model, optimizer = build(LAYOUTS[layout], name, seed=7)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    run(model, optimizer, range(3, 6))
    return weights(model)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["vasso", "sampa"])
def test_c31_distributed_checkpoint_holds_several_bases(name, layout):
    model, optimizer = build(plain, name)
    run(model, optimizer, range(6))
    with tempfile.TemporaryDirectory() as folder:
        for found in start_ranks()(resume, layout, name, folder):
            close(found, weights(model))
