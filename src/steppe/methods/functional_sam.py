"""Functional SAM: the derivative of the loss at w, the Jacobian of the network at w + e."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe._tensors.graph import graph
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import is_between_classic_passes, one_number
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.methods.sam import sam, sam_with
from steppe.papers import ICML, Paper, cites
from steppe.sam import SAM, Pass

FUNCTIONAL_SAM_PAPER = Paper(
    "singh2025functional",
    ("Sidak Pal Singh", "Hossein Mobahi", "Atish Agarwala", "Yann Dauphin"),
    "Avoiding spurious sharpness minimization broadens applicability of {SAM}",
    "2502.02407",
    2025,
    ICML,
)


@cites(FUNCTIONAL_SAM_PAPER)
def functional(optimizer: SAM, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss whose derivative with respect to the logits is that at w, also in the pass at w + e.

    By the chain rule, SAM's gradient is g_s = J(w + e)' dL/df(w + e), with J = df/dw the Jacobian of the logits f.
    Functional SAM has J(w + e)' dL/df(w): it drops what the perturbation changes in dL/df (the logit path), and keeps
    what it changes in the network (the functional path). Use the returned loss in place of ``loss`` in the closure, or
    in a loop over :meth:`~steppe.SAM.passes`; outside of a pass, it is ``loss``. A step costs two passes.

    It works with any perturbation, with several micro-batches inside each pass (one call for each, in the same order),
    with :func:`~steppe.closures.micro_batches` and with a loss scaler. The value is the loss at the weights of the
    pass. Further ascent steps are those of the whole gradient. Another term of the loss, added to the result, has its
    gradient at w + e, as in SAM.

    Args:
        optimizer: A :class:`steppe.SAM` that makes a pass at w.
        loss: Function of the logits, and of any further arguments, that returns the mean loss; it depends on no other
            tensor that is trained.

    Returns:
        A function of the same arguments, which returns the loss for the backward. The first may also be an output with
        the attribute ``logits``, as Hugging Face models return it.

    Raises:
        TypeError: (when called) The first argument is neither a tensor nor has ``logits``.
        ValueError: (when called) The loss is no mean, does not depend on the logits, or depends on another trained
            tensor, whose gradient would be lost; or the logits at w and at w + e differ in shape.
        RuntimeError: (when called) There is no derivative at w: the only pass is at w + e, the method makes several
            updates at perturbed weights, or the step is ``first_step()`` and ``second_step()``.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        >>> criterion = functional(optimizer, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> loss_at_w = optimizer.step(lambda: criterion(model(x), y))

    References:
        Singh et al., Avoiding spurious sharpness minimization broadens applicability of SAM, arXiv 2502.02407.
    """
    return _FunctionalLoss(optimizer, loss)


