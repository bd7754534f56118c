"""The arguments of :class:`steppe.SAM`: its two forms, and their errors."""

import inspect
import math
from collections.abc import Callable, Container, Iterable, Mapping
from numbers import Real
from typing import Any, TypeAlias, TypedDict
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from steppe._engine.groups import RHO, parameters_of
from steppe._engine.hints import check_positional, refuse_foreign_options, refuse_unknown
from steppe._engine.joint_base import as_one, optimizers_of, option_names
from steppe._engine.state_dict import holds_sam_state
from steppe._tensors.dtensor import fsdp_modules
from steppe.rules import Cadence, Combination, Perturbation, ascent_steps

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

Model: TypeAlias = nn.Module | list[nn.Module] | tuple[nn.Module, ...] | Mapping[str, nn.Module]

_wrapped: WeakSet[Optimizer] = WeakSet()


class Options(TypedDict, total=False):
    """Keyword arguments of :class:`steppe.SAM`, which documents them."""

    model: Model | None
    perturbation: Perturbation
    combination: Combination
    cadence: Cadence
    replay_rng: bool
    per_rank: bool
    scaler: torch.amp.GradScaler | None
    stochastic_rounding: bool


def base_and_rho(*args: Any, **kwargs: Any) -> tuple[Optimizer, float | Tensor]:
    """Return the base optimizer and rho from the arguments of either form of the constructor.

    Raises:
        TypeError: The arguments fit neither ``(base_optimizer, rho)`` nor ``(params, base_class, rho, **kwargs)``.
    """
    first = args[0] if args else kwargs.get("base_optimizer")
    if (joint := as_one(first)) is not first:
        args, kwargs = (joint, *args[1:]), {name: kwargs[name] for name in kwargs if name != "base_optimizer"}
        first = joint
    if isinstance(first, Optimizer):
        check_positional(("base_optimizer", "rho"), args, kwargs)
        return _from_instance(*args, **kwargs)
    if isinstance(first, type) and issubclass(first, Optimizer):
        raise TypeError(
            f"the base is the class {first.__name__}, not an instance of it: write SAM({first.__name__}(params, ...), "
            f"rho=...) or SAM(params, {first.__name__}, rho=..., ...)"
        )
    check_positional(("params", "base_class", "rho"), args, kwargs)
    return _from_class(*args, **kwargs)


def as_radius(rho: Any) -> float | Tensor:
    """Return rho as a number of Python's or a tensor: a checkpoint with a scalar of NumPy could not be loaded safely.

    Raises:
        ValueError: rho is negative or not finite. A tensor is read on the CPU only, because that would synchronize.
        TypeError: rho is not a real number.
    """
    if isinstance(rho, Tensor):
        if rho.dim() != 0:
            raise ValueError(f"rho must be a number or a 0-dim tensor, got shape {tuple(rho.shape)}: it is one radius")
        if rho.is_complex() or rho.dtype == torch.bool:
            raise TypeError(f"rho must be a real number, got a tensor of {rho.dtype}: it is a radius")
        if rho.device.type != "cpu":
            return rho
    elif not isinstance(rho, int | float | Real) or isinstance(rho, bool):
        hint = ". Options are given by name, as in model=model" if callable(rho) else ""
        raise TypeError(f"rho must be a number or a 0-dim tensor, got {type(rho).__name__}: it is a radius{hint}")
    if not 0 <= float(rho) < math.inf:
        raise ValueError(f"rho must be finite and at least 0, got {rho}: it is the radius of the neighborhood")
    radius: float | Tensor = rho if isinstance(rho, Tensor) or type(rho) in (int, float) else float(rho)
    return radius


def check_groups(base: Optimizer) -> None:
    """Refuse a base with a group whose radius is missing, wrong, or written under a name that has no effect.

    Raises:
        ValueError: Names the group and the remedy.
    """
    groups = ((group, optimizer.defaults) for optimizer in optimizers_of(base) for group in optimizer.param_groups)
    for index, (group, defaults) in enumerate(groups):
        check_group(index, group, defaults)


def check_group(index: int, group: dict[str, Any], names: Container[str]) -> None:
    """Refuse a group whose radius is missing, wrong, or written under a name that has no effect.

    Args:
        index: The number of the group.
        group: The group.
        names: The names that the base reads; Adadelta has a ``rho`` of its own.

    Raises:
        ValueError: Names the group and the remedy.
    """
    if RHO not in group:
        raise ValueError(
            f"group {index} has no {RHO!r}: it was added to the base optimizer, or loaded into it, without SAM, so "
            f"its radius is unknown. Use SAM's add_param_group() and load_state_dict(), or set "
            f"param_groups[{index}][{RHO!r}]"
        )
    if "rho" in tuple(group) and "rho" not in names:  # as a key; groups of steppe.compat have it as another name
        raise ValueError(
            f"group {index} has a 'rho', which has no effect: the radius of a group is {RHO!r} (Adadelta has a "
            f"'rho' of its own). Write it under that name"
        )
    check_not_adaptive(index, group, names)
    if (radius := as_radius(group[RHO])) is not group[RHO]:
        group[RHO] = radius


