from contextlib import nullcontext

import pytest
from tiny import CPU, dataset
from torch import nn

from steppe.experiments.training import evaluation
from steppe.experiments.training.evaluation import evaluate


def test_scores_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network, scores = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)), []
    for chunk in (7, 50):
        monkeypatch.setattr(evaluation, "_CHUNK", chunk)
        asked: list[int] = []
        scores.append(evaluate(network, dataset().test, CPU, nullcontext, lambda asked=asked: asked.append(1)))
        assert len(asked) == -(-50 // chunk)
    assert scores[0].accuracy == scores[1].accuracy
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6)
