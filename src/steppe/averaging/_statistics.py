"""Compute the statistics of BatchNorm layers for averaged weights."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from steppe._tensors.batch_norm import mean_statistics, naming_batch


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that ``update_bn`` computes the statistics of, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}


def refresh_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    frozen: Collection[str],
) -> None:
    """Compute the statistics of the BatchNorm layers by ``update_bn``; on an exception, keep the old ones.

    They are the mean over the batches, which are weighted by their samples.
    ``steppe.flatness.Objective.statistics`` estimates them without a change of the module.

    Args:
        module: The module.
        batches: The batches.
        forward: Called as ``forward(module, batch)``; None for ``module(batch)``.
        frozen: Names of layers that keep their statistics and run in evaluation mode.

    Raises:
        ValueError: There is no batch, or a batch of one sample.
    """
    layers = batch_norms(module)
    refreshed = [m for name, m in layers.items() if name not in frozen]
    if not refreshed:
        return
    modes = {m: m.training for m in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    own = {id(buffer) for m in refreshed for buffer in m.buffers()}
    kept = [(buffer, old) for buffer, old in buffers if id(buffer) not in own]
    wrapper = _Refreshed(module, forward or _run, refreshed, [layers[name] for name in frozen])
    devices = {t.device for t in itertools.chain(module.parameters(), module.buffers()) if t.device.type != "cpu"}
    kinds = {device.type for device in devices}
    try:
        with torch.random.fork_rng(devices, device_type=kinds.pop() if kinds else "cuda"), mean_statistics(refreshed):
            # A tuple of one: update_bn passes the first element on, whatever it is.
            update_bn(((batch,) for batch in batches), wrapper)
        if not wrapper.batches:
            raise ValueError("refresh_statistics() got no batch: BatchNorm layers would have no statistics")
    except BaseException:
        kept = buffers
        raise
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        for m, training in modes.items():
            m.training = training


def _run(module: nn.Module, batch: Any) -> Any:
    """Run a module on a batch, or on the first element of a tuple."""
    if isinstance(batch, tuple | list):
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"a batch of refresh_statistics() is a {type(batch).__name__}: say how to run it, "
            "refresh_statistics(batches, lambda module, batch: module(**batch))"
        )
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    return module(batch.to(device))


class _Refreshed(nn.Module):
    """What ``update_bn`` sees: the layers to refresh, and a forward; frozen layers stay in evaluation mode."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[nn.Module, Any], Any],
        refreshed: Collection[nn.Module],
        frozen: Collection[nn.Module],
    ) -> None:
        super().__init__()
        self._run, self._refreshed, self._frozen = forward, refreshed, frozen
        self.module, self.batches = module, 0

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        yield from self._refreshed

    def train(self, mode: bool = True) -> "_Refreshed":
        super().train(mode)
        for layer in self._frozen:
            layer.eval()
        return self

    def forward(self, batch: Any) -> Any:
        self.batches += 1
        with naming_batch(self.batches - 1):
            return self._run(self.module, batch)
