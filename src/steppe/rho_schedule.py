"""Schedules of the radius: they write ``group["sam_rho"]`` as ``torch.optim.lr_scheduler`` writes ``group["lr"]``.

Each writes the radius of step 0 when it is made, and the next one at every :meth:`RhoSchedule.step`; call that after
the optimizer's step, and after the learning rate's schedule if there is one. Groups keep their own radii: a schedule
starts (or, warming up, ends) at what the group had.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.state_dict import RHO

Radius: TypeAlias = float | Tensor


class RhoSchedule(ABC):
    """What all schedules share: counting, writing, and checkpoints.

    Args:
        optimizer: a :class:`~steppe.SAM`, or the base optimizer that one has wrapped.

    Raises:
        TypeError: not an optimizer.
        ValueError: its groups have no radius.
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
        """How many times :meth:`step` was called."""
        self.initial_rhos: list[Radius] = []
        """The radius that each group had before."""
        self._write()

    def step(self) -> None:
        """Write the next radius into each group."""
        self.last_step += 1
        self._write()

    def get_last_rho(self) -> list[Radius]:
        """The radius of each group, as it was last written."""
        return list(self._last_rho)

    @abstractmethod
    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius of a step.

        Args:
            step: how many steps came before.
            initial: the radius that the group had before the schedule.
            group: the group itself.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return all but the optimizer: numbers, lists and tensors."""
        return {key: _copied(value) for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, hyperparameters included, and write its radii into the groups.

        The optimizer's own checkpoint may be loaded before or after.

        Raises:
            ValueError: it is another schedule's, or of an optimizer with other groups.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"this checkpoint holds {', '.join(sorted(state_dict))}, but {type(self).__name__} needs "
                f"{', '.join(sorted(self.state_dict()))}: it is of another schedule"
            )
        groups = self.optimizer.param_groups
        if len(state_dict["initial_rhos"]) != len(groups):
            raise ValueError(
                f"this checkpoint has the radii of {len(state_dict['initial_rhos'])} groups, and the optimizer has "
                f"{len(groups)} groups: build the optimizer as it was, then load"
            )
        self.__dict__.update({key: _copied(value) for key, value in state_dict.items()})
        for group, rho in zip(groups, self._last_rho, strict=True):
            _set(group, rho)

    def _write(self) -> None:
        groups = self.optimizer.param_groups
        # A group that was added since begins with its own radius.
        self.initial_rhos += [_copied(group[RHO]) for group in groups[len(self.initial_rhos) :]]
        for group, initial in zip(groups, self.initial_rhos, strict=True):
            _set(group, self.rho_at(self.last_step, initial, group))
        self._last_rho = [_copied(group[RHO]) for group in groups]


class _ToEnd(RhoSchedule):
    """From the group's radius to ``end`` in so many steps, along a curve that goes from 0 to 1."""

    def __init__(self, optimizer: Optimizer, steps: int, end: float = 0.0) -> None:
        _check_steps(steps)
        _check_radius("end", end)
        self.steps = steps
        self.end = end
        super().__init__(optimizer)

    @abstractmethod
    def share_at(self, progress: float) -> float:
        """Return how much of the way is behind, 0 to 1, after that much of the steps."""

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius on the way."""
        x = self.share_at(min(step / self.steps, 1.0))
        return (1 - x) * initial + x * self.end


class LinearRho(_ToEnd):
    """Go from the group's radius to another in a straight line: rho_t = rho_0 + (end - rho_0) min(t / steps, 1).

    Args:
        optimizer: a :class:`~steppe.SAM`.
        steps: after how many steps the radius is ``end``; there it stays.
        end: the last radius, at least 0.

    Raises:
        ValueError: fewer than one step, or an ``end`` that is no radius.

    >>> import torch, steppe
    >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
    >>> schedule = LinearRho(optimizer, steps=2, end=0.25)
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
    """Go from the group's radius to another along half a cosine, flat at both ends.

    rho_t = end + (rho_0 - end) (1 + cos(pi min(t / steps, 1))) / 2

    Args:
        optimizer: a :class:`~steppe.SAM`.
        steps: after how many steps the radius is ``end``; there it stays.
        end: the last radius, at least 0.

    Raises:
        ValueError: fewer than one step, or an ``end`` that is no radius.

    >>> import torch, steppe
    >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
    >>> schedule = CosineRho(optimizer, steps=2)
    >>> for _ in range(3):
    ...     schedule.step()
    ...     print(round(optimizer.param_groups[0]["sam_rho"], 12))
    0.25
    0.0
    0.0
    """

    def share_at(self, progress: float) -> float:
        """Return the height of the cosine."""
        return (1 - math.cos(math.pi * progress)) / 2


