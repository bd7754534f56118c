import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from own_tasks import classifier
from tiny import CPU, dataset, make_task, recipe, samples
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.outputs import concatenated, in_order
from steppe.experiments.training.evaluation import evaluate


def test_scores_do_not_depend_on_the_batch_size() -> None:
    network, scores = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), []
    task, test = make_task()(recipe()), samples(dataset().test)
    for size in (7, 50):
        asked: list[int] = []
        scores.append(evaluate(task, network, test, size, CPU, nullcontext, lambda asked=asked: asked.append(1)))
        assert len(asked) == max(2, -(-50 // size))
    assert scores[0]["accuracy"] == scores[1]["accuracy"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-6)


def test_halves_of_a_split_have_the_metric_of_their_samples() -> None:
    network, test = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), samples(dataset().test)
    found = evaluate(make_task()(recipe()), network, test, 25, CPU, nullcontext, lambda: None)
    halves = [found["accuracy (half 1)"], found["accuracy (half 2)"]]
    assert sum(halves) / 2 == pytest.approx(found["accuracy"])
    images, labels = test.gather(test.tensors[1].new_tensor(range(0, 50, 2)))
    assert halves[0] == pytest.approx(100 * float((network(images).argmax(1) == labels).float().mean()))


def test_outputs_of_different_lengths_are_no_error_of_the_metric() -> None:
    parts = [(torch.zeros(2, 3, 5), torch.zeros(2, 3)), (torch.zeros(1, 4, 5), torch.zeros(1, 4))]
    with pytest.raises(ExperimentError, match=r"differ in shape: \(n, 3, 5\), \(n, 4, 5\). Pad all batches"):
        concatenated(parts)


def test_metrics_get_the_samples_in_their_order() -> None:
    inputs = torch.arange(11.0)[:, None]
    seen: list[Tensor] = []
    task = classifier(
        test=(inputs, inputs), loss=F.mse_loss, metrics={"order": lambda o, t: len(seen.append(t) or seen)}
    )
    evaluate(task, nn.Linear(1, 1), task.samples("test"), 4, CPU, nullcontext, lambda: None)
    whole, *halves = seen
    assert torch.equal(whole, inputs)
    assert [len(half) for half in halves] == [7, 4]


def test_rows_that_are_not_samples_stay_in_the_order_of_the_batches() -> None:
    batches = [(torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])), (torch.zeros(2), torch.tensor([1.0, 3.0]))]
    _, targets = in_order(batches, [torch.tensor([0, 2]), torch.tensor([1, 3])])
    assert targets.tolist() == [0.0, 0.0, 2.0, 1.0, 3.0]


def test_metric_without_a_value_on_a_half_is_nan_there() -> None:
    def of_positives(outputs: Tensor, targets: Tensor) -> float:
        if not targets.any():
            raise ValueError("no positive sample")
        return 0.5

    inputs = torch.arange(8.0)[:, None]
    task = classifier(test=(inputs, inputs == 3.0), loss=lambda o, t: o.mean(), metrics={"auc": of_positives})
    found = evaluate(task, nn.Linear(1, 1), task.samples("test"), 4, CPU, nullcontext, lambda: None)
    assert found["auc"] == found["auc (half 2)"] == 0.5
    assert math.isnan(found["auc (half 1)"])
