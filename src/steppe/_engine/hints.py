"""Errors for arguments that :class:`steppe.SAM` does not take: what to write instead."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar

from torch import nn
from torch.optim import Optimizer

from steppe._engine.joint_base import as_one

_P = ParamSpec("_P")
_R = TypeVar("_R")

_RULE = "write it where it belongs, as in"
_INSTEAD = {
    "adaptive": "for ASAM write perturbation=steppe.Adaptive(), or steppe.variants.asam(base, rho=0.5)",
    "alpha": f"{_RULE} steppe.variants.gsam(base, alpha=0.2)",
    "ascent_steps": f"{_RULE} steppe.variants.sam(base, ascent_steps=2)",
    "base": "write base_optimizer=, or give the base as the first argument",
    "base_class": "give either a base optimizer, or parameters and base_class=",
    "beta": f"{_RULE} steppe.variants.esam(base, beta=0.6)",
    "decouple": f"{_RULE} steppe.variants.wsam(base, decouple=True)",
    "epsilon": "leave it out: a zero gradient gives e = 0 without one",
    "eta": f"{_RULE} steppe.variants.asam(base, eta=0.01)",
    "gamma": f"{_RULE} steppe.variants.wsam(base, gamma=0.9)",
    "grad_reduce": "leave it out: the gradients are those of the loop, and per_rank=True gives each rank its own",
    "gsam_alpha": "write steppe.variants.gsam(base, alpha=0.2)",
    "interval": f"{_RULE} steppe.variants.looksam(base, interval=5)",
    "k": f"{_RULE} steppe.variants.looksam(base, interval=5), or cadence=steppe.Periodic(5)",
    "lmbda": f"{_RULE} steppe.variants.friendly_sam(base, lmbda=0.9)",
    "max_norm": "clip the gradients after passes(), before step()",
    "module": "write model=",
    "net": "write model=",
    "num_steps": "write steppe.variants.sam(base, ascent_steps=2)",
    "n_steps": "write steppe.variants.sam(base, ascent_steps=2)",
    "only": f"{_RULE} steppe.variants.sam(base, only=parameters)",
    "optimizer": "write base_optimizer=, or give the base as the first argument",
    "params": "give either a base optimizer, or parameters and base_class=",
    "per_rank": "leave it out: the passes of this method are its own, and all ranks share one perturbation",
    "perturb_eps": "leave it out: a zero gradient gives e = 0 without one",
    "radius": "write rho=",
    "rho_scheduler": "make the schedule around the optimizer: steppe.rho_schedule.LinearRho(optimizer, total_steps)",
    "seed": f"{_RULE} steppe.variants.rwp(base, seed=0)",
    "sigma": f"{_RULE} steppe.variants.friendly_sam(base, sigma=1.0)",
    "sparsity": f"{_RULE} steppe.variants.sparse_sam(base, sparsity=0.5)",
    "total_steps": f"{_RULE} steppe.variants.late_sam(base, total_steps=10_000)",
    "use_gc": "leave it out: gradients can be changed after passes(), before step()",
}
"""What to write for arguments of other implementations, and for options at the wrong place."""


def refuse_unknown(names: Iterable[str], owner: str, known: Sequence[str], *, list_known: bool = False) -> NoReturn:
    """Raise TypeError for keyword arguments that SAM or a named function does not take.

    Args:
        names: The arguments.
        owner: The function in the error.
        known: Its arguments.
        list_known: Name them all in the error.
    """
    names = sorted(names)
    advice = dict.fromkeys(_advice(name, known) for name in names)
    taken = f"; it takes {', '.join(known)}" if list_known else ""
    raise TypeError(f"{owner} got {', '.join(names)}: {'; '.join(advice)}{taken}")


def checked(function: Callable[_P, _R], owner: str) -> Callable[_P, _R]:
    """Return a function that refuses wrong arguments with what to write, instead of Python's TypeError.

    Args:
        function: A named function or a constructor, with its whole signature.
        owner: Its public name, for the errors.
    """
    every = inspect.signature(function).parameters
    parameters = [p for p in every.values() if p.name != "self"]
    known = [p.name for p in parameters]
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in parameters if p.default is p.empty]

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = args[len(every) - len(known) :]
        check_positional(by_position, given, kwargs, owner)
        _check_first(owner, known[0], given[0] if given else kwargs.get(known[0]), required[1:])
        if unknown := kwargs.keys() - set(known):
            refuse_unknown(unknown, owner, known, list_known=True)
        missing = [f"{name}=" for name in required if name not in kwargs and name not in by_position[: len(given)]]
        if missing:
            raise TypeError(f"{owner} needs {', '.join(missing)}; it takes {', '.join(known)}")
        return function(*args, **kwargs)

    return call


def _check_first(owner: str, name: str, value: Any, required: Sequence[str]) -> None:
    """Refuse parameters or a model instead of the optimizer, or the other way round.

    Raises:
        TypeError: Says what to write.
    """
    if name == "base_optimizer" and not isinstance(as_one(value), Optimizer):
        what, instead = "a base optimizer", "torch.optim.SGD(model.parameters(), lr=0.1), model=model"
    elif name == "params" and (value is None or isinstance(value, Optimizer | nn.Module | type)):
        what, instead = (
            "the parameters",
            ", ".join(["model.parameters()", *(f"{other}=..." for other in required), "model=model"]),
        )
    elif name == "model" and not isinstance(value, nn.Module):
        what, instead = "the model", "model, optimizer"
    else:
        return
    got = f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"
    raise TypeError(f"{owner} takes {what} first, got {'nothing' if value is None else got}: write {owner}({instead})")


def refuse_foreign_options(names: Iterable[str], base_class: Callable[..., Optimizer]) -> None:
    """Refuse arguments of the class form that the base's class does not take, where the remedy is known.

    Raises:
        TypeError: Names the argument and the remedy.
    """
    taken = inspect.signature(base_class).parameters
    foreign = [name for name in names if name in _INSTEAD and name not in taken]
    if foreign:
        name = getattr(base_class, "__name__", repr(base_class))
        advice = "; ".join(f"{option}: {_INSTEAD[option]}" for option in foreign)
        raise TypeError(f"neither SAM nor {name} takes {', '.join(foreign)}. {advice}")


def check_positional(names: Sequence[str], args: Sequence[Any], kwargs: Iterable[str], owner: str = "SAM") -> None:
    """Refuse more positional arguments than a form of the constructor has, and arguments that are given twice.

    Raises:
        TypeError: Names the argument and the remedy.
    """
    form = f"{owner}({', '.join(names)})"
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{form} got {twice[0]} twice, by position and by name: give it once")
    if len(args) > len(names):
        first = args[len(names)]
        options = ": write model=model" if isinstance(first, nn.Module) else ", as in model=model"
        raise TypeError(
            f"{form} takes {len(names)} positional arguments, got {len(args)} (the next one is a "
            f"{type(first).__name__}): options are given by name{options}"
        )


def _advice(name: str, known: Sequence[str]) -> str:
    if close := get_close_matches(name, known, n=1, cutoff=0.75):
        return f"did you mean {close[0]}?"
    if name in _INSTEAD:
        return _INSTEAD[name]
    return (
        "options of the base go to the base itself, before it is wrapped (the slots are perturbation=, combination= "
        "and cadence=)"
    )
