"""BiSAM: perturb along the gradient of another loss than the update's; so do DISAM, Focal-SAM and ImbSAM."""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe._checks import check_positive
from steppe._engine.groups import trained_parameters
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import is_between_classic_passes, is_last, one_number
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.methods.sam import sam, sam_with
from steppe.papers import ICML, Paper, cites
from steppe.rules.ops import is_sharded
from steppe.sam import SAM, Pass

BISAM_PAPER = Paper(
    "xie2024bisam",
    ("Wanyun Xie", "Fabian Latorre", "Kimon Antonakopoulos", "Thomas Pethick", "Volkan Cevher"),
    "Improving {SAM} Requires Rethinking its Optimization Formulation",
    "2407.12993",
    2024,
    ICML,
)

_Loss: TypeAlias = Callable[..., Tensor]
_AtW: TypeAlias = tuple[Tensor, tuple[Tensor | None, ...]]
"""The value of ``loss_at_w`` at w, and its gradient by the parameters."""


@cites(BISAM_PAPER)
def perturb_on(
    optimizer: SAM, perturbation_loss: _Loss, loss: _Loss, *, loss_at_w: _Loss | None = None
) -> Callable[..., Tensor]:
    """Return a loss that perturbs along the gradient of ``perturbation_loss``, and updates with that of ``loss``.

    e is the perturbation for the gradient of ``perturbation_loss`` at w, and the update gradient is that of ``loss`` at
    w + e, plus that of ``loss_at_w`` at w. Use the returned loss in place of your own in the closure, or in a loop over
    :meth:`~steppe.SAM.passes`. A step costs two passes, and with ``loss_at_w`` a further backward; an unperturbed step
    minimizes ``loss_at_w + loss``. So do

    - BiSAM: ``perturb_on(optimizer, bisam_loss, F.cross_entropy)``;
    - DISAM: ``perturbation_loss`` is the loss minus lambda times the variance of the losses of the domains;
    - Focal-SAM and ImbSAM: the first two are the mean over the batch of c_y l, where c_y says how flat the loss of
      class y shall be (ImbSAM: 1 for rare classes, 0 for the others), and ``loss_at_w`` is that of (1 - c_y) l.

    ``examples/two_losses.py`` runs all four. The value is that of the update's loss, ``loss_at_w + loss``, at the
    weights of the pass (``loss_at_w`` remains at w), so that logs and :meth:`~steppe.SAM.report` show it; for this,
    the pass at w evaluates all functions, of the same outputs of the model. Outside of a pass, it is that loss.

    It works with any perturbation, several micro-batches inside each pass (one call for each, in the same order),
    :func:`~steppe.closures.micro_batches` and a loss scaler. Further ascent steps follow ``perturbation_loss``.

    Args:
        optimizer: A :class:`steppe.SAM` that makes a pass at w.
        perturbation_loss: Function of the model's outputs and any further arguments, one number.
        loss: Function of the same arguments, whose gradient at w + e is in the update.
        loss_at_w: Function of the same arguments, whose gradient at w is added to the update; its gradient is kept
            from one pass to the other, once for each call of a pass.

    Returns:
        A function of the same arguments, which returns the loss for the backward.

    Raises:
        ValueError: (when called) A loss is not one number.
        RuntimeError: (when called) There is no pass at w, or its gradient is in the update, too (a combination that
            needs g, Lookbehind); the cadence decides by the gradient; ``loss_at_w`` with sharded parameters; the step
            is ``first_step()`` and ``second_step()``, where your loop can take the two losses itself.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        >>> criterion = perturb_on(optimizer, bisam_loss, F.cross_entropy)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> loss_at_w = optimizer.step(lambda: criterion(model(x), y))

    References:
        Xie et al., Improving SAM Requires Rethinking its Optimization Formulation, arXiv 2407.12993 (BiSAM);
        Zhang et al., Domain-Inspired Sharpness-Aware Minimization Under Domain Shifts, arXiv 2405.18861 (DISAM);
        Li et al., Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification, arXiv 2505.01660;
        Zhou et al., ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition, arXiv
        2308.07815.
    """
    return _LossOfThePass(optimizer, perturbation_loss, loss, loss_at_w)


