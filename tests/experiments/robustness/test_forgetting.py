import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steppe.experiments.data.batches import order
from steppe.experiments.robustness.forgetting import Forgetting, forgetting


def data(seed: int, sign: float = 1.0, n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Points whose class is that of the nearest of four directions, or of the opposite one."""
    inputs = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return inputs, torch.stack([inputs[:, 0], -inputs[:, 0], inputs[:, 1], -inputs[:, 1]], 1).mul(sign).argmax(1)


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)  # type: ignore[arg-type]


def trained() -> nn.Module:
    model = nn.Linear(2, 4)
    optimizer, (inputs, labels) = torch.optim.SGD(model.parameters(), lr=0.5), data(0)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def measured(model: nn.Module, steps: int = 60, **options: object) -> Forgetting:
    arguments = {"old": data(1), "new": data(2, -1.0), "new_test": data(3, -1.0), "optimizer": sgd, "steps": steps}
    return forgetting(model, **(arguments | options))  # type: ignore[arg-type]


def test_a_contradicting_task_makes_a_model_forget() -> None:
    found = measured(trained())
    assert found.old_before > 90
    assert found.old_after < 20
    assert found.new_before < 20
    assert found.new_after > 90
    assert found.forgotten == found.old_before - found.old_after


def test_the_same_task_again_makes_a_model_forget_little() -> None:
    assert abs(measured(trained(), new=data(2), new_test=data(3)).forgotten) < 5


def test_no_steps_change_nothing() -> None:
    found = measured(trained(), steps=0)
    assert found.forgotten == 0
    assert found.new_before == found.new_after


def test_the_second_task_is_trained_by_plain_steps_in_the_order_of_the_seed() -> None:
    model = trained()
    by_hand = copy.deepcopy(model)
    optimizer, (inputs, labels) = sgd(by_hand.parameters()), data(2, -1.0)
    for epoch in range(2):
        for positions in order(96, 7, epoch).split(32):
            optimizer.zero_grad()
            F.cross_entropy(by_hand(inputs[positions]), labels[positions]).backward()
            optimizer.step()
    old, targets = data(1)
    expected = float(F.cross_entropy(by_hand(old), targets).detach())
    found = measured(model, steps=6, batch_size=32, seed=7, metric=loss)
    assert found.old_after == pytest.approx(expected, rel=1e-6)
    assert measured(model, steps=6, batch_size=32, seed=8, metric=loss).old_after != found.old_after


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float(F.cross_entropy(outputs, targets))


def with_dropout() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))


def test_model_modes_gradients_and_generators_are_unchanged() -> None:
    model = with_dropout()
    model[1].eval()
    model[0].weight.grad = torch.ones(8, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measured(model, steps=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones(8, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_dropout_draws_from_the_seed() -> None:
    model = with_dropout()
    first = measured(model, steps=3, metric=loss)
    torch.rand(3)
    assert measured(model, steps=3, metric=loss) == first


def test_a_model_in_evaluation_mode_is_trained_in_training_mode() -> None:
    assert measured(with_dropout().eval(), steps=3, metric=loss) == measured(with_dropout(), steps=3, metric=loss)


def test_inputs_are_prepared_before_the_model_gets_them() -> None:
    model, (inputs, labels) = trained(), data(1)
    found = measured(model, steps=0, old=(inputs * 4, labels), prepare=lambda x: x / 4)
    assert found.old_before == measured(model, steps=0).old_before


@pytest.mark.parametrize("options", [{"steps": -1}, {"batch_size": 0}])
def test_impossible_numbers_raise(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 0 and 1"):
        measured(trained(), **options)  # type: ignore[arg-type]
