from contextlib import nullcontext

import pytest
import torch
from tiny import CPU, dataset, make_task, recipe, samples
from torch import nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.training import evaluation
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
        evaluation._concatenated(parts)
