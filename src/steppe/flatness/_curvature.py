"""The part that all curvature matrices of a loss have in common: a mean over batches, and the graph that is kept."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe._engine.attributes import Attributes, has_storage
from steppe._engine.registrations import same_objects
from steppe._tensors.dtensor import all_plain
from steppe._tensors.graph import check_twice_differentiable
from steppe.flatness.objective import Objective

Product = Callable[[Tensor], Tensor]
"""V -> V A for the matrix A of one batch, (k, n) -> (k, n)."""


@dataclass(frozen=True, eq=False)
class _KeptGraph:
    """The product with the matrix of the only batch, and copies of the tensors that it was built for.

    Torch's version counters would miss changes: fused optimizers and writes through ``.data`` leave them as they are.
    """

    product: Product
    _state: list[Tensor]
    _modules: "_Modules"

    def is_of(self, state: list[Tensor]) -> bool:
        """Return True if these tensors have the values of the copies, and nothing else in the model has changed."""
        kinds = [[(t.shape, t.dtype, t.device) for t in tensors] for tensors in (self._state, state)]
        return kinds[0] == kinds[1] and all(map(torch.equal, self._state, state)) and self._modules.are_unchanged()


class _Modules:
    """The modules of a model with their attributes and hooks, on which a loss depends, too: ``model.scale = 2.0``."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, list(model.modules())
        self._attributes = [Attributes(m, set()) for m in self._modules]
        self._hooks = _hooks(self._modules)
        tensors = [t for attributes in self._attributes for t in attributes.tensors]
        self._tensors = [(t, t.detach().clone()) for t in tensors if all_plain([t]) and has_storage(t)]

    def are_unchanged(self) -> bool:
        """True if modules, hooks and attributes are the same, and tensors in these have the same values."""
        now = list(self._model.modules())
        return (
            same_objects(now, self._modules)
            and same_objects(_hooks(now), self._hooks)
            and not any(attributes.are_changed() for attributes in self._attributes)
            and all(t.shape == saved.shape and torch.equal(t, saved) for t, saved in self._tensors)
        )


def _hooks(modules: list[nn.Module]) -> list[object]:
    return [hook for m in modules for hooks in (m._forward_pre_hooks, m._forward_hooks) for hook in hooks.values()]


class Curvature(ABC):
    """A symmetric matrix (n, n) at the current weights that is a mean over samples, computed batch by batch.

    One pass over the data multiplies all given vectors and builds the graph of each batch once. If the data are a
    single batch, the graph is kept for further products, until the weights or anything else in the model changes.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.n, self.dtype, self.device = objective.n, objective.dtype, objective.device
        self._kept: _KeptGraph | None = None
        self._checked = False

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return V A for vectors V in rows, (k, n) -> (k, n), in one pass over the data.

        Raises:
            RuntimeError: The model contains an operation without a second derivative.
        """
        if self._kept is not None and not self._kept.is_of(self.objective.state):
            self._kept = None

        def batch_product(batch: object) -> list[Tensor]:
            if self._kept is not None:
                return [self._kept.product(vectors)]
            if not self.objective.is_single_batch:
                return [self._build_product(batch)(vectors)]
            state, modules = [t.detach().clone() for t in self.objective.state], _Modules(self.objective.model)
            self._kept = _KeptGraph(self._build_product(batch), state, modules)
            return [self._kept.product(vectors)]

        (products,) = self.objective.average(batch_product)
        return products

    def free_graph(self) -> None:
        """Free the graph that is kept for further products."""
        self._kept = None

    def _check(self, derivative: Sequence[Tensor]) -> None:
        """Raise RuntimeError if a derivative, of the first batch, is itself not differentiable."""
        if not self._checked:
            check_twice_differentiable(derivative)
            self._checked = True

    @abstractmethod
    def _build_product(self, batch: Any) -> Product:
        """Build the graph of one batch, and return the product with its matrix."""
