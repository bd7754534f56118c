"""The module inside of what torch wraps around a model."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from steppe._tensors.dtensor import fsdp_modules


def whole_module(model: nn.Module) -> nn.Module:
    """Return the module inside of ``DistributedDataParallel`` and of ``torch.compile``.

    Raises:
        TypeError: A model of FSDP1.
    """
    if fsdp_modules(model, version=1):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) replaces the parameters by flat shards for every forward, so they cannot "
            "be averaged: shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel | DataParallel) else None
        inner = getattr(model, "_orig_mod", None) if inner is None else inner  # a private name, torch.compile's
        if not isinstance(inner, nn.Module):
            return model
        model = inner
