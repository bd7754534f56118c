"""Tasks of a user, small enough for tests, in a module on the path."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.experiments import Metric, Task, accuracy


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Five numbers, and a number that depends on them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 5, generator=generator)
    noise = torch.randn(n, 1, generator=generator)
    return inputs, inputs[:, :2].sum(1, keepdim=True) ** 2 + 0.3 * noise


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


def regression(**fields: object) -> Task:
    """A regression whose deciding metric is better where it is lower."""
    given: dict[str, object] = {
        "model": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)),
        "train": samples(48, 0),
        "test": samples(24, 1),
        "optimizer": lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
        "loss": F.mse_loss,
        "metrics": {"mse": Metric(mse, higher_is_better=False, unit="cm²")},
        "schedule": "cosine",
        "batch_size": 16,
        "name": "regression",
    }
    return Task(**(given | fields))  # type: ignore[arg-type]


def with_validation() -> Task:
    return regression(validation=samples(20, 2))


def by_loss() -> Task:
    return regression(metrics={})


def classifier(classes: int = 3) -> Task:
    """A classifier with BatchNorm and a loss that is a module, on batches of mappings."""
    inputs, numbers = samples(48, 0)
    labels = torch.bucketize(numbers.squeeze(1), torch.tensor([0.5, 2.0]))[:, None].squeeze(1) % classes
    rows = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    return regression(
        model=lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, classes)),
        train=Rows(rows[:32]),
        test=Rows(rows[32:]),
        predict=lambda model, batch: (model(batch["inputs"]), batch["labels"]),
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": Metric(accuracy, unit="%")},
        name="classifier",
    )


class WithLoss(nn.Module):
    """A classifier that returns its loss with its logits, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def own_loss() -> Task:
    """The classifier whose model returns its loss."""
    return replace(classifier(), model=WithLoss, predict=None, loss=None, metrics={})


def two_classes() -> Task:
    return classifier(2)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A dataset of dictionaries."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self._rows[i]


def too_few() -> Task:
    return regression(train=samples(8, 0))
