"""Everything at once: the measures of one solution, each with how well it is known, ready to be compared."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe._tensors.ops import norm
from steppe.flatness.average import average_sharpness
from steppe.flatness.directions import random_directions
from steppe.flatness.eigen import Eigenpairs, eigenvalues
from steppe.flatness.evaluation import Loss
from steppe.flatness.landscape import Landscape, landscape
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Hessian, Operator, Scaled
from steppe.flatness.relative import relative_flatness
from steppe.flatness.sharpness import m_sharpness, sharpness
from steppe.flatness.spectrum import Density, density, trace
from steppe.flatness.values import Estimate

FORMAT = "steppe flatness, version 1"


@dataclass(frozen=True)
class Family:
    """Measures that are blind to the same things."""

    title: str
    about: str
    measures: Mapping[str, str]
    """Names, with what they are called."""


FAMILIES: Mapping[str, Family] = {
    "raw": Family(
        "Raw",
        "They change when layers are rescaled, even where the network's function stays the same.",
        {
            "sharpness": "worst-direction sharpness S(w)",
            "first_order": "first-order sharpness ρ‖g‖",
            "m_sharpness": "m-sharpness",
            "average_sharpness": "average-case sharpness",
            "lambda_max": "largest Hessian eigenvalue",
            "trace": "Hessian trace",
            "gradient_norm": "gradient norm",
        },
    ),
    "adaptive": Family(
        "Adaptive",
        "Each weight is moved in proportion to its size, so rescaling layers leaves them as they are.",
        {
            "adaptive_sharpness": "adaptive sharpness (ASAM)",
            "adaptive_average_sharpness": "adaptive average-case sharpness",
            "adaptive_lambda_max": "largest eigenvalue of |w|H|w|",
            "adaptive_trace": "trace of |w|H|w|",
            "relative_flatness": "relative flatness (last layer)",
        },
    ),
    "normalized": Family(
        "Normalized logits",
        "The loss sees logits of one size, so a network that is only surer of itself does not look flatter.",
        {
            "normalized_sharpness": "sharpness, normalized logits",
            "normalized_adaptive_sharpness": "adaptive sharpness, normalized logits",
        },
    ),
    "context": Family(
        "Context",
        "No flatness, and no direction that is better.",
        {"loss": "loss", "weight_norm": "weight norm ‖w‖", "lambda_min": "smallest Hessian eigenvalue"},
    ),
}
"""Every measure, by family; of all but the context, lower is flatter."""


@dataclass(frozen=True)
class Measure:
    """A number, and how well it is known."""

    value: float
    error: float | None = None
    """A standard error, or for an eigenvalue |H u - lambda u|; None where nothing is estimated."""
    note: str = ""


@dataclass(frozen=True, eq=False)
class Flatness:
    """What :func:`measure` found at one solution."""

    settings: Mapping[str, Any]
    """Samples, modes, radii, seeds: numbers may be compared where these are the same."""
    measures: Mapping[str, Measure]
    """By the names in ``FAMILIES``."""
    eigenvalues: Tensor
    """The largest of the Hessian, float64 (k,)."""
    residuals: Tensor
    """|H u - lambda u| of each."""
    density: Density
    landscape: Landscape | None
    """In two random filter-normalized directions."""
    eigen_landscape: Landscape | None
    """Along the first two eigenvectors."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return what ``json`` can write; what is not finite becomes null."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "measures": {k: {f: _plain(v) for f, v in asdict(m).items() if v != ""} for k, m in self.measures.items()},
            "eigenvalues": {"values": self.eigenvalues.tolist(), "residuals": self.residuals.tolist()},
            "density": {
                "nodes": self.density.nodes.tolist(),
                "weights": self.density.weights.tolist(),
                "n": self.density.n,
            },
            "landscape": self.landscape and self.landscape.to_json(),
            "eigen_landscape": self.eigen_landscape and self.eigen_landscape.to_json(),
            "seconds": round(self.seconds, 1),
        }

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Flatness":
        """Read what :meth:`to_json` gave; ValueError where it is none."""
        if written.get("format") != FORMAT:
            raise ValueError(f"its format is {written.get('format')!r}, and {FORMAT!r} is read")
        pairs, quadrature = written["eigenvalues"], written["density"]
        surfaces = {
            k: Landscape.from_json(w) if (w := written.get(k)) else None for k in ("landscape", "eigen_landscape")
        }
        return cls(
            written["settings"],
            {
                k: Measure(math.nan if m["value"] is None else m["value"], m.get("error"), m.get("note", ""))
                for k, m in written["measures"].items()
            },
            torch.tensor(pairs["values"], dtype=torch.float64),
            torch.tensor(pairs["residuals"], dtype=torch.float64),
            Density(
                torch.tensor(quadrature["nodes"], dtype=torch.float64),
                torch.tensor(quadrature["weights"], dtype=torch.float64),
                quadrature["n"],
            ),
            surfaces["landscape"],
            surfaces["eigen_landscape"],
            written["seconds"],
        )