@cites(BISAM_PAPER)
def bisam_loss(logits: Tensor, targets: Tensor, *, mu: float = 10.0, alpha: float | None = 0.1) -> Tensor:
    """Return BiSAM's loss for the perturbation, a lower bound of the error: mean of log(sum_j exp(mu phi_j)) / mu.

    phi_j = tanh(alpha (f_j - f_y)) for the logits f and the target y. The samples that are nearly misclassified have
    the largest gradients, and those with a large loss small ones.

    Args:
        logits: f, of shape (n, classes).
        targets: y, class indices of shape (n,).
        mu: mu; 10 for BiSAM (tanh), 1 for BiSAM (-log).
        alpha: alpha; None is BiSAM (-log), phi_j = 1 - log(1 + exp(log(e - 1) - f_j + f_y)).

    Raises:
        ValueError: The shapes are others, or mu or alpha is not positive.

    Example:
        >>> bisam_loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), mu=1.0).exp()
        tensor(3.)

    References:
        Xie et al., Improving SAM Requires Rethinking its Optimization Formulation, arXiv 2407.12993.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and targets of shape {tuple(targets.shape)}: BiSAM's loss is that "
            "of a classification, so give logits of shape (n, classes) and class indices of shape (n,)"
        )
    check_positive("mu", mu, "the sharpness of the maximum over the classes")
    margins = logits - logits.gather(1, targets[:, None])
    if alpha is None:
        phi = 1 - F.softplus(math.log(math.e - 1) - margins)
    else:
        check_positive("alpha", alpha, "the slope of tanh")
        phi = torch.tanh(alpha * margins)
    return (mu * phi).logsumexp(1).mean() / mu


class _LossOfThePass:
    """The loss that :func:`perturb_on` returns; keeps the gradients of ``loss_at_w`` from the pass at w to the last."""

    def __init__(self, optimizer: SAM, perturbation_loss: _Loss, loss: _Loss, loss_at_w: _Loss | None) -> None:
        self._optimizer, self._perturbation_loss = optimizer, perturbation_loss
        self._loss, self._loss_at_w = loss, loss_at_w
        self._pass: Pass | None = None
        self._has_update = False
        self._at_w: deque[_AtW] = deque()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = partial(self._loss, *args, **kwargs)
        loss_at_w = None if self._loss_at_w is None else partial(self._loss_at_w, *args, **kwargs)
        sam_pass = self._optimizer.current_pass
        if sam_pass is None:
            self._refuse_classic_passes()
        if sam_pass is None or not torch.is_grad_enabled():
            return _sum(loss, loss_at_w)
        if sam_pass is not self._pass:
            self._begin(sam_pass)
        if is_last(self._optimizer):
            if sam_pass.is_at_w or loss_at_w is None:
                return _sum(loss, loss_at_w)
            return self._update(loss)
        if loss_at_w is not None and sam_pass.is_at_w:
            self._at_w.append(self._gradient(loss_at_w))
        with torch.no_grad():
            value = _sum(loss, loss_at_w)
        derivative = one_number(self._perturbation_loss(*args, **kwargs))
        return value + (derivative - derivative.detach())

    def _begin(self, sam_pass: Pass) -> None:
        """Begin a pass; refuse a method in which the gradient of the pass at w is more than the perturbation's."""
        if sam_pass.is_first:
            self._at_w.clear()
            self._has_update = False
        optimizer, is_update = self._optimizer, sam_pass.is_perturbed and is_last(self._optimizer)
        name = f"perturb_on with {type(optimizer).__name__}, {optimizer.perturbation}, {optimizer.combination}"
        if sam_pass.is_first and not sam_pass.is_at_w:
            raise RuntimeError(
                f"{name}: the step's first pass is not at w, so that nothing is perturbed along the gradient of "
                "perturbation_loss. Use a perturbation that makes a pass at w, such as steppe.L2()"
            )
        if optimizer.combination.needs_unperturbed_gradient or (is_update and self._has_update):
            raise RuntimeError(
                f"{name}: a gradient from which the weights were perturbed is in the update, too, and it is that of "
                "perturbation_loss. Use a method that updates with the gradient at w + e alone"
            )
        self._has_update |= is_update
        self._pass = sam_pass

    def _gradient(self, loss_at_w: Callable[[], Tensor]) -> _AtW:
        """Return the value of ``loss_at_w`` and its gradient by the parameters; the graph remains."""
        parameters = self._parameters()
        if any(map(is_sharded, parameters)):
            raise RuntimeError(
                "loss_at_w with sharded parameters (FSDP2, tensor parallelism): its gradient would be that of this "
                "rank's shard before the reduction. Make the model with DistributedDataParallel, or leave it out"
            )
        value, scaler = one_number(loss_at_w()), self._optimizer.scaler
        scale = None if scaler is None or not scaler.is_enabled() else scaler.scale(torch.ones_like(value))
        gradients = torch.autograd.grad(
            value, parameters, None if scale is None else scale, retain_graph=True, allow_unused=True
        )
        if scale is not None:
            gradients = tuple(None if g is None else g / scale.to(g) for g in gradients)
        return value.detach(), gradients

    def _update(self, loss: Callable[[], Tensor]) -> Tensor:
        """Return the loss at w + e plus a number whose gradient is that of ``loss_at_w`` at w."""
        if not self._at_w:
            raise RuntimeError(
                "this call has no gradient of loss_at_w at w: call the loss as often in the pass at w + e as in the "
                "pass at w, with the same samples in the same order"
            )
        value, gradients = self._at_w.popleft()
        used = [(p, g) for p, g in zip(self._parameters(), gradients, strict=True) if g is not None]
        at_w: Tensor = _GivenGradient.apply(value, [g for _, g in used], *(p for p, _ in used))  # type: ignore[no-untyped-call]
        return one_number(loss()) + at_w

    def _parameters(self) -> list[Tensor]:
        return trained_parameters(self._optimizer.base)

    def _refuse_classic_passes(self) -> None:
        if is_between_classic_passes(self._optimizer):
            raise RuntimeError(
                "perturb_on between first_step() and second_step(): the backward before first_step() was that of the "
                "update's loss. Take perturbation_loss before first_step() and the loss after it, without perturb_on; "
                "or use step(closure) or a loop over passes()"
            )


