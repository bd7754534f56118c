"""FSDP2 through Accelerate equals one process, although it replaces the parameters of an existing optimizer."""

import itertools

import pytest
import torch
from named_methods import WRAPPERS

import steppe
from layouts import close, method, network
from ranks import start_ranks
from steppe.rules.subsets import layers
from support import each_in_turn, rest_is_slow

pytest.importorskip("accelerate")

import fsdp2_of_accelerate as fsdp2


def masked(model):
    """Perturb two layers only, and half of the coordinates of one of them."""
    masks = {p: torch.arange(p.numel()).reshape(p.shape) % 2 == 0 for p in layers(model, "3")}
    rule = steppe.ParameterSubset(steppe.Masked(steppe.L2(), masks), layers(model, "0", "3"))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return steppe.SAM(base, rho=0.3, model=model, perturbation=rule)


def two_groups_without_model(model):
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    base = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others}], lr=0.02)
    return steppe.SAM(base, rho=0.3)


def two_bases(model):
    weights, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    bases = [torch.optim.SGD(weights, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.02)]
    return steppe.SAM(bases, rho=0.3, model=model)


def call(function, name: str, *args):
    return getattr(fsdp2, function)(OPTIMIZERS.get(name) or method(name), *args)


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Start the processes, which takes seconds, before the first test."""
    start_ranks()(fsdp2.reset_accelerate_state)


@pytest.fixture(scope="module")
def four_processes():
    ranks = start_ranks(4)
    ranks(fsdp2.reset_accelerate_state)
    return ranks


OPTIMIZERS = {"masked": masked, "two groups": two_groups_without_model, "two bases": two_bases}


# Methods whose memory has tensors, numbers, a mask, or nothing, and one that implements the whole step itself.
FAST = {"friendly_sam", "aesam", "sparse_sam", "looksam", "sam", "sampa", *OPTIMIZERS}


@pytest.mark.parametrize("name", rest_is_slow([*WRAPPERS, *OPTIMIZERS], lambda name: name in FAST))
def test_passes_with_accumulation_and_clipping_equal_one_process(name):
    expected = fsdp2.by_hand(OPTIMIZERS.get(name) or method(name))
    for found in start_ranks()(call, "train_by_passes", name):
        close(found, expected)


@pytest.mark.parametrize(
    "name", rest_is_slow(["sam", "gsam", "sparse_sam", "masked"], lambda name: name in ("sam", "masked"))
)
def test_two_sharded_replicas_equal_one_process(name, four_processes):
    expected = fsdp2.by_hand(OPTIMIZERS.get(name) or method(name))
    for found in four_processes(call, "train_by_passes", name, 2):
        close(found, expected)


LOOPS = ["train_by_closure", "train_in_the_classic_api"]
IN_LOOPS = ["sam", "gsam", "masked"]


@pytest.mark.parametrize(("name", "loop"), each_in_turn(IN_LOOPS, LOOPS))
def test_loops_without_the_integration_equal_one_process(loop, name):
    expected = fsdp2.by_hand(OPTIMIZERS.get(name) or method(name), clip=None, window=1)
    for found in start_ranks()(call, loop, name):
        close(found, expected)


KINDS = ["SHARDED_STATE_DICT", "FULL_STATE_DICT"]
RESUMED = ["sam", "vasso", "looksam", "two groups"]


@pytest.mark.parametrize(
    ("name", "state_dict_type"),
    rest_is_slow(itertools.product(RESUMED, KINDS), lambda *case: case in zip(RESUMED, KINDS, strict=False)),
)
def test_save_state_resumes(name, state_dict_type, tmp_path):
    for straight, resumed in start_ranks()(call, "resumed", name, state_dict_type, tmp_path):
        assert all(map(torch.equal, straight, resumed))
        assert not any(map(torch.equal, straight, network().parameters()))
