"""Kernels that can be differentiated twice, and in full precision: what a Hessian asks of the model's operations."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel

# What torch says of operations whose derivative has none itself.
_SIGNS = ("derivative for", "double backward", "differentiate twice", "not differentiable twice")

_WITHOUT = (
    "An operation of this model has no second derivative ({}), and a Hessian needs one: take an implementation in "
    "plain torch operations for this measurement (attention: F.scaled_dot_product_attention, "
    "attn_implementation='eager'). Sharpness, landscapes and the gradient need first derivatives only"
)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Run what is in the ``with`` block in kernels that have a second derivative, where torch has a choice.

    Fused attention (flash, memory-efficient, cuDNN) has no double backward, nor have cuDNN's recurrent layers, the fast
    path of ``nn.MultiheadAttention`` and what ``torch.compile`` makes: the plain kernels are taken in their place. They
    compute the same function, and need more time and memory. TensorFloat-32 is switched off in convolutions: its three
    digits are not enough for the difference of two losses.

    Raises:
        RuntimeError: an operation without a second derivative was differentiated twice all the same.

    >>> x = torch.ones(1, 1, 2, 4, requires_grad=True)
    >>> with twice_differentiable(nn.Identity()):
    ...     y = torch.nn.functional.scaled_dot_product_attention(x, x, x).sum()
    ...     (g,) = torch.autograd.grad(y, x, create_graph=True)
    >>> g.requires_grad
    True
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.cuda.is_available():
            flags = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": False}
            stack.enter_context(cudnn.flags(enabled=cudnn.enabled and not recurrent, **flags))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _SIGNS):
                raise
            raise RuntimeError(_WITHOUT.format(error)) from error


def check_twice(gradient: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a gradient went through a function that is marked ``once_differentiable``.

    torch itself would say nothing here: asked for the derivative by the weights, it finds no way to them, and gives 0.
    """
    nodes = [g.grad_fn for g in gradient if g.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(_WITHOUT.format("it is marked once_differentiable"))
        further = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= further
        nodes += further
