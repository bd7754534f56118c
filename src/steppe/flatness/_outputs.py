"""The model's outputs of one batch, as the variables of the loss: what the Gauss-Newton and Fisher matrices need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from steppe._tensors.graph import derivatives
from steppe.flatness._batches import list_tensors
from steppe.flatness._forward import Evaluated
from steppe.flatness.objective import Objective

_Edge: TypeAlias = tuple[Any, int]
"""A tensor in a graph: the node that computed it, and its number among the node's outputs."""


def loss_inputs(evaluated: Evaluated, weights: Sequence[Tensor], matrix: str) -> list[Tensor]:
    """Return the outputs of the model that the loss is a function of.

    Raises:
        TypeError: The outputs are not known.
        ValueError: The loss depends on the weights by another way than the outputs, or one output on another.
    """
    if evaluated.outputs is None:
        raise TypeError(
            f"the {matrix} needs the model's outputs, but evaluate= gives the loss only: return (loss, outputs) from "
            "it, or pass loss=, (outputs, targets) -> mean loss, with batches (*inputs, targets)"
        )
    if not evaluated.loss.requires_grad:
        return []
    outputs = {_edge(t): t for t in list_tensors(evaluated.outputs) if t.requires_grad}
    if len(outputs) > 1:  # of a model that returns its loss beside them
        outputs.pop(_edge(evaluated.loss), None)
    reached, others = _reach([_edge(evaluated.loss)], outputs)
    if _depends_on(others, weights):
        raise ValueError(
            f"the loss depends on the weights by another way than the model's outputs, so the {matrix} is not defined: "
            "return all that it needs from the model, and leave out terms of the weights (a penalty, an auxiliary loss)"
        )
    for edge in reached if len(reached) > 1 else ():
        if _reach(_previous(edge), outputs)[0] & reached:
            raise ValueError(
                f"the loss uses two outputs of the model, of which one is computed from the other, so the {matrix} is "
                "not defined: compute the loss from one of them"
            )
    return [t for edge, t in outputs.items() if edge in reached]


def _edge(tensor: Tensor) -> _Edge:
    node, number = get_gradient_edge(tensor)[:2]
    return node, number


def _reach(start: list[_Edge], stops: Mapping[_Edge, Tensor]) -> tuple[set[_Edge], set[Any]]:
    """Follow a graph backward up to the stops; return the stops that were reached, and all other nodes."""
    reached, visited, edges = set(), set(), list(start)
    while edges:
        edge = edges.pop()
        if edge in stops:
            reached.add(edge)
        elif edge[0] not in visited:
            visited.add(edge[0])
            edges += _previous(edge)
    return reached, visited


def _previous(edge: _Edge) -> list[_Edge]:
    return [(node, number) for node, number in edge[0].next_functions if node is not None]


def _depends_on(nodes: set[Any], weights: Sequence[Tensor]) -> bool:
    ours = {id(w) for w in weights}
    return any(id(getattr(node, "variable", None)) in ours for node in nodes)


@dataclass(frozen=True, eq=False)
class Jacobian:
    """Products with J = d outputs / d w of one batch, by reverse-mode derivatives only."""

    weights: Sequence[Tensor]
    outputs: Sequence[Tensor]
    _cotangents: Sequence[Tensor]
    pullback: Sequence[Tensor]
    """J' u as a function of the cotangents u, in which it is linear: its derivative gives J v."""

    @classmethod
    def of(cls, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> "Jacobian":
        """Build the graph of J' u."""
        cotangents = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pullback = derivatives(outputs, weights, cotangents, create_graph=True)
        return cls(weights, outputs, cotangents, pullback)

    def times(self, vs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return J v, one tensor per output, for v of one tensor per weight."""
        used = [i for i, g in enumerate(self.pullback) if g.requires_grad]
        along = [self.pullback[i] for i in used], self._cotangents, [vs[i] for i in used]
        return derivatives(*along, retain_graph=True)

    def transposed_times(self, us: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return J' u, one tensor per weight, for u of one tensor per output."""
        return derivatives(self.outputs, self.weights, us, retain_graph=True)


def zero_product(objective: Objective, vectors: Tensor) -> Tensor:
    """Return the product with the matrix of a loss that does not depend on the weights."""
    return torch.zeros(len(vectors), objective.n, dtype=objective.dtype, device=objective.device)
