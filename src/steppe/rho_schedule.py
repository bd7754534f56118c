"""Schedules of the radius, which write ``group["sam_rho"]`` as ``torch.optim.lr_scheduler`` writes ``group["lr"]``.

The constructor writes the radius of step 0, and each :meth:`RhoSchedule.step` the next one; call it after the
optimizer's step, and after the learning rate's schedule if there is one. Each group has a radius of its own: a schedule
starts at the radius that the group had before, and a warm-up ends at it.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from steppe._checks import check_count, check_nonnegative
from steppe._engine.groups import RHO

Radius: TypeAlias = float | Tensor

_SCHEDULE = "schedule"
"""The key of a checkpoint that names the schedule."""


class RhoSchedule(ABC):
    """Base class of the schedules: counts steps, writes radii, saves and loads checkpoints.

    Args:
        optimizer: A :class:`~steppe.SAM`, or the base optimizer of one.

    Raises:
        TypeError: Not an optimizer.
        ValueError: Its groups have no radius.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule of rho needs an optimizer, got {type(optimizer).__name__}")
        for index, group in enumerate(optimizer.param_groups):
            if RHO not in group:
                raise ValueError(
                    f"group {index} of {type(optimizer).__name__} has no {RHO!r}, so there is no radius to schedule: "
                    f"wrap the optimizer in steppe.SAM first"
                )
        self.optimizer = optimizer
        self.last_step = 0
        """Number of calls of :meth:`step`."""
        self.initial_rhos: list[Radius] = []
        """The radius of each group before the schedule."""
        self._write()

    def step(self) -> None:
        """Write the next radius into each group.

        Raises:
            RuntimeError: The optimizer has fewer groups than before.
        """
        number = len(self.optimizer.param_groups)
        if number < len(self.initial_rhos):
            raise RuntimeError(
                f"the optimizer has {number} groups, and {type(self).__name__} has the radii of "
                f"{len(self.initial_rhos)}: a group was removed, and it is not known whose radius is left over. Delete "
                "its entry of schedule.initial_rhos, or make a new schedule"
            )
        self.last_step += 1
        self._write()

    def get_last_rho(self) -> list[Radius]:
        """Return the radius of each group that was written last."""
        return list(self._last_rho)

    @abstractmethod
    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius of a step.

        Args:
            step: The number of steps taken before.
            initial: The radius of the group before the schedule.
            group: The group itself.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoint: the name of the schedule, and its attributes as numbers, lists and tensors."""
        own = {key: _copied(value) for key, value in self.__dict__.items() if key != "optimizer"}
        return {_SCHEDULE: type(self).__name__, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, hyperparameters included, and write its radii into the groups.

        The optimizer's own checkpoint may be loaded before or after.

        Raises:
            ValueError: The checkpoint is of another schedule, or of an optimizer with other groups.
        """
        own = self.state_dict()
        state_dict = {_SCHEDULE: own[_SCHEDULE], **state_dict}  # older checkpoints do not name the schedule
        if state_dict[_SCHEDULE] != own[_SCHEDULE]:
            raise ValueError(
                f"this checkpoint is of {state_dict[_SCHEDULE]}, and cannot be loaded into {own[_SCHEDULE]}: build the "
                "schedule as it was, then load"
            )
        if state_dict.keys() != own.keys():
            raise ValueError(
                f"this checkpoint holds {', '.join(sorted(state_dict))}, but {own[_SCHEDULE]} needs "
                f"{', '.join(sorted(own))}: it is of another schedule"
            )
        groups = self.optimizer.param_groups
        if len(state_dict["initial_rhos"]) != len(groups):
            raise ValueError(
                f"this checkpoint has the radii of {len(state_dict['initial_rhos'])} groups, and the optimizer has "
                f"{len(groups)} groups: build the optimizer as it was, then load"
            )
        self.__dict__.update({key: _copied(value) for key, value in state_dict.items() if key != _SCHEDULE})
        _separate(groups)
        for group, rho in zip(groups, self._last_rho, strict=True):
            _set(group, rho)

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        _separate(groups)
        # A group that was added later starts with its own radius.
        self.initial_rhos += [_copied(group[RHO]) for group in groups[len(self.initial_rhos) :]]
        for group, initial in zip(groups, self.initial_rhos, strict=True):
            _set(group, self.rho_at(self.last_step, initial, group))
        self._last_rho = [_copied(group[RHO]) for group in groups]