@dataclass(frozen=True)
class Budget:
    """How far to look, and how much to spend on it."""

    rho: float = 0.05
    """Radius of the sharpness S(w), an L2 norm."""
    adaptive_rho: float = 0.5
    """Radius of the adaptive sharpness: an L2 norm of changes relative to each weight."""
    sigma: float = 0.005
    """Standard deviation of each weight's displacement, for the average-case sharpness."""
    adaptive_sigma: float = 0.05
    """The same relative to each weight."""
    m: int = 64
    """Samples in a part, for m-sharpness."""
    steps: int = 10
    """Passes of one climb to the worst place."""
    restarts: int = 2
    """Climbs."""
    pairs: int = 16
    """Random displacements e, -e."""
    top: int = 5
    """Eigenvalues."""
    tol: float = 1e-2
    """How exact: |H u - lambda u| relative to |lambda|, as for `eigenvalues`. The error of lambda is far smaller."""
    probes: int = 16
    """Random vectors for traces and relative flatness."""
    density_probes: int = 3
    """Random vectors for the spectral density."""
    density_steps: int = 32
    """Products for each of them."""
    points: int = 13
    """Points of a landscape's axis; 0 for none."""
    radius: float = 0.5
    """How far a landscape's axis goes in random directions: 1 changes each filter by as much as it is long."""
    eigen_radius: float = 0.25
    """How far it goes along eigenvectors, of length 1."""
    seed: int = 0
    """Of everything that is drawn; solutions are compared with the same draws."""


def normalized_logits(loss: Loss) -> Loss:
    """Make a loss that sees the logits f centerd and at length 1, (f - mean f) / |f - mean f|.

    Where every sample is classified, larger logits lower the cross-entropy and all its derivatives, and a network that
    is only surer of itself looks flatter. Andriushchenko et al. 2023, https://arxiv.org/abs/2302.07011.

    >>> loss = normalized_logits(torch.nn.functional.cross_entropy)
    >>> y = torch.tensor([0])
    >>> torch.equal(loss(torch.tensor([[2.0, 0.0]]), y), loss(torch.tensor([[200.0, 100.0]]), y))
    True
    """

    def of(outputs: Tensor, targets: Tensor) -> Tensor:
        centerd = outputs - outputs.mean(-1, keepdim=True)
        return loss(centerd / centerd.norm(dim=-1, keepdim=True).clamp_min(1e-10), targets)

    return of


def measure(objective: Objective, budget: Budget | None = None, *, normalized: Objective | None = None) -> Flatness:
    """Measure how flat the loss is at w, by every measure of ``FAMILIES``.

    No single number says whether a minimum is flat. Those of the raw family, S(w), lambda_max, Tr H, change when the
    network is rescaled without changing its function; those of the adaptive family do not. Two solutions are compared
    on the same samples, by both.

    Args:
        objective: the loss over the data, at the weights as they are.
        budget: radii, steps, probes; by default ``Budget()``.
        normalized: the same loss by :func:`normalized_logits`, for the measures that need it; without it they are left
            out.

    Raises:
        FloatingPointError: the loss is not finite at w.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> data = torch.randn(32, 2), torch.randint(2, (32,))
    >>> found = measure(Objective(model, data, loss=nn.functional.cross_entropy), Budget(m=16, points=0))
    >>> found.measures["sharpness"].value > found.measures["average_sharpness"].value > 0
    True
    """
    budget = budget or Budget()
    begun = time.perf_counter()
    worst, measures = _sharpnesses(objective, budget)
    if normalized is not None:
        measures |= _normalized(normalized, budget)
    hessian = Hessian(objective)
    top = _spectral(objective, hessian, budget, measures)
    objective.stage = "spectral density"
    spectrum = density(hessian, probes=budget.density_probes, steps=budget.density_steps, seed=budget.seed)
    hessian.forget()
    random, eigen = _landscapes(objective, top, budget)
    measures |= {"loss": Measure(worst), "weight_norm": Measure(float(norm([objective.weights])))}
    settings = {
        "samples": objective.samples,
        "batch_norm": objective.batch_norm,
        "parameters": objective.n,
        "dtype": str(objective.dtype).removeprefix("torch."),
        **asdict(budget),
    }
    seconds = time.perf_counter() - begun
    return Flatness(settings, measures, top.values, top.residuals, spectrum, random, eigen, seconds)


