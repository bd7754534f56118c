"""Loss and accuracy over a whole split, in evaluation mode."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.world import World

# Images in one forward pass; the number changes memory, speed and the last bits of a result.
_CHUNK, _CHUNK_ON_A_GPU = 500, 5000


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and accuracy in percent."""

    loss: float
    accuracy: float


def evaluate(
    network: nn.Module,
    split: Split,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]],
    pause: Callable[[], None],
) -> Score:
    """Measure `network` on a split, shared out over the processes; `pause()` is called between its chunks.

    The network is left in training mode.
    """
    share = world.share(len(split))
    images, labels = split.images[share], split.labels[share]
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    chunk = _CHUNK_ON_A_GPU if labels.is_cuda else _CHUNK
    network.eval()
    try:
        with torch.no_grad():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                pause()
                with autocast():
                    logits = network(normalize(x))
                sums[0] += F.cross_entropy(logits.float(), y, reduction="sum")
                sums[1] += (logits.argmax(1) == y).sum()
    finally:
        network.train()
    loss, correct = (world.total(sums) / len(split)).tolist()
    return Score(loss, 100.0 * correct)
