"""A table with several labels: is a tumor malignant, is it large, is it rough? 569 tumors (scikit-learn).

steppe compare tumors:task --methods base sam --epochs 20 --seeds 5
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import nn

from steppe.experiments import Metric, Task


def exact_match(outputs, targets):
    """Return the percentage of tumors whose labels are all right."""
    return 100 * ((outputs > 0) == (targets > 0.5)).all(1).float().mean()


def right_labels(outputs, targets):
    """Return the percentage of right labels."""
    return 100 * ((outputs > 0) == (targets > 0.5)).float().mean()


def task() -> Task:
    """Return the task: means and errors of ten measurements are the inputs; the worst values give two labels."""
    data = load_breast_cancer()
    table = torch.tensor(data.data, dtype=torch.float32)
    table = (table - table.mean(0)) / table.std(0)
    worst_area, worst_smoothness = table[:, 23], table[:, 24]
    labels = torch.stack(
        [torch.tensor(data.target) == 0, worst_area > worst_area.median(), worst_smoothness > worst_smoothness.median()]
    )
    inputs, targets = table[:, :20], labels.T.float()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, validation, test = order[:300], order[300:400], order[400:]
    return Task(
        name="tumors",
        model=lambda: nn.Sequential(
            nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3)
        ),
        train=(inputs[train], targets[train]),
        validation=(inputs[validation], targets[validation]),
        test=(inputs[test], targets[test]),
        loss=F.binary_cross_entropy_with_logits,
        metrics={"all right": Metric(exact_match, unit="%"), "labels right": Metric(right_labels, unit="%")},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
        schedule="one-cycle",
    )
