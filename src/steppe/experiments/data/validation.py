"""Hold out a validation set, so that tuning does not use the test set."""

import torch

from steppe.experiments.data.datasets import Dataset, Split
from steppe.experiments.errors import ExperimentError


def hold_out(data: Dataset, one_in: int) -> Dataset:
    """Return a data set whose test split is one in `one_in` training images of each class.

    The choice depends on the training set alone, not on a seed or the machine.
    """
    labels = data.train.labels
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=generator)[: len(members) // one_in]]] = True
    if not held.any():
        raise ExperimentError(
            f"no class has {one_in} training images, so none can be held out for validation: take a smaller --hold-out"
        )
    train, validation = (Split(data.train.images[part], data.train.labels[part]) for part in (~held, held))
    return Dataset(f"{data.name}, validation", train, validation, data.source)
