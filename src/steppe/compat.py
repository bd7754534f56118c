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
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from steppe import sam
from steppe._engine.groups import RHO, parameters_of
from steppe.methods.asam import ASAM_PAPER, Adaptive
from steppe.papers import Paper
from steppe.rules import Perturbation, Point, ScaledDirection
from steppe.rules.l2 import L2
from steppe.rules.ops import norm, reciprocal

# Attribute of a disabled module. A list of modules here would not contain the copies (deepcopy, pickle) of a model
# that was copied while its layers were disabled.
_DISABLED = "_steppe_stats_disabled"
_CLASSIC_RHO, _ADAPTIVE, _OLD = "rho", "adaptive", "old_p"
"""Keys of the classic implementation, in groups and in the state of a parameter."""


class _Group(dict[str, Any]):
    """A parameter group in which ``"rho"`` is another name of the radius, :data:`RHO`.

    One value with two names cannot differ: classic code reads and writes ``group["rho"]``, schedules write the other.
    """

    def __missing__(self, key: str) -> Any:
        if key == _CLASSIC_RHO:
            return self[RHO]
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_own_name(key), value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_own_name(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(_own_name(key), default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        return super().setdefault(_own_name(key), default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update({_own_name(key): value for key, value in dict(*args, **kwargs).items()})

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(_own_name(key), *default)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(_own_name(key))


def _own_name(key: Any) -> Any:
    """Return the key under which a group holds a value: the classic name of the radius stands for its own."""
    return RHO if key == _CLASSIC_RHO else key


def _group(group: dict[str, Any]) -> _Group:
    """Return a group with its radius under one name, written as either.

    A group with both has the classic one from the base's defaults only.
    """
    named = _Group()
    for key, value in group.items():
        if key != _CLASSIC_RHO or RHO not in group:
            named[key] = value
    return named


class SAM(sam.SAM):
    """The classic constructor of :class:`steppe.SAM`, with an unchanged step.

    ``group["rho"]`` and ``group["adaptive"]`` are read at every step, as classic code expects, and between
    ``first_step`` and ``second_step`` ``optimizer.state[p]["old_p"]`` is w. Checkpoints of the classic implementation
    load; they hold no state of the base.

    Args:
        params: Parameters, or groups of them; a group may have its own ``rho`` and ``adaptive``.
        base_class: The base optimizer's class (its old name, ``base_optimizer``, works as a keyword).
        rho: The radius of the neighborhood.
        adaptive: True for ASAM as in the classic implementation, T = |w|, e = rho T^2 g / |T g|.
        **kwargs: Arguments of the base optimizer; and ``model``, as for :class:`steppe.SAM`.

    Example:
        >>> optimizer = SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, rho=0.05, lr=0.1)
        >>> optimizer.base_optimizer.defaults["lr"]
        0.1
        >>> optimizer.param_groups[0]["rho"]
        0.05
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
        groups, own = _without_adaptive(params)
        super().__init__(groups, base_class, rho, **kwargs)
        self.base.defaults.update({_CLASSIC_RHO: rho, _ADAPTIVE: adaptive})
        for group, value in zip(self.param_groups, own or [None] * len(self.param_groups), strict=True):
            group[_ADAPTIVE] = adaptive if value is None else value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with its radius as ``rho`` (and ``sam_rho``), and ``adaptive``."""
        groups = super().param_groups
        for index, group in enumerate(groups):
            if not isinstance(group, _Group):  # new, or replaced by load_state_dict
                groups[index] = _group(group)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with its own ``rho`` and ``adaptive``, or those of the constructor."""
        group = dict(_group(param_group))
        super().add_param_group({_ADAPTIVE: self.defaults[_ADAPTIVE], **group})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, of its base, or of the classic implementation.

        The classic implementation saves w (``old_p``) in the place of the base's state: it is dropped.
        """
        adaptive = [group.get(_ADAPTIVE, self.defaults[_ADAPTIVE]) for group in self.param_groups]
        state = {key: _without(_OLD, own) for key, own in state_dict["state"].items()}
        groups = [dict(_group(group)) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})
        for group, value in zip(self.param_groups, adaptive, strict=True):
            group.setdefault(_ADAPTIVE, value)

    @property
    def perturbation(self) -> Perturbation:
        """The perturbation that ``group["adaptive"]`` chooses, group by group."""
        flags = {bool(group.get(_ADAPTIVE, False)) for group in self.param_groups}
        if len(flags) < 2:
            return Adaptive(eta=0.0) if True in flags else L2()
        return _AdaptiveByGroup(
            frozenset(p for group in self.param_groups if group.get(_ADAPTIVE, False) for p in group["params"])
        )

    @perturbation.setter
    def perturbation(self, rule: Perturbation) -> None:
        if rule in (L2(), self.perturbation):  # steppe.SAM's default, and that of a copy
            return
        raise AttributeError(
            'the perturbation of steppe.compat.SAM is chosen by group["adaptive"]: set that, or use steppe.SAM, which '
            "takes perturbation="
        )

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights, as :meth:`steppe.SAM.first_step` does; ``state[p]["old_p"]`` is w until they are back.

        Args:
            zero_grad: Clear the gradients for the second backward.
        """
        super().first_step(zero_grad)
        for weight, before in self._engine.displaced():
            self.state[weight][_OLD] = before

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """Return |g|, of T g where a group is adaptive: training code logs it under its name in the classic file."""
        point = self._engine.point()
        adaptive = {p for group in self.param_groups if group.get(_ADAPTIVE, False) for p in group["params"]}
        each = zip(point.parameters, point.weights, point.gradients, strict=True)
        return norm([w.abs() * g if p in adaptive else g for p, w, g in each])

    def restore(self) -> None:
        """Abort a pending step and restore the weights; the next pass is a first one."""
        self._drop_old()
        super().restore()

    def _finish_classic(self) -> None:
        self._drop_old()
        super()._finish_classic()

    def _drop_old(self) -> None:
        """Remove ``old_p`` from the base's state: some bases take a state that is not empty for their own."""
        for weight in parameters_of(self.base):
            own = self.base.state.get(weight)
            if own and own.pop(_OLD, None) is not None and not own:
                del self.base.state[weight]

    def _run(self, closure: sam.Closure) -> Any:
        """Run the classic ``step(closure)``: the caller has run the first pass, and the closure is the second.

        If there is no gradient yet, or only zeros, the closure runs both passes, as in ``steppe.SAM``.
        """
        if not any(bool(gradient.any()) for gradient in self._engine.gradients.accumulated_earlier().values()):
            return super()._run(closure)
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self.restore()
            raise
        self._engine.pass_gradients.end_pass(made=self._engine.gradients.any())
        self._finish_classic()
        return None


@dataclass(frozen=True)
class _AdaptiveByGroup:
    """ASAM's perturbation on some of the parameters, and SAM's on the others, with one norm over all."""

    paper: ClassVar[Paper] = ASAM_PAPER
    scale_free: ClassVar[bool] = True

    adaptive: frozenset[Tensor] = field(repr=False)
    """The parameters with T = |w|; T = 1 for the others."""

    def __call__(self, point: Point) -> ScaledDirection:
        T = [w.abs() if p in self.adaptive else None for p, w in zip(point.parameters, point.weights, strict=True)]
        Tg = [g if t is None else t * g for t, g in zip(T, point.gradients, strict=True)]
        return ScaledDirection([g if t is None else t * g for t, g in zip(T, Tg, strict=True)], reciprocal(norm(Tg)))


def _without_adaptive(params: Any) -> tuple[Any, list[bool | None]]:
    """Return the groups without ``adaptive``, which the base need not know, and these options; one for each group."""
    if isinstance(params, Tensor | nn.Module | None):
        return params, []
    params = list(params)
    if not any(isinstance(group, dict) for group in params):
        return params, []
    return [_without(_ADAPTIVE, group) for group in params], [group.get(_ADAPTIVE) for group in params]


def _without(name: str, entries: Any) -> Any:
    """Return a dictionary without one entry; anything else as it is."""
    return {key: value for key, value in entries.items() if key != name} if isinstance(entries, dict) else entries


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
