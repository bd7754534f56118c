"""One interface to all compared tools. They are installed, or imported from folders passed with --peers."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatness.problem import Problem


@dataclass
class Counter:
    """A counter of products with the Hessian."""

    products: int = 0


class Tool(Protocol):
    """The interface to a tool; ``options`` are its own arguments."""

    title: str
    package: str
    module: str

    def lambda_max(self, problem: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Return the largest eigenvalue and the number of products."""
        ...

    def density(self, problem: Problem, seed: int, probes: int, num_iterations: int) -> Any:
        """Return the spectral density in the form of the tool."""
        ...

    def products(self, problem: Problem, number: int) -> None:
        """Multiply this number of vectors, one after the other."""
        ...


@contextmanager
def counting(owner: Any, name: str):
    """Count the calls of a function of a module, a class or an object, which is replaced meanwhile."""
    counted, real = Counter(), getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        counted.products += 1
        return real(*args, **options)

    setattr(owner, name, call)
    try:
        yield counted
    finally:
        setattr(owner, name, real)


class Steppe:
    """Steppe: thick-restart Lanczos, and stochastic Lanczos quadrature."""

    title, package, module = "Steppe", "steppe", "steppe"

    def operator(self, problem: Problem) -> Any:
        """Return the Hessian."""
        from steppe.flatness import Hessian, Objective

        return Hessian(Objective(problem.model, problem.batches, loss=F.cross_entropy))

    def lambda_max(self, problem: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Return the largest eigenvalue at the tolerance of the residual."""
        from steppe.flatness import eigenvalues

        found = eigenvalues(self.operator(problem), seed=seed, **options)
        return float(found.values[0]), found.num_matvecs

    def density(self, problem: Problem, seed: int, probes: int, num_iterations: int) -> Any:
        """Return the density; all probes are multiplied in the same pass."""
        from steppe.flatness import density

        return density(self.operator(problem), seed=seed, probes=probes, num_iterations=num_iterations)

    def products(self, problem: Problem, number: int) -> None:
        """Multiply the vectors, one pass each."""
        hessian = self.operator(problem)
        for i in range(number):
            hessian(problem.vector(i)[None])


class PyHessian:
    """PyHessian: power iteration, and Lanczos quadrature probe by probe."""

    title, package, module = "PyHessian", "pyhessian", "pyhessian"

    def operator(self, problem: Problem) -> Any:
        """Return the Hessian. The graph of a single batch is kept; those of several are rebuilt for each product."""
        from pyhessian import hessian

        data = {"data": problem.batches[0]} if len(problem.batches) == 1 else {"dataloader": problem.batches}
        return hessian(problem.model, nn.CrossEntropyLoss(), cuda=False, **data)

    def lambda_max(self, problem: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Return the largest eigenvalue by absolute value, which is the same here."""
        torch.manual_seed(seed)
        module = importlib.import_module("pyhessian.hessian")
        problem.model.zero_grad()  # PyHessian accumulates gradients with graphs in .grad
        operator = self.operator(problem)
        one = len(problem.batches) == 1
        with counting(*((module, "hessian_vector_product") if one else (operator, "dataloader_hv_product"))) as counted:
            values, _ = operator.eigenvalues(**options)
        problem.model.zero_grad()
        return float(values[0]), counted.products

    def density(self, problem: Problem, seed: int, probes: int, num_iterations: int) -> Any:
        """Return the density, probe by probe."""
        torch.manual_seed(seed)
        problem.model.zero_grad()
        found = self.operator(problem).density(iter=num_iterations, n_v=probes)
        problem.model.zero_grad()
        return found

    def products(self, problem: Problem, number: int) -> None:
        """Multiply the vectors, one pass each."""
        operator = self.operator(problem)
        for i in range(number):
            v = [part.view_as(p) for part, p in zip(_random_parts(problem, i), problem.parameters, strict=True)]
            if len(problem.batches) == 1:
                utils = importlib.import_module("pyhessian.utils")
                utils.hessian_vector_product(operator.gradsH, operator.params, v)
            else:
                operator.dataloader_hv_product(v)


class Eigenthings:
    """hessian-eigenthings: Lanczos' method with a fixed number of iterations, orthogonalized once."""

    title, package, module = "hessian-eigenthings", "hessian-eigenthings", "hessian_eigenthings"

    def operator(self, problem: Problem) -> Any:
        """Return the Hessian."""
        from hessian_eigenthings import HessianOperator, supervised_loss

        return HessianOperator(problem.model, problem.batches, supervised_loss(F.cross_entropy))

    def lambda_max(self, problem: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Return the largest eigenvalue by value."""
        from hessian_eigenthings import lanczos

        found = lanczos(self.operator(problem), k=1, which="LA", seed=seed, **options)
        return float(found.eigenvalues[0]), found.iterations

    def density(self, problem: Problem, seed: int, probes: int, num_iterations: int) -> Any:
        """Return the density, probe by probe."""
        from hessian_eigenthings import spectral_density

        return spectral_density(self.operator(problem), num_runs=probes, lanczos_steps=num_iterations, seed=seed)

    def products(self, problem: Problem, number: int) -> None:
        """Multiply the vectors, one pass each."""
        operator = self.operator(problem)
        for i in range(number):
            operator.matvec(problem.vector(i))


class Curvlinops:
    """curvlinops: scipy's ARPACK, and its own Lanczos quadrature without orthogonalization."""

    title, package, module = "curvlinops + scipy", "curvlinops-for-pytorch", "curvlinops"

    def operator(self, problem: Problem) -> Any:
        """Return the Hessian, without the check for determinism, which costs two passes."""
        from curvlinops import HessianLinearOperator

        loss = nn.CrossEntropyLoss()
        return HessianLinearOperator(
            problem.model, loss, problem.parameters, problem.batches, check_deterministic=False
        )

    def lambda_max(self, problem: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Return the largest eigenvalue by ARPACK, in float32 as the other tools."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator, counted = self.operator(problem).to_scipy(dtype=np.float32), Counter()

        def product(v: Any) -> Any:
            counted.products += 1
            return operator.matvec(v)

        linear_operator = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        start = problem.vector(seed).numpy()
        values = eigsh(linear_operator, k=1, which="LA", v0=start, return_eigenvectors=False, **options)
        return float(values[0]), counted.products

    def density(self, problem: Problem, seed: int, probes: int, num_iterations: int) -> Any:
        """Return the density. The ends of the spectrum are passed, because ARPACK would compute them otherwise."""
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

        torch.manual_seed(seed)
        return lanczos_approximate_spectrum(
            self.operator(problem), num_iterations, num_repeats=probes, boundaries=(-10.0, 200.0)
        )

    def products(self, problem: Problem, number: int) -> None:
        """Multiply the vectors, one pass each."""
        operator = self.operator(problem)
        for i in range(number):
            operator @ problem.vector(i)


@dataclass(frozen=True)
class Configuration:
    """A tool with its options."""

    tool: Tool
    options: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    """True if these are the cheapest options found with an error within 1e-3."""

    @property
    def settings(self) -> str:
        """The options as text."""
        return ", ".join(f"{k}={v:g}" for k, v in self.options.items()) or "defaults"


TOOLS: dict[str, Callable[[], Tool]] = {
    "steppe": Steppe,
    "pyhessian": PyHessian,
    "eigenthings": Eigenthings,
    "curvlinops": Curvlinops,
}


def version(tool: Tool) -> str | None:
    """Return the version of the package that would be imported; None if there is none."""
    spec = importlib.util.find_spec(tool.module)
    if spec is None or spec.origin is None:
        return None
    distributions = importlib.metadata.distributions(name=tool.package, path=[str(Path(spec.origin).parents[1])])
    return next((found.version for found in distributions), "of a checkout")


def _random_parts(problem: Problem, seed: int) -> tuple[Tensor, ...]:
    """Split a random unit vector into one part per parameter."""
    return problem.vector(seed).split([p.numel() for p in problem.parameters])