class _ToEnd(RhoSchedule):
    """Base class of schedules from the group's radius to ``end``, along a curve from 0 to 1."""

    def __init__(self, optimizer: Optimizer, total_steps: int, end: float = 0.0) -> None:
        check_count("total_steps", total_steps, "the length of the schedule")
        check_nonnegative("end", end, "the radius at the end")
        self.total_steps = total_steps
        self.end = end
        super().__init__(optimizer)

    @abstractmethod
    def share_at(self, progress: float) -> float:
        """Return the completed fraction of the change of the radius after a fraction ``progress`` of the steps."""

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius between the first and the last one."""
        x = self.share_at(min(step / self.total_steps, 1.0))
        return (1 - x) * initial + x * self.end


class LinearRho(_ToEnd):
    """Change the radius linearly from the group's own to ``end``: rho_t = rho_0 + (end - rho_0) min(t / T, 1).

    Args:
        optimizer: A :class:`~steppe.SAM`.
        total_steps: T, the number of steps after which the radius stays at ``end``.
        end: The last radius, at least 0.

    Raises:
        ValueError: ``total_steps`` below 1, or an ``end`` that is negative or not finite.

    Example:
        >>> import torch, steppe
        >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
        >>> schedule = LinearRho(optimizer, total_steps=2, end=0.25)
        >>> for _ in range(3):
        ...     schedule.step()
        ...     print(optimizer.param_groups[0]["sam_rho"])
        0.375
        0.25
        0.25
    """

    def share_at(self, progress: float) -> float:
        """Return the progress itself."""
        return progress


class CosineRho(_ToEnd):
    """Change the radius from the group's own to ``end`` along half a cosine, flat at both ends.

    rho_t = end + (rho_0 - end) (1 + cos(pi min(t / T, 1))) / 2

    Args:
        optimizer: A :class:`~steppe.SAM`.
        total_steps: T, the number of steps after which the radius stays at ``end``.
        end: The last radius, at least 0.

    Raises:
        ValueError: ``total_steps`` below 1, or an ``end`` that is negative or not finite.

    Example:
        >>> import torch, steppe
        >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
        >>> schedule = CosineRho(optimizer, total_steps=2)
        >>> for _ in range(3):
        ...     schedule.step()
        ...     print(round(optimizer.param_groups[0]["sam_rho"], 12))
        0.25
        0.0
        0.0
    """

    def share_at(self, progress: float) -> float:
        """Return the fraction by half a cosine."""
        return (1 - math.cos(math.pi * progress)) / 2


class WarmupRho(RhoSchedule):
    """Increase the radius linearly to the group's own: rho_t = start + (rho_0 - start) min(t / T, 1).

    Args:
        optimizer: A :class:`~steppe.SAM`.
        total_steps: T, the number of steps after which the group keeps its own radius.
        start: The first radius, at least 0.

    Raises:
        ValueError: ``total_steps`` below 1, or a ``start`` that is negative or not finite.

    Example:
        >>> import torch, steppe
        >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
        >>> schedule = WarmupRho(optimizer, total_steps=2)
        >>> for _ in range(3):
        ...     print(optimizer.param_groups[0]["sam_rho"])
        ...     schedule.step()
        0.0
        0.25
        0.5
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, start: float = 0.0) -> None:
        check_count("total_steps", total_steps, "the length of the schedule")
        check_nonnegative("start", start, "the radius at the start")
        self.total_steps = total_steps
        self.start = start
        super().__init__(optimizer)

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius by linear interpolation."""
        x = min(step / self.total_steps, 1.0)
        return (1 - x) * self.start + x * initial


class ProportionalRho(RhoSchedule):
    """Keep the radius proportional to the learning rate (GSAM), between rho_min and rho_max.

    rho_t = rho_min + (rho_max - rho_min) (lr_t - lr_min) / (lr_max - lr_min)

    Each group has its own ``lr``. If it leaves [lr_min, lr_max], as in a warm-up, the radius is clamped to
    [rho_min, rho_max]. By the paper's formula, and in the authors' code, the radius is not clamped.

    Args:
        optimizer: A :class:`~steppe.SAM`, whose groups have an ``lr``.
        rho_max: The radius at ``lr_max``.
        rho_min: The radius at ``lr_min``.
        lr_max: The largest learning rate of the schedule.
        lr_min: The smallest learning rate.

    Raises:
        ValueError: A radius that is negative or not finite, ``rho_min`` above ``rho_max``, learning rates that are
            negative, not finite or not in this order, or a group without ``lr``.

    Example:
        >>> import torch, steppe
        >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), rho=0.5)
        >>> schedule = ProportionalRho(optimizer, rho_max=0.5, rho_min=0.25, lr_max=1.0)
        >>> optimizer.param_groups[0]["lr"] = 0.5  # as a schedule of torch.optim.lr_scheduler does
        >>> schedule.step()
        >>> optimizer.param_groups[0]["sam_rho"]
        0.375

    References:
        Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065.
    """

    def __init__(
        self, optimizer: Optimizer, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0
    ) -> None:
        check_nonnegative("rho_max", rho_max, "the radius at the largest learning rate")
        check_nonnegative("rho_min", rho_min, "the radius at the smallest learning rate")
        if rho_min > rho_max:
            raise ValueError(f"rho_min must not exceed rho_max, got {rho_min} and {rho_max}: they are a range")
        if not 0 <= lr_min < lr_max < math.inf:
            raise ValueError(
                f"lr_min and lr_max must be finite with 0 <= lr_min < lr_max, got {lr_min} and {lr_max}: the radius "
                f"is interpolated by the position of the learning rate between these two"
            )
        for index, group in enumerate(optimizer.param_groups if isinstance(optimizer, Optimizer) else ()):
            if "lr" not in group:
                raise ValueError(f"group {index} has no 'lr', so its radius cannot be proportional to one")
        self.rho_max = rho_max
        self.rho_min = rho_min
        self.lr_max = lr_max
        self.lr_min = lr_min
        super().__init__(optimizer)

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius at the group's learning rate."""
        x = (group["lr"] - self.lr_min) / (self.lr_max - self.lr_min)
        x = x.clamp(0, 1) if isinstance(x, Tensor) else min(max(x, 0.0), 1.0)
        return (1 - x) * self.rho_min + x * self.rho_max


def _set(group: dict[str, Any], rho: Radius) -> None:
    """Write a radius. A tensor is written in place and not read, because CUDA graphs hold its address."""
    if isinstance(group[RHO], Tensor):
        group[RHO].copy_(rho) if isinstance(rho, Tensor) else group[RHO].fill_(rho)
    else:
        group[RHO] = rho


def _separate(groups: list[dict[str, Any]]) -> None:
    """Give each group a radius of its own: the constructor's tensor is that of all groups, and is written in place."""
    seen: set[int] = set()
    for group in groups:
        if isinstance(group[RHO], Tensor) and id(group[RHO]) in seen:
            group[RHO] = group[RHO].clone()
        seen.add(id(group[RHO]))


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return value.detach().clone() if isinstance(value, Tensor) else value
