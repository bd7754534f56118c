"""Options that all named functions share."""

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._engine.constructor import Model
from steppe._engine.joint_base import Base as Base
from steppe.rules import Perturbation
from steppe.rules.ascent_steps import AscentSteps
from steppe.rules.subsets import ParameterSubset

Rho = float | Tensor


class PassOptions(TypedDict, total=False):
    """How the passes are run; each is an argument of :class:`steppe.SAM`."""

    replay_rng: bool
    per_rank: bool
    scaler: torch.amp.GradScaler | None
    stochastic_rounding: bool


class Options(PassOptions, total=False):
    """Arguments of :class:`steppe.SAM` that every named function passes on."""

    model: Model | None


def repeated_on_subset(rule: Perturbation, ascent_steps: int, only: Iterable[Tensor] | None) -> Perturbation:
    """Return the rule with several ascent steps, restricted to the parameters in ``only`` if there are any."""
    check_count("ascent_steps", ascent_steps, "the number of ascent steps in one optimizer step")
    rule = rule if ascent_steps == 1 else AscentSteps(rule, ascent_steps)
    return rule if only is None else ParameterSubset(rule, only)
