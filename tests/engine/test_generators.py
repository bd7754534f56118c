import random

import numpy as np
import pytest
import torch

from steppe._engine.generators import Generators

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
