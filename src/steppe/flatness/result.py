"""All measures of one model as an object, and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from steppe.flatness._json import finite_or_none
from steppe.flatness.families import Measure
from steppe.flatness.landscape import Landscape
from steppe.flatness.spectral_density import Density

FORMAT = "steppe flatness, version 1"


@dataclass(frozen=True, eq=False)
class Flatness:
    """The result of :func:`measure` for one model."""

    settings: Mapping[str, Any]
    """Number of samples, BatchNorm mode, radii, seeds. Results are comparable only if their settings are equal."""
    measures: Mapping[str, Measure]
    """By the names in ``FAMILIES``."""
    eigenvalues: Tensor
    """The largest eigenvalues of the Hessian, (k,), float64."""
    residuals: Tensor
    """|H u - lambda u| of each eigenvalue, (k,), float64."""
    density: Density
    """The spectral density of the Hessian."""
    landscape: Landscape | None
    """The loss in two random filter-normalized directions."""
    eigen_landscape: Landscape | None
    """The loss along the first two eigenvectors."""
    seconds: float
    """Duration of the measurement."""

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for ``json``, in which values that are not finite are None."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "measures": {
                k: {f: finite_or_none(v) for f, v in asdict(m).items() if v != ""} for k, m in self.measures.items()
            },
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
        """Read the result of :meth:`to_json`.

        Raises:
            ValueError: Another format.
        """
        if written.get("format") != FORMAT:
            raise ValueError(f"the format is {written.get('format')!r}, but only {FORMAT!r} can be read")
        pairs, quadrature = written["eigenvalues"], written["density"]
        landscapes = {
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
            landscapes["landscape"],
            landscapes["eigen_landscape"],
            written["seconds"],
        )