class WarmupRho(RhoSchedule):
    """Grow to the group's radius in a straight line: rho_t = start + (rho_0 - start) min(t / steps, 1).

    Args:
        optimizer: a :class:`~steppe.SAM`.
        steps: after how many steps the group has its own radius; there it stays.
        start: the first radius, at least 0.

    Raises:
        ValueError: fewer than one step, or a ``start`` that is no radius.

    >>> import torch, steppe
    >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), rho=0.5)
    >>> schedule = WarmupRho(optimizer, steps=2)
    >>> for _ in range(3):
    ...     print(optimizer.param_groups[0]["sam_rho"])
    ...     schedule.step()
    0.0
    0.25
    0.5
    """

    def __init__(self, optimizer: Optimizer, steps: int, start: float = 0.0) -> None:
        _check_steps(steps)
        _check_radius("start", start)
        self.steps = steps
        self.start = start
        super().__init__(optimizer)

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the point of the line."""
        x = min(step / self.steps, 1.0)
        return (1 - x) * self.start + x * initial


class ProportionalRho(RhoSchedule):
    """Let the radius follow the learning rate (GSAM), between rho_min and rho_max.

    rho_t = rho_min + (rho_max - rho_min) (lr_t - lr_min) / (lr_max - lr_min)

    Each group follows its own ``lr``. Where that leaves [lr_min, lr_max], in a warm-up for example, the radius stays
    at the end of its range; the paper's formula would leave it, and the authors' code does.

    Args:
        optimizer: a :class:`~steppe.SAM`, whose groups have an ``lr``.
        rho_max: the radius at ``lr_max``.
        rho_min: the radius at ``lr_min``.
        lr_max: the largest learning rate of the schedule.
        lr_min: the smallest.

    Raises:
        ValueError: a radius that is none, ``rho_min`` above ``rho_max``, learning rates that are negative, not finite
            or not in this order, or a group without ``lr``.

    >>> import torch, steppe
    >>> optimizer = steppe.SAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), rho=0.5)
    >>> schedule = ProportionalRho(optimizer, rho_max=0.5, rho_min=0.25, lr_max=1.0)
    >>> optimizer.param_groups[0]["lr"] = 0.5  # as a schedule of torch.optim.lr_scheduler does
    >>> schedule.step()
    >>> optimizer.param_groups[0]["sam_rho"]
    0.375

    Source: Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, arXiv 2203.08065.
    """

    def __init__(
        self, optimizer: Optimizer, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0
    ) -> None:
        _check_radius("rho_max", rho_max)
        _check_radius("rho_min", rho_min)
        if rho_min > rho_max:
            raise ValueError(f"rho_min must not exceed rho_max, got {rho_min} and {rho_max}: they are a range")
        if not 0 <= lr_min < lr_max < math.inf:
            raise ValueError(
                f"lr_min and lr_max must be finite with 0 <= lr_min < lr_max, got {lr_min} and {lr_max}: the radius "
                f"is proportional to where the learning rate stands between them"
            )
        for index, group in enumerate(optimizer.param_groups if isinstance(optimizer, Optimizer) else ()):
            if "lr" not in group:
                raise ValueError(f"group {index} has no 'lr', so its radius has nothing to follow")
        self.rho_max = rho_max
        self.rho_min = rho_min
        self.lr_max = lr_max
        self.lr_min = lr_min
        super().__init__(optimizer)

    def rho_at(self, step: int, initial: Radius, group: dict[str, Any]) -> Radius:
        """Return the radius that belongs to the group's learning rate."""
        x = (group["lr"] - self.lr_min) / (self.lr_max - self.lr_min)
        x = x.clamp(0, 1) if isinstance(x, Tensor) else min(max(x, 0.0), 1.0)
        return (1 - x) * self.rho_min + x * self.rho_max


def _set(group: dict[str, Any], rho: Radius) -> None:
    """Write a radius; one that is a tensor stays the same tensor, for captured graphs, and is not read."""
    if isinstance(group[RHO], Tensor):
        group[RHO].copy_(rho) if isinstance(rho, Tensor) else group[RHO].fill_(rho)
    else:
        group[RHO] = rho


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number, 1 or more, got {steps}: it is the length of the schedule")


def _check_radius(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}: it is a radius")
