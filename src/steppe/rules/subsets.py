"""Perturb a subset of the parameters only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from steppe.papers import Paper
from steppe.rules.protocols import Perturbation, Point, ScaledDirection, ascent_steps, needs_gradient, scale_free

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Modifier:
    """A perturbation made of another one, ``rule``: it needs what that one needs."""

    rule: Perturbation

    @property
    def needs_gradient(self) -> bool:
        """Whether the modified rule needs the gradient at w."""
        return needs_gradient(self.rule)

    @property
    def ascent_steps(self) -> int:
        """How many climbs the modified rule makes in a step."""
        return ascent_steps(self.rule)

    @property
    def scale_free(self) -> bool:
        """Whether the modified rule gives the same for any multiple of the gradient."""
        return scale_free(self.rule)


@dataclass(frozen=True, eq=False)
class ParameterSubset(Modifier):
    """Climb with some of the parameters only: e is the rule's on them, and 0 on the others.

    The rule sees nothing of the others, so rho is the radius among those that climb. Parameters that stay are neither
    copied nor moved, so a climb with few of them costs next to nothing beside its pass.

    >>> import torch, steppe
    >>> a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = steppe.SAM(torch.optim.SGD([a, b], lr=0.1), rho=1.0, perturbation=ParameterSubset(steppe.L2(), [a]))
    >>> for sam_pass in optimizer.passes():
    ...     with sam_pass:
    ...         seen = a.tolist(), b.tolist()
    ...         (3 * a[0] + 4 * a[1] + 100 * b).sum().backward()
    >>> seen
    ([0.6000000238418579, 0.800000011920929], [0.0])
    """

    rule: Perturbation
    """The perturbation to restrict."""
    parameters: Iterable[Tensor] = field(repr=False)
    """Those that climb."""
    paper: Paper | None = field(default=None, repr=False)
    """Whose choice of parameters it is, for :func:`steppe.citation`."""

    def __post_init__(self) -> None:
        chosen = tuple(dict.fromkeys(self.parameters))
        if not chosen:
            raise ValueError("no parameter is to climb, so this would be the plain base optimizer at twice the price")
        object.__setattr__(self, "parameters", chosen)

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the rule's climb at the restricted point."""
        chosen = set(self.parameters)
        return restricted(self.rule, point, [i for i, p in enumerate(point.parameters) if p in chosen])


def norm_layers(model: nn.Module) -> list[Tensor]:
    """The parameters of a model's normalization layers, for :class:`ParameterSubset` (SAM-ON).

    Batch, instance, layer, group and RMS norm count, in all their forms.

    >>> len(norm_layers(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
    2

    Source: Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, arXiv 2306.04226.
    """
    return [p for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(recurse=False)]


def layers(model: nn.Module, *patterns: str) -> list[Tensor]:
    """The parameters of the modules whose names match a pattern, for :class:`ParameterSubset`.

    Names are those of ``model.named_modules()``; ``*`` stands for any characters, dots included. A module comes with
    all that it contains.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()))
    >>> len(layers(model, "0")), len(layers(model, "1", "1.*"))
    (2, 1)
    """
    if not patterns:
        raise ValueError('no pattern, so no layer: give names of modules, such as "encoder.*"')
    chosen = set()
    for pattern in patterns:
        found = {p for name, module in model.named_modules() if fnmatchcase(name, pattern) for p in module.parameters()}
        if not found:
            names = ", ".join(name for name, module in _owners(model))
            raise ValueError(
                f"no module with parameters is called {pattern!r}: this model has {names or 'none at all'}"
            )
        chosen |= found
    return [p for p in model.parameters() if p in chosen]


def last_layers(model: nn.Module, k: int) -> list[Tensor]:
    """The parameters of the last k modules that have parameters of their own, for :class:`ParameterSubset`.

    They count in the order in which the model lists them, which is as a rule that of the forward pass.

    >>> len(last_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), 1))
    2
    """
    owners = _owners(model)
    if not 1 <= k <= len(owners):
        raise ValueError(f"k must be between 1 and {len(owners)}, the number of layers with parameters, got {k}")
    return list(dict.fromkeys(p for _, module in owners[-k:] for p in module.parameters(recurse=False)))


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]


def restricted(rule: Perturbation, point: Point, inside: Sequence[int]) -> ScaledDirection:
    """The climb of a rule that sees some of the parameters only, given by their positions."""
    if not inside:
        return ScaledDirection([None] * len(point.parameters))
    direction, scale = rule(point.restricted(inside))
    where = dict(zip(inside, direction, strict=True))
    return ScaledDirection([where.get(i) for i in range(len(point.parameters))], scale)