def _sum(loss: Callable[[], Tensor], loss_at_w: Callable[[], Tensor] | None) -> Tensor:
    value = one_number(loss())
    return value if loss_at_w is None else value + one_number(loss_at_w())


class _GivenGradient(torch.autograd.Function):
    """A number whose gradient by some parameters is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Return the value."""
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the given gradients, times the derivative by the number (a loss scale, a share)."""
        return (None, None, *(g * gradient.to(g) for g in ctx.saved_tensors))


class BiSAMStep(StepFunction):
    """Takes the steps of BiSAM in a comparison."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, mu: float = 10.0, alpha: float = 0.1) -> None:
        super().__init__(optimizer)
        self.mu, self.alpha = mu, alpha

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step."""
        forward.wrap_loss(partial(perturb_on, self.optimizer, self._perturbation_loss))
        return super().step(forward, batch)

    def _perturbation_loss(self, outputs: Tensor, targets: Tensor, *_: Any) -> Tensor:
        return bisam_loss(outputs, targets, mu=self.mu, alpha=self.alpha)


CARD = MethodCard(
    name="bisam",
    function=perturb_on,
    label="BiSAM",
    paper=BISAM_PAPER,
    summary="Perturb along the gradient of another loss than the update's, such as BiSAM's lower bound of the error. "
    "DISAM, Focal-SAM and ImbSAM are the same with other losses.",
    equation="e = rho g / |g|,   g = dP/dw at w,   w <- Base(w, dL/dw at w + e + dA/dw at w),   A = 0 by default\n"
    "BiSAM      P = mean log(sum_j exp(mu tanh(alpha (f_j - f_y)))) / mu\n"
    "DISAM      P = L - lambda (variance of the domains' mean losses)\n"
    "Focal-SAM  P = L = mean c_y l,   A = mean (1 - c_y) l,   c_y = s (1 - n_y / n)^gamma\n"
    "ImbSAM     P = L = mean c_y l,   A = mean (1 - c_y) l,   c_y = 1 for rare classes, else 0",
    cost="2",
    passes=2,
    memory=f"{COPY}; with A, its gradient until the second pass is done",
    when="BiSAM: for classification. DISAM: with batches of several domains. Focal-SAM, ImbSAM: with rare classes.",
    when_not="With a combination that needs g (`gsam`, `pgn`, `looksam`), or a method without a pass at w (`msam`, "
    "`rwp`, `sampa`): all are errors.",
    arguments_of=(bisam_loss,),
    usual={"mu": "10 (paper, official code)", "alpha": "0.1 (paper, official code)"},
    verified="official code, read",
    checked="https://github.com/LIONS-EPFL/BiSAM (without 1 / mu, which does not change e), "
    "https://github.com/MediaBrain-SJTU/DISAM, https://github.com/scongl/Focal-SAM, "
    "https://github.com/cool-xuan/Imbalanced_SAM (which doubles the terms of rare classes). BiSAM's loss agrees with "
    "the authors'. CC-SAM (https://github.com/zzpustc/CC-SAM) is another method: it has a radius for each class.",
    caveats=(
        "It is a loss in place of your own: with a plain loss, the same optimizer is SAM.",
        "The value is that of the update's loss, in the pass at w too; the backward there is that of P.",
        "`first_step()` and `second_step()` are an error: such a loop takes the two losses by itself.",
    ),
    build_example=sam_with(perturb_on),
    usage_code="optimizer = steppe.variants.sam(base, model=model)\n"
    "criterion = steppe.closures.perturb_on(optimizer, steppe.closures.bisam_loss, F.cross_entropy)\n"
    "optimizer.step(lambda: criterion(model(x), y))",
    comparison=Comparison(
        summary="SAM with the perturbation of BiSAM's loss, at SAM's rho",
        build=sam,
        passes=lambda ascent_steps: 1 + ascent_steps,
        step_function=BiSAMStep,
    ),
)
