"""Select kernels that are twice differentiable and of full precision, as products with the Hessian need them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

# Parts of the messages that torch raises for a derivative that is itself not differentiable.
_MESSAGES = ("derivative for", "double backward", "differentiate twice", "not differentiable twice")

_NO_SECOND_DERIVATIVE = (
    "An operation of this model has no second derivative ({}), but the Hessian needs it: for this measurement use an "
    "implementation in plain torch operations (attention: F.scaled_dot_product_attention, "
    "attn_implementation='eager'), or FiniteDifferenceHessian, whose products have an error. Sharpness, landscapes and "
    "gradients need first derivatives only"
)


class _NonReentrant:
    """Stands for torch's ``CheckpointFunction``: the same checkpointing, without a backward within the backward.

    That backward writes the gradients to ``.grad``, ignores inputs that need no gradient, and has no second derivative.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def differentiable_checkpoints() -> Iterator[None]:
    """Run activation checkpointing with ``use_reentrant=True`` as if it were False in the ``with`` block."""
    original = checkpoint.CheckpointFunction
    try:
        checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc, assignment]
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Run the ``with`` block in kernels that have a second derivative, where torch offers a choice.

    Fused attention (flash, memory-efficient, cuDNN), cuDNN's recurrent layers, the fast path of
    ``nn.MultiheadAttention`` and graphs compiled by ``torch.compile`` have no double backward, so the plain kernels
    replace them. They compute the same function with more time and memory. TensorFloat-32 is switched off in
    convolutions: its three decimal digits are too few for the difference of two losses.

    Raises:
        RuntimeError: An operation without a second derivative was differentiated twice.

    Example:
        >>> x = torch.ones(1, 1, 2, 4, requires_grad=True)
        >>> with twice_differentiable(nn.Identity()):
        ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()
        ...     (g,) = torch.autograd.grad(y, x, create_graph=True)
        >>> g.requires_grad
        True
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(differentiable_checkpoints())
        if torch.cuda.is_available():
            flags = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": False}
            stack.enter_context(cudnn.flags(enabled=cudnn.enabled and not recurrent, **flags))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        except RuntimeError as error:
            if not any(part in str(error) for part in _MESSAGES):
                raise
            raise RuntimeError(_NO_SECOND_DERIVATIVE.format(error)) from error


def check_twice_differentiable(gradient: Sequence[Tensor]) -> None:
    """Raise RuntimeError if the graph of a gradient contains a function marked ``once_differentiable``.

    Without this check torch returns zeros for its second derivative, and the Hessian is silently wrong.
    """
    nodes = [g.grad_fn for g in gradient if g.grad_fn is not None]
    visited = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":  # the node that `once_differentiable` puts into the graph
            raise RuntimeError(_NO_SECOND_DERIVATIVE.format("it is marked once_differentiable"))
        inputs = {n for n, _ in node.next_functions if n is not None} - visited
        visited |= inputs
        nodes += inputs
