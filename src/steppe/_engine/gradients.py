"""The ``.grad`` fields of an optimizer's parameters: who has one, whose it is, and whether it may go down."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.callers import warn
from steppe._engine.state_dict import parameters
from steppe._tensors.dtensor import all_plain, foreach, reduced
from steppe._tensors.ops import all_finite, copy_, real_views

# Marks, on a gradient, the version at which our last step left it.
_LEFT_AT = "_steppe_left_at"


class Gradients:
    """The gradients of a base optimizer's parameters."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._so_far_finite: Tensor | None = None
        self._was_cleared = False
        self.skipped: Tensor | int = 0
        """Steps skipped because a gradient was not finite; a tensor on an accelerator."""

    def holders(self) -> list[Tensor]:
        """The parameters that have a gradient, each once.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        return self.held()[0]

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient (:meth:`holders`), and their gradients (:meth:`of`)."""
        found = {id(p): (p, gradient) for p in parameters(self._base) if (gradient := p.grad) is not None}
        for p, gradient in found.values():
            if gradient.layout is not torch.strided:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} has a sparse gradient ({gradient.layout}): the climb would "
                    f"have to perturb rows that have none. Use sparse=False (Embedding), or leave this parameter to "
                    f"an optimizer of its own"
                )
        holders = [p for p, _ in found.values()]
        return holders, _real(holders, [gradient for _, gradient in found.values()])

    def of(self, members: Iterable[Tensor]) -> list[Tensor]:
        """Their gradients, as real views; what was still the ranks' summands becomes their sum first."""
        holders = [p for p in members if p.grad is not None]
        return _real(holders, [gradient for p in holders if (gradient := p.grad) is not None])

    def fill(self, members: Iterable[Tensor]) -> None:
        """Give those without a gradient a zero one."""
        for p in members:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def set(self, members: Iterable[Tensor], values: Sequence[Tensor]) -> None:
        """Write values into their gradients, and NaN into one entry of them if an earlier pass was not finite.

        Whoever looks at the gradient next, a loss scaler or :meth:`step_if_finite`, then sees it.
        """
        self.write(self.of(members), values)

    def write(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Do what :meth:`set` does, where the gradients (:meth:`of`) are at hand."""
        changed = [(t, v) for t, v in zip(targets, values, strict=True) if t is not v and not _same(t, v)]
        copy_([t for t, _ in changed], [v for _, v in changed])
        if self._so_far_finite is not None and targets:
            smallest = min(targets, key=Tensor.numel)
            smallest.masked_fill_(self._so_far_finite.logical_not().to(smallest.device), float("nan"))
        self._so_far_finite = None

    def note(self, finite: Tensor, *, further: bool) -> Tensor:
        """Remember whether the gradient that a climb starts with, and those of this step before it, were finite."""
        if further and self._so_far_finite is not None:
            finite = finite & self._so_far_finite
        self._so_far_finite = finite
        return finite

    def copies(self) -> dict[Tensor, Tensor]:
        """A copy of each gradient, by parameter."""
        return {p: p.grad.clone() for p in self.holders() if p.grad is not None}

    @torch.no_grad()
    def add(self, values: dict[Tensor, Tensor]) -> None:
        """Add values to the gradients; where there is none, they become it."""
        both = [(p.grad, v) for p, v in values.items() if p.grad is not None]
        foreach(torch._foreach_add_, [g for g, _ in both], [v for _, v in both])
        self.put({p: v for p, v in values.items() if p.grad is None})

    def put(self, values: dict[Tensor, Tensor]) -> None:
        """Make these tensors themselves the gradients."""
        for p, value in values.items():
            p.grad = value

    # What was accumulated before a closure would be missing in the second pass.

    def accumulated_outside(self) -> dict[Tensor, Tensor]:
        """The gradients that somebody has made since our last step."""
        self._was_cleared = False
        return {
            p: p.grad
            for p in parameters(self._base)
            if p.grad is not None and getattr(p.grad, _LEFT_AT, None) != p.grad._version
        }

    def cleared(self) -> None:
        """Note that the gradients were cleared through the optimizer."""
        self._was_cleared = True

    def refuse_if_kept(self, outside: dict[Tensor, Tensor]) -> None:
        """Refuse a closure that added to gradients made before it.

        Raises:
            RuntimeError: it did.
        """
        if not self._was_cleared and any(p.grad is gradient for p, gradient in outside.items()):
            raise RuntimeError(
                "the closure added to gradients that were accumulated before step(closure): the second pass cannot "
                "repeat those micro-batches, so the step would go down a mixture. Run all micro-batches inside the "
                "closure, or use passes(); if the old gradients are not wanted, call zero_grad() in the closure"
            )

    # Going down.

    def step_if_finite(self) -> bool:
        """Let the base step, unless a gradient is not finite; return whether the host let it.

        On a CPU the host decides. On an accelerator the device does: by ``found_inf`` where the base takes it, else
        by zeroing the gradient.
        """
        _, gradients = self.held()
        finite = all_finite(gradients)
        if finite.device.type == "cpu":
            if not finite:
                self.skipped += 1
                warn(
                    "a step was skipped: its gradient was not finite (NaN or inf) in one of the passes, and would "
                    "have poisoned the weights. Weights and optimizer state are unchanged; skipped_steps counts",
                    RuntimeWarning,
                )
                return False
            self._base.step()
        else:
            self._step_on_device(finite, gradients)
        for p in parameters(self._base):
            if (gradient := p.grad) is not None:
                setattr(gradient, _LEFT_AT, gradient._version)
        return True

    def _step_on_device(self, finite: Tensor, gradients: Sequence[Tensor]) -> None:
        bad = finite.logical_not()
        if isinstance(self.skipped, int):
            self.skipped = torch.full_like(bad, self.skipped, dtype=torch.int64)
        self.skipped += bad
        if not getattr(self._base, "_step_supports_amp_scaling", False):
            for g in gradients:
                g.masked_fill_(bad.to(g.device), 0.0)
            self._base.step()
            return
        self._base.grad_scale, self._base.found_inf = None, bad.float()  # type: ignore[attr-defined]
        try:
            self._base.step()
        finally:
            del self._base.grad_scale, self._base.found_inf  # type: ignore[attr-defined]


def _real(holders: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Real views of ``.grad``, such that to write into them is to write into ``.grad``."""
    if not all_plain(gradients):
        gradients = [reduced(gradient) for gradient in gradients]
        for p, gradient in zip(holders, gradients, strict=True):
            if p.grad is not gradient:
                p.grad = gradient
    return real_views(gradients)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same memory in the same way."""
    one_base = a._base is not None and a._base is b._base
    return one_base and a.shape == b.shape and a.storage_offset() == b.storage_offset()
