"""Eigen-SAM: align the perturbation with the leading eigenvector of the Hessian."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe._checks import check_count, check_nonnegative
from steppe._engine.distributed import average_over_
from steppe._engine.groups import trained_parameters
from steppe._engine.stage import Stage
from steppe._tensors.dtensor import sharded_part
from steppe._tensors.graph import check_twice_differentiable, derivatives
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import one_number
from steppe.methods._options import Base, Options, Rho
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.papers import NEURIPS, Paper, cites
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import add_scaled_, dot, is_sharded, norm, normal, reciprocal
from steppe.sam import SAM

EIGEN_SAM_PAPER = Paper(
    "luo2024eigen",
    ("Haocheng Luo", "Tuan Truong", "Tung Pham", "Mehrtash Harandi", "Dinh Phung", "Trung Le"),
    "Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization",
    "2501.12666",
    2024,
    NEURIPS,
)

_V = "v"


@dataclass(frozen=True)
class EigenvectorAligned:
    """Perturb along the gradient and the leading eigenvector (Eigen-SAM): e = rho (g / |g| + alpha sign(g.v) v_orth).

    v is the unit eigenvector that :func:`update_eigenvector` has found, and v_orth its part orthogonal to g. Before
    the first one, v = 0 and e is SAM's. The memory is v; |e| is up to sqrt(1 + alpha^2) rho.

    Example:
        >>> w, g, v = torch.zeros(2), torch.tensor([2.0, 0.0]), torch.tensor([-0.6, 0.8])
        >>> memory = {"EigenvectorAligned": {w: {"v": v}}}
        >>> point = Point([w], [g], rho=[0.1], base_state=[{}], step=0, memory=memory)
        >>> EigenvectorAligned(alpha=0.5)(point).direction
        [tensor([ 1.0000, -0.4000])]

    References:
        Luo et al., Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization, arXiv 2501.12666.
    """

    paper: ClassVar[Paper] = EIGEN_SAM_PAPER
    scale_free: ClassVar[bool] = True
    averages_memory: ClassVar[bool] = True  # no step changes v

    alpha: float = 0.2
    """alpha, the weight of the eigenvector; 0 is SAM."""

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha, "the weight of the eigenvector")

    def __call__(self, point: Point) -> ScaledDirection:
        g, memory = point.gradients, point.memory_of(self)
        v = [own.setdefault(_V, torch.zeros_like(t)) for own, t in zip(memory, g, strict=True)]
        inverse, along = reciprocal(point.gradient_norm), dot(g, v)
        weight = self.alpha * along.sign()
        e = [torch.zeros_like(t) for t in g]
        add_scaled_(e, inverse * (1 - weight * along * inverse), g)
        add_scaled_(e, weight, v)
        return ScaledDirection(e)


@cites(EIGEN_SAM_PAPER)
def update_eigenvector(optimizer: SAM, loss: Callable[[], Tensor], *, iterations: int = 5) -> Tensor:
    """Find the leading eigenvector of the Hessian for Eigen-SAM by the power method, and keep it in the optimizer.

    v <- H v / |H v|, from the last v, at first from a random one. Call it between two steps, every hundred or so.
    Products with H are derivatives of the gradient, in a graph that is kept meanwhile: a gradient and ``iterations``
    products, each about two gradients. The modules of ``model=`` are in evaluation mode meanwhile, so that BatchNorm
    and dropout are not used; their modes, ``.grad`` and random generators remain as they are. With
    ``DistributedDataParallel``, H is that of the samples of all ranks. Checkpoints of the optimizer contain v.

    Args:
        optimizer: The optimizer that :func:`~steppe.variants.eigen_sam` returns.
        loss: Function without arguments that returns the mean loss of a batch, without a backward.
        iterations: The number of products; 5 in the authors' code.

    Returns:
        v'Hv of the vector before the last product, an estimate of the eigenvalue of the largest size; 0-dim.

    Raises:
        TypeError: The optimizer has no perturbation ``EigenvectorAligned``.
        ValueError: The loss is not one number, ``iterations`` is below 1, or parameters are complex.
        RuntimeError: Called in the middle of a step, with sharded weights, frozen ones included, or with an operation
            that has no second derivative.

    Example:
        >>> w = nn.Parameter(torch.ones(2))
        >>> optimizer = eigen_sam(torch.optim.SGD([w], lr=0.1))
        >>> eigenvalue = update_eigenvector(optimizer, lambda: w[0] ** 2 + 5 * w[1] ** 2, iterations=20)
        >>> round(eigenvalue.item(), 3)
        10.0

    References:
        Luo et al., Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization, arXiv 2501.12666.
    """
    # not above: the measures of flatness are much to import, and the perturbation needs none of them
    from steppe.flatness._isolation import evaluation_mode
    from steppe.flatness._kernels import twice_differentiable

    check_count("iterations", iterations, "the number of products with the Hessian")
    rule, engine = optimizer.perturbation, optimizer._engine
    if not isinstance(rule, EigenvectorAligned):
        raise TypeError(
            f"update_eigenvector needs an optimizer of steppe.variants.eigen_sam, and the perturbation of this one is "
            f"{rule}: the eigenvector would not be used"
        )
    if engine.stage not in (Stage.IDLE, Stage.INCOMPLETE):
        raise RuntimeError(f"update_eigenvector was called {engine.stage.value}: call it between two steps, at w")
    parameters = trained_parameters(optimizer.base)
    model = optimizer.model
    # frozen weights as well: FSDP frees them after a derivative, and a product with the Hessian takes several
    if any(map(is_sharded, parameters)) or (model is not None and sharded_part(model) is not None):
        raise RuntimeError(
            "update_eigenvector works on whole weights, and some of these are sharded: use DDP, or steppe.SAM"
        )
    if any(p.is_complex() for p in parameters):
        raise ValueError("update_eigenvector needs real parameters, and some are complex: use steppe.SAM")
    engine.load_from_base()
    memory = engine.memory.setdefault(type(rule).__name__, {})
    v = [memory.get(p, {}).get(_V, torch.zeros_like(p, requires_grad=False)) for p in parameters]
    drawn = normal("EigenvectorAligned", 0, engine.steps, v)
    is_new = norm(v) == 0
    v = [torch.where(is_new.to(old.device), new, old) for old, new in zip(v, drawn, strict=True)]
    evaluation = nullcontext() if model is None else evaluation_mode(model, train_norms=False)
    kernels = twice_differentiable(nn.Identity() if model is None else model, instead="")
    with torch.enable_grad(), evaluation, kernels, _unsynchronized(model):
        gradient = derivatives(one_number(loss()), parameters, create_graph=True)
        check_twice_differentiable(gradient)
        curved = [i for i, g in enumerate(gradient) if g.requires_grad]
        for _ in range(iterations):
            outputs, along = [gradient[i] for i in curved], [v[i] for i in curved]
            product = [torch.zeros_like(old) for old in v]
            if curved:
                product = list(derivatives(outputs, parameters, along, retain_graph=True))
            if isinstance(model, DistributedDataParallel):
                average_over_(product, model.process_group)
            eigenvalue = dot(v, product) * reciprocal(dot(v, v))
            inverse = reciprocal(norm(product))
            v = [(t * inverse.to(t)).detach() for t in product]
    for p, new in zip(parameters, v, strict=True):
        memory.setdefault(p, {})[_V] = new
    return eigenvalue


def _unsynchronized(model: nn.Module | None) -> AbstractContextManager[Any]:
    """Return a context in which DDP does not wait for a backward that fills ``.grad``."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def eigen_sam(base_optimizer: Base, rho: Rho = 0.05, *, alpha: float = 0.2, **options: Unpack[Options]) -> SAM:
    """Eigen-SAM: align the perturbation with the leading eigenvector of the Hessian. Two passes per step.

    e = rho (g / |g| + alpha sign(g.v) v_orth), v_orth the part of the eigenvector v orthogonal to g.

    This function makes the perturbation. :func:`steppe.closures.update_eigenvector` finds v: call it every hundred
    steps or so. Without it, v = 0 and the method is SAM.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the length of the part along the gradient; 0.1 in the authors' example.
        alpha: alpha, the weight of the eigenvector; 0.2 in the authors' example, and 0 is SAM.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: alpha is negative or not finite.

    Example:
        >>> eigen_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).perturbation
        EigenvectorAligned(alpha=0.2)

    References:
        Luo et al., Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization, arXiv 2501.12666.
    """
    return SAM(base_optimizer, rho, **options, perturbation=EigenvectorAligned(alpha))


