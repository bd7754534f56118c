import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steppe._engine.generators import Generators
from steppe._engine.side_effects import SideEffects

DRAWS = {
    "uniform": lambda: np.random.rand(),
    "integer": lambda: np.random.randint(10),
    "one gaussian": lambda: np.random.randn(),
    "two gaussians": lambda: np.random.randn(2),
    "many": lambda: np.random.rand(3000),
    "seed": lambda: np.random.seed(5),
    "nothing": lambda: None,
}


def draws():
    return [np.random.randn(), np.random.randn(), np.random.rand(), random.random(), torch.rand(()).item()]


def test_generators_are_those_of_the_devices_to_which_the_model_was_moved(monkeypatch):
    read = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_rng_state=lambda device: read.append(device) or torch.zeros(1),
        set_rng_state=lambda state, device: None,
    )
    of_torch = torch.get_device_module
    monkeypatch.setattr(torch, "get_device_module", lambda d: cuda if d.type == "cuda" else of_torch(d))
    device = torch.device("cpu")

    class Movable(torch.nn.Parameter):
        device = property(lambda self: device)

    side_effects = SideEffects(None, [Movable(torch.ones(2))], replay_rng=True)
    side_effects.begin_first_pass()
    assert read == []
    device = torch.device("cuda:0")
    side_effects.begin_first_pass()
    assert read == [device]


@pytest.mark.parametrize("before", DRAWS)
@pytest.mark.parametrize("between", DRAWS)
def test_states_are_restored_whatever_was_drawn_before_and_after_they_were_saved(before, between):
    generators = Generators([])
    np.random.seed(1)
    for _ in range(2):
        DRAWS[before]()
        states = generators.save()
        expected = draws()
        generators.restore(states)
        generators.save()
        DRAWS[between]()
        generators.restore(states)
        assert draws() == expected
        DRAWS[between]()
        later = generators.save()
        again = draws()
        generators.restore(states)
        assert draws() == expected
        generators.restore(later)
        assert draws() == again


def test_state_of_another_bit_generator_is_restored():
    generators, own = Generators([]), np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.MT19937(3))
        states = generators.save()
        expected = draws()
        np.random.set_bit_generator(np.random.MT19937(4))
        generators.restore(states)
        assert draws() == expected
    finally:
        np.random.set_bit_generator(own)


def test_state_is_copied_only_after_a_draw(monkeypatch):
    generators, copies, get_state = Generators([]), [], np.random.get_state
    monkeypatch.setattr(np.random, "get_state", lambda: copies.append(1) or get_state())
    np.random.seed(0)
    for _ in range(3):
        generators.restore(generators.save())
    assert len(copies) == 1
    np.random.rand()
    generators.save()
    assert len(copies) == 2
