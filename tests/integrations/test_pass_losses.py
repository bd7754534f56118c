"""Losses of passes become perturbed_loss and sharpness under the same conditions in all integrations."""

from types import SimpleNamespace

import pytest
import torch

from steppe.integrations._pass_losses import MeanLosses, StepLosses

NO_REPORT = {"record_loss": lambda loss: None}
AT_W = SimpleNamespace(is_at_w=True, is_perturbed=False, **NO_REPORT)
PERTURBED = SimpleNamespace(is_at_w=False, is_perturbed=True, **NO_REPORT)
AT_A_POINT_OF_THE_METHOD = SimpleNamespace(is_at_w=False, is_perturbed=False, **NO_REPORT)


def step(*passes):
    losses = StepLosses()
    for sam_pass, loss in passes:
        losses.add(sam_pass, None if loss is None else torch.tensor(loss))
    return losses


@pytest.mark.parametrize(
    ("passes", "metrics"),
    [
        ([(AT_W, 1.0)], {}),
        ([(PERTURBED, 3.0)], {"perturbed_loss": 3.0}),
        ([(AT_W, 1.0), (PERTURBED, 3.0)], {"perturbed_loss": 3.0, "sharpness": 2.0}),
        ([(AT_W, 1.0), (PERTURBED, 3.0), (PERTURBED, 4.0)], {"perturbed_loss": 4.0, "sharpness": 3.0}),
        ([(AT_A_POINT_OF_THE_METHOD, 1.0), (PERTURBED, 3.0)], {"perturbed_loss": 3.0}),
        ([(AT_W, 1.0), (PERTURBED, None)], {}),
    ],
)
def test_metrics_of_a_step(passes, metrics):
    assert {name: value.item() for name, value in step(*passes).metrics().items()} == metrics


def test_means_are_over_perturbed_steps_with_a_pass_at_w():
    means = MeanLosses()
    assert means.metrics() == {}
    for losses in (step((AT_W, 9.0)), step((AT_W, 1.0), (PERTURBED, 2.0)), step((AT_W, 2.0), (PERTURBED, 6.0))):
        means.add(losses)
    assert {name: value.item() for name, value in means.metrics().items()} == {"perturbed_loss": 4.0, "sharpness": 2.5}


def test_means_are_over_all_processes():
    means = MeanLosses()
    means.add(step((AT_W, 1.0), (PERTURBED, 2.0)))
    metrics = means.metrics(lambda sums: torch.cat([sums, 3 * sums]))
    assert {name: value.item() for name, value in metrics.items()} == {"perturbed_loss": 4.0, "sharpness": 2.0}