class EigenSAMStep(StepFunction):
    """Takes the steps of Eigen-SAM in a comparison, and finds the eigenvector anew before every ``interval``-th one.

    The first ``interval`` steps are SAM's. The eigenvector is that of the Hessian on the batch of the step.
    """

    optimizer: SAM

    def __init__(self, optimizer: SAM, interval: int = 100, iterations: int = 5) -> None:
        check_count("interval", interval, "the number of steps from one eigenvector to the next")
        check_count("iterations", iterations, "the number of products with the Hessian")
        super().__init__(optimizer)
        self.interval, self.iterations = interval, iterations
        self.steps = 0

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step, after an update of the eigenvector if it is due."""
        if self.steps and self.steps % self.interval == 0:
            update_eigenvector(self.optimizer, lambda: forward(*batch.tensors), iterations=self.iterations)
            forward.count(_PER_PRODUCT * self.iterations * len(batch), recorded=True)
        self.steps += 1
        return super().step(forward, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps so far; the eigenvector is in the optimizer's checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state["steps"]


_PER_PRODUCT = 2
"""Gradients that a product with the Hessian costs."""


def _planned_passes(interval: int, iterations: int) -> Fraction:
    """Return the cost of a step, with its share of an update: a gradient and the products."""
    return 2 + Fraction(1 + _PER_PRODUCT * iterations, interval)


CARD = MethodCard(
    name="eigen_sam",
    function=eigen_sam,
    label="Eigen-SAM",
    paper=EIGEN_SAM_PAPER,
    summary="Perturb along the gradient and along the part of the Hessian's leading eigenvector that is orthogonal to "
    "it. The eigenvector is found anew every so many steps, by the power method.",
    equation="e = rho (g / |g| + alpha sign(g.v) v_orth),   v_orth = v - (v.g / |g|^2) g\n"
    "v <- H v / |H v|, some times, every so many steps",
    cost="2",
    passes=2,
    memory=f"{COPY}; v from step to step; in an update of v, the graph of the gradient",
    when="To reduce the largest eigenvalue of the Hessian more directly than SAM does.",
    when_not="With operations that have no second derivative, such as flash attention; with sharded parameters.",
    usual={
        "rho": "0.1 in the authors' example",
        "alpha": "0.2 in the authors' example; 0 is SAM",
        "iterations": "5 (official code), every 100 steps",
    },
    verified="official code, same steps",
    checked="https://github.com/RitianLuo/EigenSAM: the eigenvector and e agree in float64. Before the first "
    "eigenvector, it perturbs by rho g, without a norm; here it is SAM's e. X-SAM (arXiv 2601.10251), which corrects "
    "g_s along v, is not offered: neither its formula nor its authors' code could be read.",
    caveats=(
        "Without calls of `closures.update_eigenvector`, it is SAM. One update costs a gradient and `iterations` "
        "products with the Hessian, beyond the two passes of each step.",
        "e is longer than rho, up to sqrt(1 + alpha^2) rho.",
        "`steppe compare` updates v every `interval` steps, 100 by default, and counts the cost; before, it is SAM.",
    ),
    arguments_of=(eigen_sam, update_eigenvector),
    usage_code="optimizer = steppe.variants.eigen_sam(base, model=model)\n"
    "steppe.closures.update_eigenvector(optimizer, lambda: F.cross_entropy(model(x), y))  # every 100 steps\n"
    "optimizer.step(lambda: F.cross_entropy(model(x), y))",
    comparison=Comparison(
        summary="perturbs along the gradient and the leading eigenvector of the Hessian, at SAM's rho",
        passes=_planned_passes,
        step_function=EigenSAMStep,
    ),
)