def check_not_adaptive(index: int, group: Mapping[str, Any], names: Container[str]) -> None:
    """Refuse a group of the classic implementation that asks for ASAM; arguments as for :func:`check_group`.

    Raises:
        ValueError: Names the group and the remedy.
    """
    if group.get("adaptive") is True and "adaptive" not in names:
        raise ValueError(
            f"group {index} has 'adaptive': True, of a checkpoint of ASAM in the classic implementation, and it has no "
            "effect here: load the checkpoint into steppe.compat.SAM, or give perturbation=steppe.Adaptive() and "
            "delete 'adaptive' from the groups"
        )


def one_module(model: Model | None) -> nn.Module | None:
    """Return ``model=`` as one module.

    Raises:
        TypeError: It is neither a module nor a list, tuple or dict of modules.
    """
    if model is None or isinstance(model, nn.Module):
        return model
    modules = list(model.values()) if isinstance(model, Mapping) else model
    if not isinstance(modules, list | tuple):
        raise TypeError(
            f"model= is a {type(model).__name__}, and only a module can be protected from the second pass: give the "
            "module that the passes run, or several in a list, tuple or dict"
        )
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"model= holds a {type(module).__name__} at position {index}, and only modules can be protected from "
                "the second pass: give the modules that the passes run, without their optimizers or parameters"
            )
    return nn.ModuleList(modules)


def check_model(model: nn.Module | None, base: Optimizer) -> None:
    """Refuse a model that the optimizer does not train.

    Raises:
        ValueError: The model holds none of the base's parameters, or the base has weights that FSDP2 has gathered.
    """
    if model is not None and (sharded := fsdp_modules(model)):
        registered = set(model.parameters())
        for module in sharded:  # after a forward without a backward, the gathered weights are the parameters
            module.reshard()
        gathered = (registered - set(model.parameters())).intersection(parameters_of(base))
        if gathered:
            raise ValueError(
                f"{len(gathered)} of the optimizer's parameters are weights that FSDP2 has gathered for a forward, and "
                "would not be trained: a forward without a backward, such as an evaluation, leaves them in the place "
                "of the sharded ones. Make the base optimizer before it, or after a reshard() of each FSDP2 module"
            )
    if not holds_any(model, base):
        raise ValueError(
            "model= holds none of the optimizer's parameters, so its running statistics would be protected and "
            "those of the trained model would not: pass the module whose parameters the base optimizer got; for "
            "torch.func.functional_call, one that holds the parameters and buffers that it is given"
        )


def holds_any(model: nn.Module | None, base: Optimizer) -> bool:
    """True if the model holds any of the base's parameters, or if there is no model."""
    return model is None or not set(model.parameters()).isdisjoint(parameters_of(base))


def drop_earlier_radii(base: Optimizer) -> None:
    """Drop the radii of an earlier wrapper of this base, or of a checkpoint; the new rho takes precedence."""
    for optimizer in optimizers_of(base):
        if optimizer in _wrapped or holds_sam_state(optimizer):
            for group in optimizer.param_groups:
                group.pop(RHO, None)
        _wrapped.add(optimizer)


def check_classic(perturbation: Perturbation, *, single_pass: bool, per_rank: bool) -> None:
    """Refuse ``first_step()`` where the step's passes are not those of the classic API.

    Raises:
        RuntimeError: Names the option and the remedy.
    """
    if single_pass:
        raise RuntimeError(
            f"first_step() with {perturbation}: it perturbs without the gradient at w, so that its only pass comes "
            "after first_step(), and the backward before it would be lost. Use passes() or step(closure)"
        )
    if per_rank:
        raise RuntimeError(
            "first_step() with per_rank=True: the backward before it has averaged the ranks' gradients already. "
            "Use passes() or step(closure), which keep them apart"
        )
    if (steps := ascent_steps(perturbation)) > 1:
        raise RuntimeError(
            f"first_step() with {perturbation}: it makes {steps} ascent steps, and the classic API makes "
            "one. Use passes() or step(closure)"
        )


def _from_instance(
    base_optimizer: Optimizer, rho: float | Tensor = 0.05, **kwargs: Any
) -> tuple[Optimizer, float | Tensor]:
    if kwargs:
        refuse_unknown(kwargs, "SAM(base_optimizer, rho)", list(Options.__annotations__))
    rho = as_radius(rho)
    for optimizer in optimizers_of(base_optimizer):
        _check_base(optimizer)
    return base_optimizer, rho


