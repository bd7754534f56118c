"""Options that all named functions share."""

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor, nn

from steppe.rules import Perturbation
from steppe.rules.ascent_steps import AscentSteps
from steppe.rules.subsets import ParameterSubset

Rho = float | Tensor


class Surroundings(TypedDict, total=False):
    replay_rng: bool
    per_rank: bool
    scaler: torch.amp.GradScaler | None
    stochastic_rounding: bool


class Options(Surroundings, total=False):
    """What every method takes beside its own, as :class:`steppe.SAM` does."""

    model: nn.Module | None


def modified(rule: Perturbation, steps: int, only: Iterable[Tensor] | None) -> Perturbation:
    rule = rule if steps == 1 else AscentSteps(rule, steps)
    return rule if only is None else ParameterSubset(rule, only)
