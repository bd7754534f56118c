import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from steppe.experiments.models.preact_resnet import PreActResNet18
from steppe.flatness.quantization import round_weights, rounded


def reference(weights: np.ndarray, bits: int) -> np.ndarray:
    steps = 2 ** (bits - 1) - 1
    step = np.abs(weights).max() / steps
    return step * np.clip(np.rint(weights / step), -steps, steps)


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_rounding_is_that_of_the_definition(bits: int) -> None:
    w = weights(6, 5, 3, 3)
    np.testing.assert_allclose(rounded(w, bits).numpy(), reference(w.numpy(), bits), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_channel_has_its_own_step(bits: int) -> None:
    w = weights(6, 5, 3) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None, None]
    expected = np.stack([reference(channel, bits) for channel in w.numpy()])
    np.testing.assert_allclose(rounded(w, bits, per_channel=True).numpy(), expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_n_bits_hold_two_to_the_n_minus_one_values(bits: int) -> None:
    assert len(rounded(torch.linspace(-1, 1, 501), bits).unique()) == 2**bits - 1


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_second_rounding_changes_nothing(per_channel: bool) -> None:
    once = rounded(weights(8, 9).float(), 4, per_channel=per_channel)
    torch.testing.assert_close(rounded(once, 4, per_channel=per_channel), once, rtol=1e-6, atol=0)


def test_the_error_is_at_most_half_a_step() -> None:
    w = weights(30, 30)
    step = float(w.abs().max()) / 7
    assert float((rounded(w, 4) - w).abs().max()) <= step / 2 * (1 + 1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
def test_zeros_and_the_smallest_numbers_stay_finite(per_channel: bool) -> None:
    w = torch.zeros(3, 2)
    w[1] = 1e-45
    found = rounded(w, 2, per_channel=per_channel)
    assert torch.equal(found, w)
    assert torch.equal(rounded(torch.zeros(2, 2), 4, per_channel=per_channel), torch.zeros(2, 2))


def test_empty_weights_stay_empty() -> None:
    assert rounded(torch.zeros(0, 3), 4).shape == (0, 3)


def test_half_precision_keeps_its_type() -> None:
    assert rounded(torch.ones(2, 2, dtype=torch.bfloat16), 4).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 0, -3, True])
def test_fewer_than_two_bits_raise(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be (2 or more|a whole number)"):
        rounded(torch.ones(2), bits)


def test_matrices_of_a_model_are_rounded_and_vectors_are_not() -> None:
    model = PreActResNet18(width=2)
    before = bits_of(model)
    with round_weights(model, 3):
        for name, p in model.named_parameters():
            expected = rounded(before[name], 3) if p.dim() >= 2 else before[name]
            assert torch.equal(p, expected), name
        assert not torch.equal(model.head.weight, before["head.weight"])
    assert_same(model, before)


def test_weights_are_restored_in_the_same_storage_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before, storage = bits_of(model), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), round_weights(model, 2):
        with torch.no_grad():
            model[0].weight.fill_(9)
        raise KeyboardInterrupt
    assert_same(model, before)
    assert [p.data_ptr() for p in model.parameters()] == storage


def test_an_error_while_weights_are_rounded_restores_those_before() -> None:
    model = nn.Linear(4, 3)
    before = bits_of(model)
    with pytest.raises(ValueError, match="bits must be (2 or more|a whole number)"), round_weights(model, 1):
        pass
    assert_same(model, before)


def test_shared_weights_are_rounded_once_and_restored() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    before = first.weight.detach().clone()
    model = nn.Sequential(first, second)
    with round_weights(model, 2):
        assert torch.equal(second.weight, rounded(before, 2))
    assert torch.equal(second.weight, before)


def test_a_graph_from_before_can_be_differentiated_afterwards() -> None:
    model = nn.Linear(4, 3)
    inputs = torch.ones(2, 4, requires_grad=True)
    loss = model(inputs).sum()
    with round_weights(model, 2):
        pass
    loss.backward()
    assert torch.equal(inputs.grad, model.weight.detach().sum(0).expand(2, 4))


def test_autocast_computes_with_the_weights_of_the_moment() -> None:
    model, inputs = nn.Linear(16, 4, bias=False), torch.eye(16)
    exact = model.weight.detach().clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(inputs)
        with round_weights(model, 2):
            within = model(inputs)
        after = model(inputs)
    torch.testing.assert_close(within.float(), rounded(exact, 2).T, rtol=1e-2, atol=0)
    assert not torch.equal(before, within)
    assert torch.equal(before, after)


def test_a_parametrization_cached_before_is_computed_again_within_and_after() -> None:
    model, inputs = weight_norm(nn.Linear(16, 4, bias=False)), torch.eye(16)
    with torch.no_grad():
        exact = model(inputs)
        with round_weights(model, 2):
            expected = model(inputs)
        assert not torch.equal(exact, expected)
        with parametrize.cached():
            assert torch.equal(model(inputs), exact)
            with round_weights(model, 2):
                assert torch.equal(model(inputs), expected)
            assert torch.equal(model(inputs), exact)
