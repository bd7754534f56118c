"""m-SAM: a perturbation of its own for each micro-batch (m-sharpness)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._engine.losses import backward
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._closures import Loss, count_samples
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.methods.sam import sam, sam_with
from steppe.papers import ICML, Paper, cites
from steppe.sam import SAM

M_SHARPNESS_PAPER = Paper(
    "andriushchenko2022towards",
    ("Maksym Andriushchenko", "Nicolas Flammarion"),
    "Towards Understanding Sharpness-Aware Minimization",
    "2206.06232",
    2022,
    ICML,
)


@cites(M_SHARPNESS_PAPER)
def micro_batches(optimizer: SAM, loss: Loss, batch: Sequence[Tensor], *, m: int) -> Tensor:
    """Take a step in which each micro-batch of m samples has its own perturbation (m-sharpness).

    The update gradient is the mean over the micro-batches B_i of the gradients at w + e(B_i), weighted by their sizes.
    The cost in passes over the samples is that of the optimizer's rules. Unlike a closure, this function takes the
    step itself, because it runs a loop over :meth:`~steppe.SAM.passes` for each micro-batch.

    Each rule gets a micro-batch's own gradient, and what it keeps from step to step is the mean over the micro-batches.
    Random perturbations differ between them. A cadence that decides by the step's number decides the same for all.

    Args:
        optimizer: A :class:`steppe.SAM`. Rules whose memory is no mean (LookSAM, AE-SAM, both SSAM), SAMPa and
            Lookbehind raise an error.
        loss: Function of the tensors of a micro-batch that returns their mean loss.
        batch: Tensors with the samples along their first dimension.
        m: m, the number of samples in a micro-batch; the last one may be smaller.

    Returns:
        The mean loss of the batch at w, a 0-dim tensor.

    Raises:
        TypeError: The batch is no tuple of tensors.
        ValueError: m is less than 1, or the batch is empty or of unequal lengths.
        RuntimeError: The method cannot have a perturbation for each micro-batch.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([0.0, 0.0]))
        >>> optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
        >>> x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
        >>> micro_batches(optimizer, lambda x: (x @ w + (x @ w) ** 2 / 10).mean(), (x,), m=1)
        tensor(0.)

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412,
        section 4.1; Andriushchenko and Flammarion, Towards Understanding Sharpness-Aware Minimization, arXiv
        2206.06232.
    """
    samples = count_samples(batch)
    check_count("m", m, "the number of samples in a micro-batch")
    losses_at_w: list[Tensor] = []
    for start in range(0, samples, m):
        part = [t[start : start + m] for t in batch]
        weight = len(part[0]) / samples
        try:
            for sam_pass in optimizer.passes(accumulate=start > 0, loss_weight=weight):
                with sam_pass, torch.enable_grad():
                    value = weight * loss(*part)
                    backward(value, optimizer.scaler)
                    if sam_pass.is_first:
                        losses_at_w.append(value.detach())
        except BaseException:
            if start > 0:
                optimizer.zero_grad()  # the whole batch is given up, and no step shall begin with a part of it
            raise
    if optimizer.scaler is None:
        optimizer.step()
    else:
        optimizer.scaler.step(optimizer)
    return torch.stack(losses_at_w).sum()


class MicroBatchSAMStep(StepFunction):
    """Takes the steps of a comparison with a perturbation for every m samples."""

    optimizer: SAM

    def __init__(self, optimizer: SAM, m: int = 16) -> None:
        super().__init__(optimizer)
        self.m = m

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step."""
        return micro_batches(self.optimizer, forward, batch.tensors, m=self.m)


CARD = MethodCard(
    name="micro_batch_sam",
    function=micro_batches,
    label="m-SAM",
    paper=M_SHARPNESS_PAPER,
    summary="Compute a perturbation for each micro-batch of m samples. The update gradient is the mean of the "
    "gradients of the micro-batches at their own perturbed weights.",
    equation="e_i = e(B_i)                 in each micro-batch B_i of m samples\n"
    "w <- Base(w, mean over i of the gradients of B_i at w + e_i)",
    cost="2",
    passes=2,
    memory=f"{COPY}, and the sum of the gradients",
    when="For a separate perturbation in each part of a large batch; only one part's activations are in memory.",
    when_not="When only the whole batch keeps the device busy: the passes are over small parts.",
    usual={"m": "unverified"},
    verified="nothing else",
    caveats=(
        "`closures.micro_batches` takes the whole step. BatchNorm normalizes each micro-batch by its own statistics.",
        "The cost is that of the method around which it is used; 2 is SAM's.",
        "SAMPa, Lookbehind, LookSAM, AE-SAM and both SSAM raise an error: what they keep belongs to the whole batch.",
    ),
    build_example=sam_with(micro_batches),
    usage_code="optimizer = steppe.variants.sam(base, model=model)\n"
    "steppe.closures.micro_batches(optimizer, loss, (x, y), m=16)  # takes the step",
    comparison=Comparison(
        summary="SAM with a perturbation for every m samples, at SAM's rho",
        build=sam,
        passes=lambda ascent_steps: 1 + ascent_steps,
        step_function=MicroBatchSAMStep,
    ),
)