def _sharpnesses(objective: Objective, budget: Budget) -> tuple[float, dict[str, Measure]]:
    """The measures that need no second derivative, and the loss."""
    climb: dict[str, Any] = {"steps": budget.steps, "restarts": budget.restarts, "seed": budget.seed}
    draw: dict[str, Any] = {"pairs": budget.pairs, "seed": budget.seed}
    objective.stage = "sharpness"
    worst = sharpness(objective, budget.rho, **climb)
    adaptive = sharpness(objective, budget.adaptive_rho, adaptive=True, **climb)
    parts = m_sharpness(objective, budget.rho, budget.m, **climb)
    objective.stage = "average-case sharpness"
    average = average_sharpness(objective, budget.sigma, **draw)
    adaptive_average = average_sharpness(objective, budget.adaptive_sigma, adaptive=True, **draw)
    return worst.loss, {
        "sharpness": Measure(worst.value, note=_climbs(worst.restarts)),
        "first_order": Measure(worst.first_order),
        "m_sharpness": _measure(parts, f"{parts.n} part{'s'[: parts.n > 1]} of {budget.m} samples"),
        "average_sharpness": _measure(average),
        "gradient_norm": Measure(worst.gradient_norm),
        "adaptive_sharpness": Measure(adaptive.value, note=_climbs(adaptive.restarts)),
        "adaptive_average_sharpness": _measure(adaptive_average),
    }


def _normalized(objective: Objective, budget: Budget) -> dict[str, Measure]:
    climb: dict[str, Any] = {"steps": budget.steps, "restarts": budget.restarts, "seed": budget.seed}
    objective.stage = "sharpness, normalized logits"
    worst = sharpness(objective, budget.rho, **climb)
    adaptive = sharpness(objective, budget.adaptive_rho, adaptive=True, **climb)
    return {
        "normalized_sharpness": Measure(worst.value, note=_climbs(worst.restarts)),
        "normalized_adaptive_sharpness": Measure(adaptive.value, note=_climbs(adaptive.restarts)),
    }


def _spectral(objective: Objective, hessian: Hessian, budget: Budget, measures: dict[str, Measure]) -> Eigenpairs:
    """Add the measures of the Hessian to the others; return its largest eigenvalues."""
    scaled = Scaled(hessian, objective.weights.abs())
    k = min(budget.top, objective.n)

    def ends(what: str, operator: Operator, **options: Any) -> Eigenpairs:
        objective.stage = what
        return eigenvalues(operator, **options, tol=budget.tol, seed=budget.seed)

    top = ends("largest eigenvalues", hessian, k=k)
    bottom = ends("smallest eigenvalue", hessian, which="smallest")
    adaptive_top = ends("largest eigenvalues, adaptive", scaled, k=k)
    for name, pairs in (("lambda_max", top), ("lambda_min", bottom), ("adaptive_lambda_max", adaptive_top)):
        note = "" if pairs.converged else "not converged"
        measures[name] = Measure(float(pairs.values[0]), float(pairs.residuals[0]), note)
    objective.stage = "traces"
    for name, operator, known in (("trace", hessian, top), ("adaptive_trace", scaled, adaptive_top)):
        measures[name] = _measure(trace(operator, probes=budget.probes, top=known, seed=budget.seed))
    last = [f"{k}.weight" if k else "weight" for k, m in objective.model.named_modules() if isinstance(m, nn.Linear)]
    if last and last[-1] in objective.names:
        layer = Hessian(objective.within([last[-1]]))
        measures["relative_flatness"] = _measure(
            relative_flatness(layer, last[-1], probes=budget.probes, seed=budget.seed), last[-1]
        )
    return top


def _landscapes(objective: Objective, top: Eigenpairs, budget: Budget) -> tuple[Landscape | None, Landscape | None]:
    if not budget.points:
        return None, None
    random = None
    if any(len(shape) > 1 for shape in objective.shapes):
        directions = random_directions(objective, seed=budget.seed)
        what = f"random, by filter, seed {budget.seed}"
        random = landscape(objective, directions, points=budget.points, radius=budget.radius, what=what)
    eigen = None
    if len(top.vectors) > 1:
        directions, what = _oriented(top.vectors[:2]), "the first two eigenvectors"
        eigen = landscape(objective, directions, points=budget.points, radius=budget.eigen_radius, what=what)
    return random, eigen


def _oriented(vectors: Tensor) -> Tensor:
    """An eigenvector's sign is arbitrary: make its largest entry positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _measure(estimate: Estimate, note: str = "") -> Measure:
    return Measure(estimate.value, estimate.error, note)


def _climbs(restarts: tuple[float, ...]) -> str:
    """How the worst place was looked for, and how far the climbs disagree on it."""
    best = max(restarts)
    apart = f", which differ by up to {1 - min(restarts) / best:.0%}" if min(restarts) < 0.95 * best < math.inf else ""
    return f"lower bound: the best of {len(restarts)} climbs{apart}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
