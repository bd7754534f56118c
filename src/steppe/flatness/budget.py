"""The radii of the measurements, and the compute that each may use."""

from dataclasses import dataclass

FURTHER = ("batch_sharpness", "rounding", "gauss_newton", "fisher", "adam_sharpness", "by_layer")

CONDITIONAL = ("gauss_newton", "fisher", "adam_sharpness")
"""Those that not every loss and every optimizer allow."""


@dataclass(frozen=True)
class Budget:
    """Radii, numbers of steps and numbers of samples of each measure."""

    rho: float = 0.05
    """Radius of the sharpness S(w), in the L2 norm."""
    adaptive_rho: float = 0.5
    """Radius of the adaptive sharpness, in the L2 norm of the changes relative to each weight."""
    sigma: float = 0.005
    """Standard deviation of each weight's perturbation, for the average-case sharpness."""
    adaptive_sigma: float = 0.05
    """Standard deviation relative to each weight, for the adaptive average-case sharpness."""
    m: int = 64
    """Samples per part, for m-sharpness."""
    ascent_steps: int = 10
    """Passes over the data in each ascent, for the sharpness."""
    restarts: int = 2
    """Number of ascents, each from another start."""
    pairs: int = 16
    """Pairs of random perturbations e, -e."""
    num_eigenvalues: int = 5
    """Number of the largest eigenvalues."""
    tol: float = 1e-2
    """Tolerance |H u - lambda u| relative to |lambda|, as for `eigenvalues`. The error of lambda is far smaller."""
    probes: int = 16
    """Random vectors for traces and relative flatness."""
    density_probes: int = 3
    """Random vectors for the spectral density."""
    density_iterations: int = 32
    """Lanczos iterations for the spectral density, one product per probe each."""
    points: int = 13
    """Number of points along each axis of a landscape; 0 for no landscapes."""
    radius: float = 0.5
    """A landscape in random directions reaches from -radius to radius; 1 changes each filter by its own norm."""
    eigen_radius: float = 0.25
    """The same for the landscape along eigenvectors, which have unit norm."""
    seed: int = 0
    """Seed of all random draws, the same for all models that are compared."""
    further: str = ""
    """Further measures, separated by commas: batch_sharpness (of parts of m samples), rounding (the loss increase with
    weights of 4 bits), gauss_newton and fisher (largest eigenvalue and trace), adam_sharpness (in the metric of Adam,
    for runs that it has trained), by_layer (largest eigenvalue, trace and relative flatness of each layer)."""

    def __post_init__(self) -> None:
        if unknown := set(self.names_of_further) - set(FURTHER):
            raise ValueError(
                f"further={self.further!r}: there is no measure {', '.join(sorted(unknown))}; choose from "
                f"{', '.join(FURTHER)}"
            )

    @property
    def names_of_further(self) -> list[str]:
        """The names in ``further``."""
        return [name for part in self.further.split(",") if (name := part.strip())]
