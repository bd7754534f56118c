"""Text: a small transformer, trained from scratch, tells from the first line of a docstring which library it is of.

steppe compare text:task --methods base sam --epochs 10 --seeds 3
"""

import ast
import random
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from steppe.experiments import Metric, Task, accuracy

LIBRARIES = {"numpy": "[lm]*/*.py", "torch": "nn/*/*.py", "asyncio": "../[b-d]*.py"}  # installed packages, their files
LENGTH, WORDS, PADDING, UNKNOWN = 24, 1000, 0, 1


def sentences(library):
    """Return the first lines of a library's docstrings."""
    folder = Path(find_spec(library).origin).parent
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(folder.glob(LIBRARIES[library]))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    lines = {(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes}
    return sorted(line for line in lines if len(line.split()) > 5)


class Transformer(nn.Module):
    """Two layers of attention over the words, their mean, and a linear head."""

    def __init__(self, width=48):
        super().__init__()
        self.words = nn.Embedding(WORDS, width, padding_idx=PADDING)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=96, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LIBRARIES))

    def forward(self, words, is_word):
        """Return the logits of sentences; a batch of the task is (words, is_word, targets), the inputs first."""
        x = self.encoder(self.words(words) + self.places, src_key_padding_mask=~is_word)
        shown = is_word.unsqueeze(-1)
        return self.head((x * shown).sum(1) / shown.sum(1))


def task() -> Task:
    """Return the task."""
    pairs = [(line.lower().split()[:LENGTH], i) for i, name in enumerate(LIBRARIES) for line in sentences(name)[:300]]
    random.Random(0).shuffle(pairs)
    train, test = pairs[:600], pairs[600:]
    counts = {}
    for words, _ in train:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    usual = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 2]
    number = {word: i for i, word in enumerate(usual, start=2)}

    def tensors(pairs):
        words = torch.full((len(pairs), LENGTH), PADDING)
        for row, (sentence, _) in zip(words, pairs, strict=True):
            row[: len(sentence)] = torch.tensor([number.get(word, UNKNOWN) for word in sentence])
        return words, words != PADDING, torch.tensor([label for _, label in pairs])

    return Task(
        name="text",
        model=Transformer,
        train=tensors(train),
        test=tensors(test),
        loss=F.cross_entropy,
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05),
        schedule="linear",
        classes=len(LIBRARIES),
    )
