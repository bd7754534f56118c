"""Built-in tasks on text: fine-tune a sentence encoder by LoRA or whole, on few sentences or on wrong labels.

The encoder and the sentences are those of the recipe text. LoRA has rank 8 and alpha 16 on all linear layers of the
encoder, which stays frozen otherwise; the new head is trained beside it.

References:
    Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from steppe.experiments.tasks.task import Task
from steppe.experiments.tasks.text import (
    LIBRARIES,
    SHOTS,
    SentenceClassifier,
    encoded,
    sentences_of,
    sentences_task,
    trained_by_adamw,
)

RANK = 8
MORE_SHOTS = 32
"""Training sentences of each library, where labels are wrong."""
WRONG = 0.4
"""The part of the labels that is wrong."""
OTHER_LIBRARIES = {
    "scipy": "signal/*.py",
    "matplotlib": "[abc]*.py",
    "sympy": "core/*.py",
    "networkx": "algorithms/*.py",
}
"""Those of the second task, each with the files whose docstrings are read."""
_OTHER_NAMES = ("scipy", "matplotlib", "mpl", "plot", "sympy", "sympif", "networkx", "nx")
_OTHER_SHOTS, _OTHER_TESTS = 8, 50
_SIZES: dict[str, Any] = {"tokens": 20, "test": 75, "validation": 50}  # one sentence in ten is longer, and is cut
_LR_OF_LORA, _LR_OF_ALL = 1e-3, 1e-4
_NAME = "adapters"
_PEFT = {"peft": "pip install 'steppe[peft]'"}


def lora() -> Task:
    """Return the task of LoRA on few sentences."""
    return _lora(SHOTS)


def lora_wrong_labels() -> Task:
    """Return the task of LoRA on more sentences, of which many have a wrong label."""
    return _lora(MORE_SHOTS, WRONG)


def full() -> Task:
    """Return the task of training the whole encoder on few sentences."""
    return _full(SHOTS)


def full_wrong_labels() -> Task:
    """Return the task of training the whole encoder on more sentences, of which many have a wrong label."""
    return _full(MORE_SHOTS, WRONG)


def other_libraries() -> Task:
    """Return the second task, for forgetting: the same for sentences of other libraries."""
    tokens = _SIZES["tokens"]
    sentences = sentences_of(OTHER_LIBRARIES, _OTHER_NAMES, _OTHER_TESTS + _OTHER_SHOTS)
    return replace(
        full(),
        train=encoded([of[_OTHER_TESTS : _OTHER_TESTS + _OTHER_SHOTS] for of in sentences], tokens),
        test=encoded([of[:_OTHER_TESTS] for of in sentences], tokens),
        validation=None,
    )


def _lora(shots: int, wrong: float = 0.0) -> Task:
    trained = trained_by_adamw(_LR_OF_LORA)
    return sentences_task(_NAME, _adapted, trained, shots=shots, wrong=wrong, needs=_PEFT, **_SIZES)


def _full(shots: int, wrong: float = 0.0) -> Task:
    return sentences_task(_NAME, _whole, trained_by_adamw(_LR_OF_ALL), shots=shots, wrong=wrong, **_SIZES)


def _whole() -> SentenceClassifier:
    return SentenceClassifier(len(LIBRARIES))


def _adapted() -> SentenceClassifier:
    """Return a classifier whose encoder has adapters, and is frozen otherwise."""
    from peft import LoraConfig, inject_adapter_in_model

    model = _whole()
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"), model.encoder)
    return model