class _FunctionalLoss:
    """The loss that :func:`functional` returns: keeps dL/df of each call at w for the same call at w + e."""

    def __init__(self, optimizer: SAM, loss: Callable[..., Tensor]) -> None:
        self._optimizer, self._loss = optimizer, loss
        self._pass: Pass | None = None
        self._derivatives: deque[Tensor] = deque()

    def __call__(self, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits = _logits(outputs)
        loss = partial(self._evaluate, logits, *args, **kwargs)
        if not logits.requires_grad or not torch.is_grad_enabled():
            return loss()
        sam_pass = self._optimizer.current_pass
        if sam_pass is None:
            self._check_not_classic()
            return loss()
        if sam_pass is not self._pass:
            self._pass = sam_pass
            if sam_pass.is_first:
                self._derivatives.clear()
        if sam_pass.is_at_w:
            return loss() if sam_pass.is_last else self._at_w(logits, *args, **kwargs)
        return self._at_perturbed_weights(logits, loss) if sam_pass.is_last else loss()

    def _evaluate(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return one_number(self._loss(logits, *args, **kwargs))

    def _at_w(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # The derivative of a mean over many logits is too small for float16; the loss scale multiplies it only later.
        wide = torch.float32 if logits.dtype is torch.float16 else logits.dtype
        variable = logits.detach().to(wide).requires_grad_()
        value = self._evaluate(variable, *args, **kwargs)
        _check_graph(value, variable)
        (derivative,) = torch.autograd.grad(value, variable)
        self._derivatives.append(derivative)
        return _with_derivative(logits, value.detach(), derivative)

    def _at_perturbed_weights(self, logits: Tensor, loss: Callable[[], Tensor]) -> Tensor:
        if not self._derivatives:
            raise RuntimeError(
                f"Functional SAM with {type(self._optimizer).__name__}, {self._optimizer.perturbation}: this call has "
                "no derivative of the loss at w. Use a method with one pass at w and one update at w + e, and call the "
                "loss as often at w + e as at w"
            )
        derivative = self._derivatives.popleft()
        if derivative.shape != logits.shape:
            raise ValueError(
                f"the logits at w + e have shape {tuple(logits.shape)}, and those at w had {tuple(derivative.shape)}: "
                "Functional SAM combines the two, so evaluate the same samples in both passes, in the same order"
            )
        with torch.no_grad():
            value = loss()
        return _with_derivative(logits, value, derivative)

    def _check_not_classic(self) -> None:
        if is_between_classic_passes(self._optimizer):
            raise RuntimeError(
                "Functional SAM between first_step() and second_step(): the derivative of the loss at w is not known, "
                "so this would be a step of SAM. Use step(closure) or a loop over passes()"
            )


def _logits(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the first argument of the loss is {type(outputs).__name__}, without logits whose derivative could be "
            "taken: give a tensor, or an output with the attribute logits"
        )
    return logits


def _check_graph(loss: Tensor, logits: Tensor) -> None:
    leaves = [node.variable for node in graph(loss.grad_fn) if hasattr(node, "variable")]
    if others := [leaf for leaf in leaves if leaf is not logits]:
        raise ValueError(
            f"the loss depends on a tensor of shape {tuple(others[0].shape)} that is trained, beside the logits: its "
            "gradient would be lost. Add this term to the result of the loss, or give targets without a graph"
        )
    if not leaves:
        raise ValueError(
            "the loss does not depend on the logits, or not by differentiable operations: compute it from its first "
            "argument"
        )


class _GivenDerivative(torch.autograd.Function):
    """A loss whose derivative with respect to the logits is given."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, derivative: Tensor) -> Tensor:
        """Return the value of the loss."""
        ctx.save_for_backward(derivative)
        ctx.dtype = logits.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the given derivative, times that of the result with respect to the loss (a loss scale, a share)."""
        (derivative,) = ctx.saved_tensors
        return (gradient * derivative).to(ctx.dtype), None, None


def _with_derivative(logits: Tensor, loss: Tensor, derivative: Tensor) -> Tensor:
    result: Tensor = _GivenDerivative.apply(logits, loss, derivative)  # type: ignore[no-untyped-call]
    return result


class FunctionalSAMStep(StepFunction):
    """Takes the steps of Functional SAM in a comparison."""

    optimizer: SAM

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step."""
        forward.wrap_loss(partial(functional, self.optimizer))
        return super().step(forward, batch)


CARD = MethodCard(
    name="functional_sam",
    function=functional,
    label="Functional SAM",
    paper=FUNCTIONAL_SAM_PAPER,
    summary="Take the derivative of the loss with respect to the logits at w, and the Jacobian of the network at w + "
    "e. What the perturbation changes in the loss function alone (the logit path) has no effect.",
    equation="e = rho g / |g|,   g = J(w)' dL/df(w),   J = df/dw the Jacobian of the logits f\n"
    "w <- Base(w, J(w + e)' dL/df(w))",
    cost="2",
    passes=2,
    memory=f"{COPY}; dL/df, of the size of the logits, until the second pass is done",
    when="For language models, where SAM's gradient is dominated by the logit path, according to the paper.",
    when_not="With a method without a pass at w, or with several updates at w + e (`msam`, `rwp`, `sampa`, "
    "`lookbehind_sam`): there is no derivative at w, and this is an error.",
    usual={},
    verified="other code, read",
    checked="No code by the authors was found, and of the paper only the abstract was read. The equation is that of "
    "two independent third-party sources, a description and an implementation: dL/df at w, J at w + e, e of SAM. The "
    "paper also preconditions e. This is not offered, because its formula could not be read: the one implementation "
    "found divides e by the root of Adam's second moment, so that its length is no longer rho. A perturbation of your "
    "own can do so.",
    caveats=(
        "It is a loss in place of your own: with a plain loss, the same optimizer is SAM.",
        "A term that is added outside of it, such as a penalty, has its gradient at w + e, as in SAM.",
        "`first_step()` and `second_step()`, and `closures.fraction`, are an error.",
    ),
    build_example=sam_with(functional),
    usage_code="optimizer = steppe.variants.sam(base, model=model)\n"
    "criterion = steppe.closures.functional(optimizer, F.cross_entropy)\n"
    "optimizer.step(lambda: criterion(model(x), y))",
    comparison=Comparison(
        summary="SAM with the derivative of the loss with respect to the logits taken at w, at SAM's rho",
        build=sam,
        passes=lambda ascent_steps: 1 + ascent_steps,
        step_function=FunctionalSAMStep,
    ),
)
