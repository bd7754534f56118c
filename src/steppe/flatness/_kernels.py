"""Select kernels that are twice differentiable and of full precision, as products with the Hessian need them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from steppe._tensors.graph import NoSecondDerivativeError

# Parts of the messages that torch raises for a derivative that is itself not differentiable.
_MESSAGES = ("derivative for", "double backward", "differentiate twice", "not differentiable twice")

_OR_DIFFERENCES = (
    "; or FiniteDifferenceHessian, whose products have an error. Sharpness, landscapes and gradients need first "
    "derivatives only"
)


class _PlainWeightNorm(TorchFunctionMode):
    """Stands for torch's fused weight norm, whose second derivative takes the norm for a constant."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


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
def twice_differentiable(model: nn.Module, *, instead: str = _OR_DIFFERENCES) -> Iterator[None]:
    """Run the ``with`` block in kernels that have a second derivative, where torch offers a choice.

    Fused attention (flash, memory-efficient, cuDNN), cuDNN's recurrent layers, the fast path of
    ``nn.MultiheadAttention`` and graphs compiled by ``torch.compile`` have no double backward, so the plain kernels
    replace them. They compute the same function with more time and memory. So does a plain ``weight_norm``: the second
    derivative of torch's fused one is wrong. TensorFloat-32 is switched off in convolutions: its three decimal digits
    are too few for the difference of two losses.

    Args:
        model: The model that is run in the block.
        instead: What else to do, the end of the error's message.

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
        stack.enter_context(_PlainWeightNorm())
        if torch.cuda.is_available():
            flags = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic, "allow_tf32": False}
            stack.enter_context(cudnn.flags(enabled=cudnn.enabled and not recurrent, **flags))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        except NoSecondDerivativeError as error:
            raise RuntimeError(f"{error}{instead}") from error
        except RuntimeError as error:
            if not any(part in str(error) for part in _MESSAGES):
                raise
            raise RuntimeError(f"{NoSecondDerivativeError(error)}{instead}") from error
