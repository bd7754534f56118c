"""The classic API: code written for github.com/davda54/sam runs with one changed import.

.. code-block:: python

    from steppe.compat import SAM, disable_bn_stats, enable_bn_stats

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, adaptive=False, lr=0.1, momentum=0.9)

    enable_bn_stats(model)
    criterion(model(x), y).backward()
    optimizer.first_step(zero_grad=True)

    disable_bn_stats(model)
    criterion(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from steppe import sam
from steppe._engine.state_dict import RHO
from steppe.methods.asam import Adaptive
from steppe.rules.l2 import L2

# Attribute of a disabled module. A list of modules here would not contain the copies (deepcopy, pickle) of a model
# that was copied while its layers were disabled.
_DISABLED = "_steppe_stats_disabled"


class SAM(sam.SAM):
    """The classic constructor of :class:`steppe.SAM`, with an unchanged step.

    Args:
        params: Parameters, or groups of them; a group may have its own ``rho``, and ``group["rho"] = ...`` sets its
            radius for the next step.
        base_class: The base optimizer's class (its old name, ``base_optimizer``, works as a keyword).
        rho: The radius of the neighborhood.
        adaptive: True for ASAM as in the classic implementation, T = |w|, e = rho T^2 g / |T g|.
        **kwargs: Arguments of the base optimizer; and ``model``, as for :class:`steppe.SAM`.

    Example:
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.05, lr=0.1)
        >>> optimizer.base_optimizer.defaults["lr"]
        0.1
    """

    def __init__(
        self,
        params: sam.Params,
        base_class: Callable[..., Optimizer] | None = None,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        base_class = kwargs.pop("base_optimizer", base_class)
        rule = Adaptive(eta=0.0) if adaptive else L2()
        super().__init__(params, base_class, rho, perturbation=rule, **kwargs)

    def _begin(self, caller: str) -> None:
        for group in self.param_groups:
            if (
                "rho" in group
            ):  # classic code writes "rho"; the base has none, because the class form raises for such a base
                group[RHO] = group.pop("rho")
        super()._begin(caller)

    def _run(self, closure: sam.Closure) -> Any:
        """Run the classic ``step(closure)``: the caller has run the first pass, and the closure is the second.

        If there is no gradient yet, the closure runs both passes, as in ``steppe.SAM``.
        """
        if not self._engine.gradients.accumulated_outside():
            return super()._run(closure)
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self.restore()
            raise
        self._finish_classic()
        return None

    @property
    def base_optimizer(self) -> Optimizer:
        """The base optimizer, under its classic name."""
        return self.base


def disable_bn_stats(model: nn.Module) -> None:
    """Make BatchNorm layers in training mode use batch statistics without an update of the running ones.

    No buffer changes, ``num_batches_tracked`` included, whatever ``momentum`` is. A second call has no effect. Layers
    that track no statistics are left unchanged, and layers in eval mode still use their running statistics.

    Args:
        model: The module whose BatchNorm layers are changed.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> disable_bn_stats(model)
        >>> _ = model(torch.randn(4, 2))
        >>> enable_bn_stats(model)
        >>> model[0].num_batches_tracked
        tensor(0)
    """
    for layer in _batch_norms(model):
        if layer.track_running_stats:
            layer.track_running_stats = False
            setattr(layer, _DISABLED, True)


def enable_bn_stats(model: nn.Module) -> None:
    """Undo :func:`disable_bn_stats`, and nothing else."""
    for layer in _batch_norms(model):
        if layer.__dict__.pop(_DISABLED, False):
            layer.track_running_stats = True


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


# The names in github.com/davda54/sam.
disable_running_stats = disable_bn_stats
enable_running_stats = enable_bn_stats
