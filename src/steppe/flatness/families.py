"""The measures of flatness, in families of the same invariances."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steppe.flatness.eigenvalues import Eigenpairs
from steppe.flatness.estimate import Estimate


@dataclass(frozen=True)
class Family:
    """Measures with the same invariances."""

    title: str
    about: str
    measures: Mapping[str, str]
    """Label of each measure, by name."""


@dataclass(frozen=True)
class Measure:
    """The value of one measure, with its uncertainty."""

    value: float
    error: float | None = None
    """A standard error, or, for an eigenvalue, |H u - lambda u|; None if the value is not an estimate."""
    note: str = ""

    @classmethod
    def of_eigenvalue(cls, pairs: Eigenpairs) -> "Measure":
        """Return the first of some eigenvalues."""
        note = "" if pairs.converged else "not converged"
        return cls(float(pairs.values[0]), float(pairs.residuals[0]), note)

    @classmethod
    def of_estimate(cls, estimate: Estimate, note: str = "") -> "Measure":
        """Return an estimate with its standard error."""
        return cls(estimate.value, estimate.error, note)

    @classmethod
    def of_parts(cls, estimate: Estimate, m: int) -> "Measure":
        """Return a mean over parts of m samples."""
        return cls.of_estimate(estimate, f"{estimate.n} part{'s'[: estimate.n > 1]} of {m} samples")


FAMILIES: Mapping[str, Family] = {
    "raw": Family(
        "Raw",
        "These measures change when layers are rescaled, even if the network's function stays the same.",
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
        "Each weight is perturbed in proportion to its size, so rescaling layers does not change these measures.",
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
        "The loss is computed on logits of unit norm, so a more confident network does not look flatter.",
        {
            "normalized_sharpness": "sharpness, normalized logits",
            "normalized_adaptive_sharpness": "adaptive sharpness, normalized logits",
        },
    ),
    "further": Family(
        "Further",
        "Measured only where they are named. They change when layers are rescaled, and have no part in the verdict.",
        {
            "batch_sharpness": "batch sharpness",
            "rounding": "increase of the loss at 4 bits",
            "gauss_newton": "largest Gauss-Newton eigenvalue",
            "gauss_newton_trace": "Gauss-Newton trace",
            "fisher": "largest empirical Fisher eigenvalue",
            "fisher_trace": "empirical Fisher trace",
            "adam_sharpness": "largest eigenvalue in the metric of Adam",
        },
    ),
    "layers": Family(
        "By layer",
        "Measured only where by_layer is named, of the loss as a function of one layer. They change when layers are "
        "rescaled, and have no part in the verdict.",
        {},
    ),
    "context": Family(
        "Context",
        "Not measures of flatness: neither larger nor smaller is better.",
        {"loss": "loss", "weight_norm": "weight norm ‖w‖", "lambda_min": "smallest Hessian eigenvalue"},
    ),
}
"""Every measure by family. In all families but ``context``, a smaller value means a flatter minimum.

The measures of ``layers`` depend on the network, and have names such as "trace/encoder.0".
"""

_IN_LAYER = {"lambda_max": "largest eigenvalue", "trace": "trace", "relative_flatness": "relative flatness"}

IN_VERDICT = ("raw", "adaptive", "normalized")
"""The families that decide whether a minimum is called flatter."""


def name_in_layer(measure: str, layer: str) -> str:
    """Return the name of a measure of one layer.

    >>> labels_by_family(["trace", name_in_layer("trace", "0.fc")])["layers"]
    {'trace/0.fc': '0.fc: trace'}
    """
    return f"{measure}/{layer}"


def labels_by_family(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the labels of measures by family and name, in the order of ``FAMILIES``; those of layers in their own."""
    names = list(dict.fromkeys(names))
    labels = {kind: {k: v for k, v in family.measures.items() if k in names} for kind, family in FAMILIES.items()}
    in_layers = [(name, *name.split("/", 1)) for name in names if "/" in name]
    labels["layers"] = {name: f"{layer}: {_IN_LAYER[measure]}" for name, measure, layer in in_layers}
    return labels
