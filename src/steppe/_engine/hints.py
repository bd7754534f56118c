"""Errors for arguments that :class:`steppe.SAM` does not take: what to write instead."""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from types import FrameType
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

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


def refuse_unknown(names: Iterable[str], options: Iterable[str]) -> NoReturn:
    """Raise TypeError for keyword arguments that neither SAM nor the named function around it takes.

    Args:
        names: The arguments.
        options: The options of SAM.
    """
    function, names = _named_function(), sorted(names)
    if function is None:
        owner, taken, known = "SAM(base_optimizer, rho)", "", list(options)
    else:
        owner, known = f"steppe.variants.{function.__name__}", list(inspect.signature(function).parameters)
        taken = f"; it takes {', '.join(known)}"
    advice = dict.fromkeys(_advice(name, known) for name in names)
    raise TypeError(f"{owner} got {', '.join(names)}: {'; '.join(advice)}{taken}")


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


def check_positional(names: Sequence[str], args: Sequence[Any], kwargs: Iterable[str]) -> None:
    """Refuse more positional arguments than a form of the constructor has, and arguments that are given twice.

    Raises:
        TypeError: Names the argument and the remedy.
    """
    form = f"SAM({', '.join(names)})"
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{form} got {twice[0]} twice, by position and by name: give it once")
    if len(args) > len(names):
        first = args[len(names)]
        option = "model=" if isinstance(first, nn.Module) else "model=, perturbation=, cadence=, ..."
        raise TypeError(
            f"{form} takes {len(names)} positional arguments, got {len(args)} (the next one is a "
            f"{type(first).__name__}): options are given by name, {option}"
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


def _named_function() -> Callable[..., Any] | None:
    """Return the function of steppe.variants that called, read from the call stack: no argument names it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("steppe."):
        function = frame.f_globals.get(frame.f_code.co_name)
        if frame.f_globals["__name__"].startswith("steppe.methods.") and inspect.isfunction(function):
            return function
        frame = frame.f_back
    return None
