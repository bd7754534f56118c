"""A regression: the progress of diabetes after a year, from ten measurements of 442 patients (scikit-learn).

steppe compare diabetes:task --methods base sam --epochs 40 --seeds 5
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import nn

from steppe.experiments import Metric, Task


def r2(outputs, targets):
    """Return the share of the variance that the model explains."""
    return 1 - float(((outputs - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum())


def mean_absolute_error(outputs, targets):
    """Return the mean error in points of the score."""
    return 100 * (outputs - targets).abs().mean()


def task() -> Task:
    """Return the task."""
    data = load_diabetes()
    inputs = torch.tensor(data.data, dtype=torch.float32) * 20  # to a standard deviation of 1
    targets = torch.tensor(data.target, dtype=torch.float32).unsqueeze(1) / 100
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, test = order[:300], order[300:]
    return Task(
        name="diabetes",
        model=lambda: nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1)),
        train=(inputs[train], targets[train]),
        test=(inputs[test], targets[test]),
        loss=F.mse_loss,
        metrics={"R2": r2, "error": Metric(mean_absolute_error, higher_is_better=False, unit="points")},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01),
        schedule="cosine",
        batch_size=32,
    )
