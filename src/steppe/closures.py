"""Which data climbs: closures for ``optimizer.step`` that show each pass its own part of a batch.

With a loss scaler, make the optimizer with ``scaler=scaler``: these closures scale their losses by it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steppe import papers
from steppe.sam import SAM

Loss = Callable[..., Tensor]


@papers.cites(papers.LM_SAM)
def fraction(optimizer: SAM, loss: Loss, batch: Sequence[Tensor], *, fraction: float = 0.25) -> Callable[[], Tensor]:
    """Climb along the gradient of a fraction of the batch, and go down with that of the whole batch.

    The first ``fraction`` of the samples, rounded up, make the pass at w; the passes at w + e that are only there to
    climb on see them too. With one climb a step costs 1 + fraction passes. A step that does not climb sees the whole
    batch. Shuffle the data: the first samples stand for all of them, also in BatchNorm's running statistics.

    Args:
        optimizer: a :class:`steppe.SAM` with any rules.
        loss: takes the tensors of a batch, and returns their mean loss.
        batch: tensors with the samples along their first dimension.
        fraction: the share of the samples that climb, more than 0 and at most 1.

    Returns:
        The closure for ``optimizer.step``, which gives back the loss at w, of the samples that made that pass.

    Raises:
        ValueError: a fraction out of range, a batch without samples, or of unequal lengths.
        RuntimeError: (when called) the cadence decides by the gradient at w, so nobody knows what that pass is for.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
    >>> def loss(x, y):
    ...     print(len(x), "samples")
    ...     return torch.nn.functional.mse_loss(model(x), y)
    >>> _ = optimizer.step(fraction(optimizer, loss, (x, y), fraction=0.25))
    2 samples
    8 samples

    Source: Bahri et al., Sharpness-Aware Minimization Improves Language Model Generalization, arXiv 2110.08529, who
    train with a quarter of the batch.
    """
    n = math.ceil(_share("fraction", fraction) * _samples(batch))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*(batch if _goes_down(optimizer) else [t[:n] for t in batch]))
        _backward(optimizer, value)
        return value

    return closure


@papers.cites(papers.ESAM)
def selected(optimizer: SAM, losses: Loss, batch: Sequence[Tensor], *, gamma: float = 0.5) -> Callable[[], Tensor]:
    """Go down with the samples whose loss rises most from w to w + e (ESAM's sharpness-sensitive data selection).

    B+ = the ceil(gamma |B|) samples with the largest l(w + e) - l(w). At w + e all samples are evaluated forward
    only, and B+ forward and backward: with a forward as a third of a pass, a step costs 4/3 + gamma passes. With
    SGD's mean loss over B+, the gradient is no estimate of the batch's any more; that is the method.

    The paper's other half, a climb with a random part of the weights, is a perturbation: ``variants.esam`` has both.

    Args:
        optimizer: a :class:`steppe.SAM` that makes two passes a step.
        losses: takes the tensors of a batch, and returns the loss of each sample, of shape (n,).
        batch: tensors with the samples along their first dimension.
        gamma: gamma, the share of the samples that go down; the paper's value.

    Returns:
        The closure for ``optimizer.step``, which gives back the mean loss of the batch at w.

    Raises:
        ValueError: a gamma out of range, a batch without samples or of unequal lengths, losses that are not one a
            sample.

    >>> w = torch.nn.Parameter(torch.tensor(1.0))
    >>> optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> x = torch.tensor([1.0, 5.0, 2.0, -3.0])
    >>> def losses(x):
    ...     print(x.tolist())
    ...     return w * x
    >>> _ = optimizer.step(selected(optimizer, losses, (x,), gamma=0.5))
    [1.0, 5.0, 2.0, -3.0]
    [1.0, 5.0, 2.0, -3.0]
    [5.0, 2.0]

    Source: Du et al., Efficient Sharpness-aware Minimization for Improved Training of Neural Networks, arXiv
    2110.03141.
    """
    samples = _samples(batch)
    kept = math.ceil(_share("gamma", gamma) * samples)
    at_w: list[Tensor] = []

    def evaluate(part: Sequence[Tensor], n: int) -> Tensor:
        values = losses(*part)
        if values.shape != (n,):
            raise ValueError(
                f"losses returned a tensor of shape {tuple(values.shape)} for {n} samples, and the selection needs "
                f'the loss of each: return shape ({n},), for example with reduction="none"'
            )
        return values

    def closure() -> Tensor:
        optimizer.zero_grad()
        if optimizer.walk is None or not optimizer.walk.climbs:
            values = evaluate(batch, samples)
            at_w[:] = [values.detach()]
        elif not at_w:
            raise RuntimeError(
                f"the step's only pass is at w + e, with {optimizer.perturbation}: there are no losses at w to "
                "compare with. Take a perturbation that makes a pass at w"
            )
        else:
            with torch.no_grad():
                rise = evaluate(batch, samples) - at_w[0]
            chosen = rise.topk(kept).indices
            values = evaluate([t[chosen.to(t.device)] for t in batch], kept)
        value = values.mean()
        _backward(optimizer, value)
        return value

    return closure


@papers.cites(papers.M_SHARPNESS)
def micro_batches(optimizer: SAM, loss: Loss, batch: Sequence[Tensor], *, m: int) -> Tensor:
    """Give each micro-batch of m samples its own perturbation (m-sharpness), and take the step.

    What goes down is the mean over the micro-batches B_i of the gradients at w + e(B_i), weighed by their sizes. The
    cost in passes over the samples is the method's own. Unlike a closure, this takes the step itself, because it runs
    a loop over :meth:`~steppe.SAM.passes` for each micro-batch; a cadence that goes by the step's number gives them
    all the same answer.

    Args:
        optimizer: a :class:`steppe.SAM` with any rules.
        loss: takes the tensors of a micro-batch, and returns their mean loss.
        batch: tensors with the samples along their first dimension.
        m: samples in a micro-batch; the last one may be smaller.

    Returns:
        The mean loss of the batch at w.

    >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
    >>> optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
    >>> x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    >>> micro_batches(optimizer, lambda x: (x @ w + (x @ w) ** 2 / 10).mean(), (x,), m=1)
    tensor(0.)

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412,
    section 4.1; Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, arXiv 2206.06232.
    """
    samples = _samples(batch)
    if m < 1:
        raise ValueError(f"m must be 1 or more, got {m}: it is the number of samples in a micro-batch")
    down: dict[Tensor, Tensor] = {}
    at_w: list[Tensor] = []
    for start in range(0, samples, m):
        part = [t[start : start + m] for t in batch]
        weight = len(part[0]) / samples
        for walk in optimizer.passes():
            with walk, torch.enable_grad():
                value = loss(*part)
                _backward(optimizer, value)
                if walk.first:
                    at_w.append(weight * value.detach())
        _add(down, weight, optimizer)
    for p, gradient in down.items():
        p.grad = gradient
    if optimizer.scaler is None:
        optimizer.step()
    else:
        optimizer.scaler.step(optimizer)
    return torch.stack(at_w).sum()


@torch.no_grad()
def _add(down: dict[Tensor, Tensor], weight: float, optimizer: SAM) -> None:
    """Add the weighed gradients to what goes down."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                down[p] = p.grad * weight if p not in down else down[p].add_(p.grad, alpha=weight)


def _backward(optimizer: SAM, value: Tensor) -> None:
    """The backward of a loss, multiplied by the loss scale if the optimizer knows of one."""
    loss = value if optimizer.scaler is None else optimizer.scaler.scale(value)
    loss.backward()  # type: ignore[no-untyped-call]


def _goes_down(optimizer: SAM) -> bool:
    walk = optimizer.walk
    if walk is None:
        return True
    if walk.goes_down is None:
        raise RuntimeError(
            f"{optimizer.cadence} decides by the gradient at w whether to climb, so nobody knows yet whether this pass "
            "will go down, and a part of the batch must not: take a cadence that goes by the step's number"
        )
    return walk.goes_down


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be more than 0 and at most 1, got {value}: it is a share of the samples")
    return value


def _samples(batch: Sequence[Tensor]) -> int:
    lengths = {len(t) for t in batch}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"the tensors of a batch hold one sample in each row, and these have {sorted(lengths)} rows: give at least "
            "one tensor, all of the same length, and at least one sample"
        )
    return lengths.pop()