def _check_base(base: Optimizer) -> None:
    """Refuse an optimizer that cannot be the base.

    Raises:
        TypeError: Its steps, groups or checkpoints do not work under SAM.
        ValueError: It has no parameters.
    """
    name = type(base).__name__
    if hasattr(base, "first_step") and hasattr(base, "second_step"):
        raise TypeError(f"the base optimizer is a {name}, which makes two passes already: wrap its own base instead")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name} cannot be the base: its step needs a closure, because it evaluates the loss at several points, "
            f"while SAM gives its base one gradient a step. Use a base whose step() runs without one"
        )
    if getattr(base, "_overlap_with_ddp", False):  # a private name of torch: of ZeroRedundancyOptimizer
        raise TypeError(
            f"{name} with overlap_with_ddp=True cannot be the base: it steps inside of every backward, so that each "
            "pass would be a step, that of the second one from perturbed weights. Make it without overlap_with_ddp"
        )
    _check_wrapper(base)
    if not any(group["params"] for group in base.param_groups):
        raise ValueError(f"the base optimizer ({name}) has no parameters: there is nothing to perturb")
    if any(not is_lazy(p) and (p.is_conj() or p.is_neg()) for p in parameters_of(base)):
        raise ValueError(
            f"the base optimizer ({name}) has a parameter that is conjugated or negated only where it is read, as "
            "nn.Parameter(z.conj()) is, and cannot be written in place with the others: make it of a tensor with "
            "values of its own, nn.Parameter(z.conj().resolve_conj().resolve_neg().clone())"
        )


def _check_wrapper(base: Optimizer) -> None:
    """Refuse an optimizer around another one (Lookahead and the like) that lacks something of torch's own.

    Raises:
        TypeError: Names what is missing.
    """
    name = type(base).__name__
    for attribute in ("param_groups", "state", "defaults"):
        if not hasattr(base, attribute):
            raise TypeError(
                f"{name} cannot be the base: it has no {attribute}, which SAM, schedules and scalers read. Wrap the "
                "optimizer inside of it"
            )
    if any(a is not b for a, b in zip(base.param_groups, base.param_groups, strict=True)):
        raise TypeError(
            f"{name} cannot be the base: its param_groups are copies, so that the radius and every schedule would be "
            "lost. Wrap the optimizer inside of it"
        )
    if type(base).state_dict is Optimizer.state_dict:
        return
    try:
        checkpoint: object = base.state_dict()
    except Exception as error:
        if type(error) is RuntimeError:
            return  # ZeroRedundancyOptimizer, for one, has to collect its state first
        reason = f"its state_dict() raises {type(error).__name__}: {error}"
    else:
        if isinstance(checkpoint, dict):
            return
        reason = f"its state_dict() returns a {type(checkpoint).__name__}"
    raise TypeError(
        f"{name} cannot be the base: {reason}, so that no checkpoint could be saved. Wrap the optimizer inside of it"
    )


def _from_class(
    params: Any = None,
    base_class: Callable[..., Optimizer] | None = None,
    rho: float | Tensor = 0.05,
    **kwargs: Any,
) -> tuple[Optimizer, float | Tensor]:
    if params is None and (kwargs.keys() & {"optimizer", "base"}):
        refuse_unknown(kwargs.keys() & {"optimizer", "base"}, "SAM(base_optimizer, rho)", list(Options.__annotations__))
    if "base_optimizer" in kwargs:
        raise TypeError(
            "SAM(params, base_optimizer=...): the class of the base is base_class= here, SAM(params, torch.optim.SGD, "
            "rho=0.05, lr=0.1); or import SAM from steppe.compat, which has the names of the classic implementation"
        )
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params is a {type(params).__name__}, not its parameters: write SAM(model.parameters(), torch.optim.SGD, "
            "rho=0.05, lr=0.1, model=model)"
        )
    if isinstance(base_class, Optimizer):
        raise TypeError(
            f"SAM(params, base): the base is an instance of {type(base_class).__name__}, which has its parameters "
            "already: write SAM(base, rho=0.05)"
        )
    if params is None or not callable(base_class):
        raise TypeError(
            f"SAM needs a base optimizer: SAM(torch.optim.SGD(params, lr=0.1), rho=0.05), or the class form "
            f"SAM(params, torch.optim.SGD, rho=0.05, lr=0.1); got {type(params).__name__} and {base_class!r}"
        )
    rho = as_radius(rho)
    if isinstance(params, torch.Tensor):
        raise TypeError("params must be an iterable of tensors or dicts, got one tensor: put it into a list")
    params = list(params)
    if not params:
        raise ValueError("the parameter list is empty: there is nothing to optimize")
    _refuse_own_rho(base_class, inspect.signature(base_class).parameters)
    refuse_foreign_options(kwargs, base_class)
    groups = [_with_own_radius(p) if isinstance(p, dict) else p for p in params]
    base, rho = _from_instance(base_class(groups, **kwargs), rho)
    _refuse_own_rho(base_class, option_names(base))  # a signature with **kwargs does not name its options
    return base, rho


def _refuse_own_rho(base_class: Callable[..., Optimizer], names: Container[str]) -> None:
    """Refuse a base that has an option ``rho``, for which the class form has the same name as for the radius.

    Raises:
        TypeError: Names the other form.
    """
    if "rho" in names:
        name = getattr(base_class, "__name__", repr(base_class))
        raise TypeError(
            f"{name} has a 'rho' of its own, so that 'rho' in the class form is ambiguous: write "
            f"SAM({name}(params, rho=...), rho=...)"
        )


def _with_own_radius(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the group with its radius under SAM's key."""
    return {RHO if key == "rho" else key: value for key, value in group.items()}
