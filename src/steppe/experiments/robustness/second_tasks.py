"""Second tasks on the images of the first, for measurements of forgetting: a part of the classes, other domains."""

from collections.abc import Collection

import torch
from torch import Tensor


def of_classes(images: Tensor, labels: Tensor, classes: Collection[int]) -> tuple[Tensor, Tensor]:
    """Return the images of some classes with their labels, which stay as they are.

    Example:
        >>> of_classes(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 1]), {1, 2})[1]
        tensor([1, 2, 1])
    """
    chosen = torch.isin(labels, torch.tensor(sorted(classes), dtype=labels.dtype, device=labels.device))
    return images[chosen], labels[chosen]


def rotated(images: Tensor, quarter_turns: int = 1) -> Tensor:
    """Turn square images (n, channels, size, size) counterclockwise by quarter turns.

    Example:
        >>> rotated(torch.tensor([[[[1, 2], [3, 4]]]]))
        tensor([[[[2, 4],
                  [1, 3]]]])
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images of shape {tuple(images.shape)}: (n, channels, size, size) is needed, to turn them")
    return images.rot90(quarter_turns, (2, 3)).contiguous()


def inverted(images: Tensor) -> Tensor:
    """Exchange black and white: 1 - x for floating-point images in [0, 1], 255 - x for bytes.

    Example:
        >>> inverted(torch.tensor([0, 55, 255], dtype=torch.uint8))
        tensor([255, 200,   0], dtype=torch.uint8)
    """
    return 1.0 - images if images.is_floating_point() else 255 - images
