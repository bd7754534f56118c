"""Displacement of the weights and their exact restoration."""

import pytest
import torch

from steppe._engine.displacement import Displacement
from support import bits


def test_weight_listed_twice_is_moved_once():
    w = torch.zeros(2)
    displacement = Displacement()
    displacement.displace([w, w], torch.tensor(1.0), [torch.ones(2), torch.ones(2)])
    assert w.tolist() == [1.0, 1.0]
    displacement.restore()
    assert w.tolist() == [0.0, 0.0]


def test_restore_after_several_moves_is_exact():
    w, v = torch.randn(5), torch.randn(3, dtype=torch.bfloat16)
    before = bits([w, v])
    displacement = Displacement()
    assert not displacement.active
    displacement.restore()
    displacement.displace([w], torch.tensor(0.1), [torch.randn(5)])
    displacement.displace([v], torch.tensor(0.1), [torch.randn(3).bfloat16()])
    once = w.clone()
    displacement.displace([w], torch.tensor(0.1), [torch.ones(5)])
    torch.testing.assert_close(w, once + 0.1)
    assert displacement.active
    assert bits([w, v]) != before
    displacement.restore()
    assert bits([w, v]) == before
    assert not displacement.active


def test_displacement_context_restores_weights_after_an_exception():
    w = torch.tensor([0.1, 0.2])
    before = bits([w])
    with pytest.raises(KeyError), Displacement().displaced([w], torch.tensor(3.0), [torch.ones(2)]):
        assert bits([w]) != before
        raise KeyError
    assert bits([w]) == before


def test_displacement_works_after_a_change_of_shape_or_dtype():
    w = torch.nn.Parameter(torch.ones(2))
    displacement = Displacement()
    for data in (torch.ones(2), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        w.data = data
        before = bits([w])
        with displacement.displaced([w], torch.tensor(0.5), [torch.ones_like(data)]):
            assert bits([w]) != before
        assert bits([w]) == before
