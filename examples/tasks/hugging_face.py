"""A Hugging Face model with its own loss: a tiny BERT learns which of two words of a made-up sentence comes first.

steppe compare hugging_face:task --methods base sam --epochs 10 --seeds 3
"""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

from steppe.experiments import Metric, Task, accuracy

LENGTH, WORDS, FIRST, SECOND = 16, 64, 62, 63


class Sentences(Dataset):
    """Random words, of which two are special; the items are dictionaries, as those of `datasets` are."""

    def __init__(self, number, seed):
        g = torch.Generator().manual_seed(seed)
        self.words = torch.randint(1, FIRST, (number, LENGTH), generator=g)
        self.lengths = torch.randint(LENGTH // 2, LENGTH + 1, (number,), generator=g).tolist()
        places = [torch.randperm(n, generator=g)[:2] for n in self.lengths]
        for row, (a, b) in zip(self.words, places, strict=True):
            row[a], row[b] = FIRST, SECOND
        self.labels = torch.tensor([int(a < b) for a, b in places])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        mask = (torch.arange(LENGTH) < self.lengths[i]).long()
        return {"input_ids": self.words[i] * mask, "attention_mask": mask, "labels": self.labels[i]}


def model() -> BertForSequenceClassification:
    """Return a BERT with random weights; `from_pretrained` takes its place where there is a checkpoint."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **sizes))


def task() -> Task:
    """Return the task; without a loss=, the model's own is used, which it computes from the labels of a batch."""
    return Task(
        name="hugging-face",
        model=model,
        train=Sentences(600, seed=0),
        test=Sentences(300, seed=1),
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01),
        schedule="linear",
        batch_size=32,
        classes=2,
    )
