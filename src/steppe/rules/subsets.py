"""Perturb a subset of the parameters, and choose such subsets by layer."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from steppe._checks import check_whole
from steppe.papers import Paper
from steppe.rules.modifier import Modifier
from steppe.rules.protocols import Perturbation, Point, ScaledDirection

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, eq=False)
class ParameterSubset(Modifier):
    """Perturb some of the parameters only: e is the rule's on these, and 0 on the others.

    The rule gets a point without the other parameters, so rho is the radius within the subset. The other parameters
    are neither copied nor moved, so a small subset adds almost nothing to the cost of its pass.

    Example:
        >>> import torch, steppe
        >>> a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
        >>> base = torch.optim.SGD([a, b], lr=0.1)
        >>> optimizer = steppe.SAM(base, rho=1.0, perturbation=ParameterSubset(steppe.L2(), [a]))
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         weights = a.tolist(), b.tolist()
        ...         (3 * a[0] + 4 * a[1] + 100 * b).sum().backward()
        >>> weights
        ([0.6000000238418579, 0.800000011920929], [0.0])
    """

    rule: Perturbation
    """The perturbation to restrict."""
    parameters: Iterable[Tensor] = field(repr=False)
    """The parameters to perturb."""
    paper: Paper | None = field(default=None, repr=False)
    """The paper that proposes this choice of parameters, for :func:`steppe.citation`."""

    def __post_init__(self) -> None:
        if isinstance(self.parameters, Tensor | str) or not isinstance(self.parameters, Iterable):
            raise TypeError(_what_to_give(self.parameters))
        chosen = tuple(dict.fromkeys(self.parameters))
        for parameter in chosen:
            if not isinstance(parameter, Tensor):
                raise TypeError(_what_to_give(parameter))
        if not chosen:
            raise ValueError(
                "the subset of parameters to perturb is empty, so this would be the plain base optimizer at twice the "
                "cost: give at least one parameter (an iterator gives its parameters only once)"
            )
        object.__setattr__(self, "parameters", chosen)

    def check_parameters(self, owned: Collection[Tensor]) -> None:
        """Raise ValueError if the subset holds parameters that the optimizer does not train.

        A frozen parameter may be missing there: it may be trained, and added, later.
        """
        own = set(owned)
        foreign = [p for p in self.parameters if p not in own and p.requires_grad]
        if foreign or not own.intersection(self.parameters):
            raise ValueError(
                f"{len(foreign) or 'all'} of the {len(tuple(self.parameters))} parameters to perturb (only=, "
                "ParameterSubset) are not in the optimizer, so that they would never be perturbed: choose them from "
                "the model whose parameters the base optimizer got, not from a copy of it"
            )

    def with_parameters(self, replaced: Mapping[Tensor, Tensor]) -> "ParameterSubset":
        """Return this rule for parameters that were put in the place of others, given by those that they replace."""
        return dataclasses.replace(self, parameters=[replaced.get(p, p) for p in self.parameters])

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's perturbation at the restricted point."""
        chosen = set(self.parameters)
        return perturb_subset(self.rule, point, [i for i, p in enumerate(point.parameters) if p in chosen])


def _what_to_give(value: object) -> str:
    return (
        f"the subset to perturb must hold the parameters themselves, got {value!r}: give tensors, as "
        'norm_layers(model), layers(model, "head") or last_layers(model, 1) return them'
    )


def perturb_subset(rule: Perturbation, point: Point, positions: Sequence[int]) -> ScaledDirection:
    """Apply a rule to the parameters at some positions; the direction is None at the others."""
    if not positions:
        return ScaledDirection([None] * len(point.parameters))
    direction, scale = rule(point.restricted(positions))
    by_position = dict(zip(positions, direction, strict=True))
    return ScaledDirection([by_position.get(i) for i in range(len(point.parameters))], scale)


def norm_layers(model: nn.Module) -> list[Tensor]:
    """Return the parameters of a model's normalization layers, for :class:`ParameterSubset` (SAM-ON).

    These are the batch, instance, layer, group and RMS norms, in all their forms.

    Example:
        >>> len(norm_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        2

    References:
        Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
    """
    return [p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)]


def layers(model: nn.Module, *patterns: str) -> list[Tensor]:
    """Return the parameters of all modules whose names match a pattern, for :class:`ParameterSubset`.

    Args:
        model: The model, whose parameters are returned in its own order.
        *patterns: Names as in ``model.named_modules()``; ``*`` stands for any characters, dots included. A module
            includes all its submodules.

    Raises:
        ValueError: No pattern is given, or one matches no module with parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()))
        >>> len(layers(model, "0")), len(layers(model, "1", "1.*"))
        (2, 1)
    """
    if not patterns:
        raise ValueError('no pattern, so no layer is chosen: give names of modules, such as "encoder.*"')
    chosen = set()
    for pattern in patterns:
        found = {p for name, module in model.named_modules() if fnmatchcase(name, pattern) for p in module.parameters()}
        if not found:
            names = ", ".join(name for name, module in _modules_with_own_parameters(model))
            raise ValueError(
                f"no module with parameters is called {pattern!r}: this model has {names or 'none at all'}"
            )
        chosen |= found
    return [p for p in model.parameters() if p in chosen]


def last_layers(model: nn.Module, num_layers: int) -> list[Tensor]:
    """Return the parameters of the last modules that have parameters of their own, for :class:`ParameterSubset`.

    Args:
        model: The model. Modules are counted in the order in which it lists them, usually that of the forward pass.
        num_layers: The number of modules.

    Raises:
        ValueError: ``num_layers`` is less than 1 or more than the model has.

    Example:
        >>> len(last_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), num_layers=1))
        2
    """
    owners = _modules_with_own_parameters(model)
    check_whole("num_layers", num_layers, "the number of layers, counted from the last")
    if not 1 <= num_layers <= len(owners):
        raise ValueError(
            f"num_layers must be between 1 and {len(owners)}, the number of layers with parameters, got {num_layers}"
        )
    return list(dict.fromkeys(p for _, module in owners[-num_layers:] for p in module.parameters(recurse=False)))


def _modules_with_own_parameters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
