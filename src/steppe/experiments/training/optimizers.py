"""The optimizer of a run: the base, the method around it, the schedule of the learning rate, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from steppe.experiments.config.methods import BASES, RunContext
from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.task import Task

_WARMUP_START = 0.01  # of the learning rate


def build_optimizer(
    run: Run, task: Task, model: nn.Module, context: RunContext
) -> tuple[Optimizer, LRScheduler | None, Clipping | None]:
    """Build the method's optimizer around the base, its schedule and the clipping of its gradients, if any.

    Raises:
        ExperimentError: The method would silently ignore an option of fine-tuning.
    """
    recipe = run.recipe
    base, clipping = build_base(run, task, model)
    try:
        optimizer = run.method.optimizer(base, context)
    except ValueError as error:
        if not recipe.model.freeze:
            raise
        raise ExperimentError(
            f"{run.name} perturbs weights that --freeze keeps fixed ({error}): leave --freeze or this method out"
        ) from error
    head_lr = recipe.training.head_lr
    if head_lr is not None and all(group["lr"] != head_lr for group in optimizer.param_groups):
        raise ExperimentError(
            f"{run.name} has one learning rate of its own, and head_lr={head_lr} would be ignored: leave --head-lr or "
            "this method out"
        )
    return optimizer, _schedule(run, task, optimizer, context.total_steps), clipping


def build_base(run: Run, task: Task, model: nn.Module) -> tuple[Optimizer, Clipping | None]:
    """Build the base optimizer, and the clipping of its gradients, if any."""
    base, norm = _base(run, task, model), run.recipe.training.clip
    return base, None if norm is None else Clipping(base, norm)


class Clipping:
    """Scales the gradients down to a norm, before each step of the base optimizer; it counts these steps."""

    def __init__(self, base: Optimizer, norm: float) -> None:
        self._norm, self.steps = norm, 0
        base.register_step_pre_hook(self._clip)

    def _clip(
        self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.steps += 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        closure = named.get("closure") or (arguments[1] if len(arguments) > 1 else None)
        if closure is None:
            torch.nn.utils.clip_grad_norm_(parameters, self._norm)
            return None

        def then_clip() -> Any:  # a base without SAM around it: the gradient is not there yet
            loss = closure()
            torch.nn.utils.clip_grad_norm_(parameters, self._norm)
            return loss

        return arguments[:1], {"closure": then_clip}


def _base(run: Run, task: Task, model: nn.Module) -> Optimizer:
    options, recipe = run.recipe.training, run.recipe
    if not recipe.data.task:
        return task.optimizer(model)
    if options.base == "own":
        base = task.optimizer(model)
        if not isinstance(base, Optimizer):
            raise ExperimentError(f"the task's optimizer= returned {type(base).__name__}, and no torch optimizer")
        for name in ("lr", "weight_decay"):
            if (value := getattr(options, name)) is not None:
                for group in base.param_groups:
                    group[name] = value
        return base
    lr, weight_decay, on_gpu = options.lr, options.weight_decay or 0.0, next(model.parameters()).is_cuda
    if lr is None:
        raise ExperimentError(
            f"base={options.base} in the place of the task's own optimizer needs a learning rate: --lr"
        )
    return BASES[options.base].build(
        model.parameters(), lr, recipe.base_momentum, weight_decay, nesterov=options.nesterov, on_gpu=on_gpu
    )


def _schedule(run: Run, task: Task, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """Make the schedule over the planned steps; None for a constant learning rate."""
    options = run.recipe.training
    warmup = round(options.warmup * steps)
    if options.schedule == "own":
        if not callable(task.schedule):
            raise ExperimentError("schedule=own, and the task has no schedule=: give it one, or name another")
        made = task.schedule(optimizer, steps)
        if not isinstance(made, LRScheduler):
            raise ExperimentError(f"the task's schedule= returned {type(made).__name__}, and no scheduler of torch")
        return made
    if options.schedule == "one-cycle":
        # without a cycle of the momentum, which not every base has
        largest = [group["lr"] for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, largest, total_steps=steps, cycle_momentum=False)
    main = _SCHEDULES[options.schedule]
    if not warmup:
        return None if main is None else main(optimizer, steps)
    rise = lr_scheduler.LinearLR(optimizer, _WARMUP_START, 1.0, total_iters=warmup)
    if main is None:
        return rise
    return lr_scheduler.SequentialLR(optimizer, [rise, main(optimizer, steps - warmup)], milestones=[warmup])


_SCHEDULES: Mapping[str, Callable[[Optimizer, int], LRScheduler] | None] = MappingProxyType(
    {
        "constant": None,
        "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        "linear": lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps),
    }
)
