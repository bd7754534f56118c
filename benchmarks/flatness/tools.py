"""One way to ask each tool for the same thing. They are installed, or their folders are given; none is copied."""

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
class Counted:
    """Calls of a method, counted."""

    products: int = 0


class Tool(Protocol):
    """How a tool is used; what it can be told is passed on as it is."""

    title: str
    package: str
    module: str

    def lambda_max(self, at: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """The largest eigenvalue, and how many products it took."""
        ...

    def density(self, at: Problem, seed: int, probes: int, steps: int) -> Any:
        """Nodes and weights, or what the tool gives in their place."""
        ...

    def products(self, at: Problem, number: int) -> None:
        """Multiply that many vectors, one after the other."""
        ...


@contextmanager
def counting(owner: Any, name: str):
    """Count the calls of a function of a module, a class or an object."""
    counted, real = Counted(), getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        counted.products += 1
        return real(*args, **options)

    setattr(owner, name, call)
    try:
        yield counted
    finally:
        setattr(owner, name, real)


class Steppe:
    """This package."""

    title, package, module = "Steppe", "steppe", "steppe"

    def operator(self, at: Problem) -> Any:
        """The Hessian."""
        from steppe.flatness import Hessian, Objective

        return Hessian(Objective(at.model, at.batches, loss=F.cross_entropy))

    def lambda_max(self, at: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Lanczos' method, restarted when the basis is full, until the residual is small."""
        from steppe.flatness import eigenvalues

        found = eigenvalues(self.operator(at), seed=seed, **options)
        return float(found.values[0]), found.products

    def density(self, at: Problem, seed: int, probes: int, steps: int) -> Any:
        """Stochastic Lanczos quadrature, all probes in one pass."""
        from steppe.flatness import density

        return density(self.operator(at), seed=seed, probes=probes, steps=steps)

    def products(self, at: Problem, number: int) -> None:
        """One pass a vector."""
        hessian = self.operator(at)
        for i in range(number):
            hessian(at.vector(i)[None])


class PyHessian:
    """Power iteration; Lanczos quadrature a probe."""

    title, package, module = "PyHessian", "pyhessian", "pyhessian"

    def operator(self, at: Problem) -> Any:
        """One batch: its graph is kept. Several: made again for each product."""
        from pyhessian import hessian

        only = {"data": at.batches[0]} if len(at.batches) == 1 else {"dataloader": at.batches}
        return hessian(at.model, nn.CrossEntropyLoss(), cuda=False, **only)

    def lambda_max(self, at: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """Largest by absolute value, which here is the same."""
        torch.manual_seed(seed)
        module = importlib.import_module("pyhessian.hessian")
        at.model.zero_grad()  # it adds its graphs to what it finds in .grad
        operator = self.operator(at)
        one = len(at.batches) == 1
        with counting(*((module, "hessian_vector_product") if one else (operator, "dataloader_hv_product"))) as counted:
            values, _ = operator.eigenvalues(**options)
        at.model.zero_grad()
        return float(values[0]), counted.products

    def density(self, at: Problem, seed: int, probes: int, steps: int) -> Any:
        """A probe after the other."""
        torch.manual_seed(seed)
        at.model.zero_grad()
        found = self.operator(at).density(iter=steps, n_v=probes)
        at.model.zero_grad()
        return found

    def products(self, at: Problem, number: int) -> None:
        """One pass a vector."""
        operator = self.operator(at)
        for i in range(number):
            v = [part.view_as(p) for part, p in zip(_cut(at, i), at.parameters, strict=True)]
            if len(at.batches) == 1:
                utils = importlib.import_module("pyhessian.utils")
                utils.hessian_vector_product(operator.gradsH, operator.params, v)
            else:
                operator.dataloader_hv_product(v)


class Eigenthings:
    """Lanczos' method with a number of steps that is given, orthogonalised once."""

    title, package, module = "hessian-eigenthings", "hessian-eigenthings", "hessian_eigenthings"

    def operator(self, at: Problem) -> Any:
        """The Hessian."""
        from hessian_eigenthings import HessianOperator, supervised_loss

        return HessianOperator(at.model, at.batches, supervised_loss(F.cross_entropy))

    def lambda_max(self, at: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """The largest by value."""
        from hessian_eigenthings import lanczos

        found = lanczos(self.operator(at), k=1, which="LA", seed=seed, **options)
        return float(found.eigenvalues[0]), found.iterations

    def density(self, at: Problem, seed: int, probes: int, steps: int) -> Any:
        """A probe after the other."""
        from hessian_eigenthings import spectral_density

        return spectral_density(self.operator(at), num_runs=probes, lanczos_steps=steps, seed=seed)

    def products(self, at: Problem, number: int) -> None:
        """One pass a vector."""
        operator = self.operator(at)
        for i in range(number):
            operator.matvec(at.vector(i))


class Curvlinops:
    """An operator for scipy's ARPACK; its own Lanczos quadrature, without orthogonalisation."""

    title, package, module = "curvlinops + scipy", "curvlinops-for-pytorch", "curvlinops"

    def operator(self, at: Problem) -> Any:
        """The Hessian, without the check that asks for two more passes."""
        from curvlinops import HessianLinearOperator

        loss = nn.CrossEntropyLoss()
        return HessianLinearOperator(at.model, loss, at.parameters, at.batches, check_deterministic=False)

    def lambda_max(self, at: Problem, seed: int, **options: Any) -> tuple[float, int]:
        """ARPACK, in float32 as the rest."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator, counted = self.operator(at).to_scipy(dtype=np.float32), Counted()

        def product(v: Any) -> Any:
            counted.products += 1
            return operator.matvec(v)

        watched = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        start = at.vector(seed).numpy()
        values = eigsh(watched, k=1, which="LA", v0=start, return_eigenvectors=False, **options)
        return float(values[0]), counted.products

    def density(self, at: Problem, seed: int, probes: int, steps: int) -> Any:
        """With the ends of the spectrum given, which it would else ask ARPACK for."""
        from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

        torch.manual_seed(seed)
        return lanczos_approximate_spectrum(self.operator(at), steps, num_repeats=probes, boundaries=(-10.0, 200.0))

    def products(self, at: Problem, number: int) -> None:
        """One pass a vector."""
        operator = self.operator(at)
        for i in range(number):
            operator @ at.vector(i)


@dataclass(frozen=True)
class Method:
    """A tool with what it is told."""

    tool: Tool
    options: dict[str, Any] = field(default_factory=dict)
    tuned: bool = False
    """Whether these are the cheapest settings found that are within 1e-3."""

    @property
    def told(self) -> str:
        """The options in words."""
        return ", ".join(f"{k}={v:g}" for k, v in self.options.items()) or "defaults"


TOOLS: dict[str, Callable[[], Tool]] = {
    "steppe": Steppe,
    "pyhessian": PyHessian,
    "eigenthings": Eigenthings,
    "curvlinops": Curvlinops,
}


def version(tool: Tool) -> str | None:
    """Of the package that would be imported, or None where there is none."""
    spec = importlib.util.find_spec(tool.module)
    if spec is None or spec.origin is None:
        return None
    beside = importlib.metadata.distributions(name=tool.package, path=[str(Path(spec.origin).parents[1])])
    return next((found.version for found in beside), "of a checkout")


def _cut(at: Problem, seed: int) -> tuple[Tensor, ...]:
    return at.vector(seed).split([p.numel() for p in at.parameters])
