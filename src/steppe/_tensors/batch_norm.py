"""Running statistics of BatchNorm layers as a mean over batches, and torch's error for a batch of one sample."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def mean_statistics(layers: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Make the running statistics of BatchNorm layers the mean of those of all forwards in the ``with`` block.

    Forwards, in training mode, are weighted by their values per channel, hence by their samples. ``momentum=None`` of
    torch weights them equally, a last batch of two samples like one of 256. The block yields the number of values per
    channel that each layer has seen.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(1)
        >>> with mean_statistics([layer]):
        ...     for values in ([0.0, 0.0, 0.0], [0.0, 2.0]):
        ...         _ = layer(torch.tensor(values)[:, None])
        >>> round(layer.running_mean.item(), 4), layer.momentum  # (3 * 0 + 2 * 1) / 5
        (0.4, 0.1)
    """
    seen, momenta = dict.fromkeys(layers, 0), {layer: layer.momentum for layer in layers}

    def weigh(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training:
            values = next(iter((*args, *kwargs.values())))
            count = values.numel() // values.shape[1]
            seen[layer] += count
            layer.momentum = count / max(seen[layer], 1)

    hooks = [layer.register_forward_pre_hook(weigh, with_kwargs=True) for layer in seen]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum


@contextmanager
def naming_batch(index: int) -> Iterator[None]:
    """Name the batch in torch's error for one that has a single value per channel, and so no variance."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch {index}, counted from 0, has a single value per channel (one sample), so BatchNorm has no variance "
            "to normalize it with: leave it out (drop_last=True), or choose batches or parts of another size"
        ) from error
