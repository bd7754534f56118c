"""MESA: sharpness-aware training by a term in the loss, with averaged weights."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from steppe._checks import check_below_one
from steppe._engine.callers import warn
from steppe._engine.completed_steps import CompletedSteps, with_hooks
from steppe._engine.eager import eager
from steppe._engine.whole_module import whole_module
from steppe.methods._card import Comparison, MethodCard, plain_base
from steppe.methods._step_function import CountedForward, LabeledBatch
from steppe.methods._trajectory import (
    StepWithTerm,
    check_epoch,
    check_hyperparameters,
    kl_divergence,
    zero_term,
)
from steppe.methods.saf import SAF_PAPER
from steppe.papers import Paper
from steppe.rules.ops import as_real, copy_, foreach


class MESA(nn.Module):
    """MESA's trajectory loss: keep the outputs near those of averaged weights.

    v_t = beta v_{t-1} + (1 - beta) w_t after every step, and from epoch E_start on
    L_traj(w) = lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau)).
    A step makes one more forward, without gradients: 4/3 passes. The memory is one copy of weights and buffers.

    The copy is :attr:`ema`, always in eval mode: the statistics of its BatchNorm layers are averages of the model's,
    its dropout is off, and its forward changes neither the model's buffers nor torch's generators.

    Differences from the official code: tau^2 and the first epoch as for :class:`~steppe.SAF`; before E_start there is
    no forward of the average; buffers that are not floating are copied, not averaged and truncated.

    Args:
        model: The model to be trained, not in half precision (1 - beta would round to nothing), on its device. Of a
            ``DistributedDataParallel`` or compiled model, the module inside is used.
        optimizer: The optimizer that trains the model, also a :class:`steppe.SAM`; the average is updated after each
            of its steps, once per step and at w. Without it, call :meth:`update` after every step.
        lmbda: lambda, the weight of the term; the official code's recipe for ImageNet has 0.8, its default is 0.3.
        tau: tau, the temperature; usually 5, which the authors seldom tune.
        beta: beta, the decay of the average over about 1 / (1 - beta) steps; the official code has 0.9998, for
            ImageNet. The initial weights keep the share beta^t, so a shorter training needs a smaller beta, such as
            0.9995 or 0.999.
        start: E_start, the first epoch with the term, counted from 0; usually 5, or 30 % of all epochs.

    Raises:
        ValueError: A hyperparameter is out of range, the model cannot be averaged, or the optimizer has another
            model's parameters; (when called) outputs have another shape.
        TypeError: The optimizer is the base of a SAM, and not the SAM itself; a model of FSDP1.
        RuntimeError: (when called) An epoch passed without a single update, or the model was changed or moved.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mesa = MESA(model, optimizer, start=0, beta=0.5)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> for epoch in range(2):
        ...     logits = model(x)
        ...     term = mesa(logits, x, epoch=epoch)
        ...     (torch.nn.functional.cross_entropy(logits, y) + term).backward()
        ...     optimizer.step()
        >>> bool(term > 0)
        True

    References:
        Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """

    paper: ClassVar[Paper] = SAF_PAPER

    ema: nn.Module
    """The model with the averaged weights v, in eval mode; often more accurate than the trained one."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        lmbda: float = 0.8,
        tau: float = 5.0,
        beta: float = 0.9998,
        start: int = 5,
    ) -> None:
        super().__init__()
        check_hyperparameters(lmbda, tau, start)
        check_below_one("beta", beta, "the share of the old average, which never changes with 1")
        model = whole_module(model)
        _check_model(model)
        self.lmbda, self.tau, self.beta, self.start = lmbda, tau, beta, start
        self.updates = 0
        """The number of steps that were averaged."""
        self._epoch: int | None = None
        self._updates_before, self._warned_initial_weights = 0, False
        self._model = (model,)  # in a tuple: it must not become a submodule, with parameters and state of its own
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.ema.zero_grad(set_to_none=True)
        self._automatic = optimizer is not None
        if optimizer is not None:
            self._follow(optimizer)

    @eager
    def forward(self, logits: Tensor, *inputs: Any, epoch: int, **kwargs: Any) -> Tensor:
        """Return the term for a batch.

        Args:
            logits: f(w, x), of shape (n, classes, ...), as the model returned them.
            *inputs: The positional arguments that the model was called with.
            epoch: The number of the epoch, counted from 0.
            **kwargs: The keyword arguments that the model was called with.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph before E_start.
        """
        check_epoch(epoch)
        if self.training:
            self._check_updates(epoch)
        if epoch < self.start:
            return zero_term(logits)
        if self.start > 0 and not self._warned_initial_weights and (share := self.beta**self.updates) > 0.5:
            self._warned_initial_weights = True
            warn(
                f"after {self.updates} steps, {share:.0%} of MESA's average is still the initial weights, because beta "
                f"= {self.beta}, so the outputs are kept near those of the start. Use a smaller beta, or a later start"
            )
        # forked, so that a model which draws random numbers even in eval mode leaves torch's generators unchanged
        accelerators = [logits.device] if logits.device.type not in ("cpu", "meta", "mps") else []
        kind = accelerators[0].type if accelerators else "cuda"
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=kind):
            average = self.ema(*inputs, **kwargs)
        if not isinstance(average, Tensor) or average.shape != logits.shape or average.dim() < 2:
            returned = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise ValueError(
                f"the model with the averaged weights returned {returned}, and the logits have shape "
                f"{tuple(logits.shape)}: the term compares the two, class by class. Give the inputs that the logits "
                "were computed from, and a model that returns a tensor of shape (n, classes, ...)"
            )
        return self.lmbda * self.tau**2 * kl_divergence(average, logits, self.tau).mean()

    def update(self) -> None:
        """Update the average, v = beta v + (1 - beta) w; to be called after every step, at w.

        Raises:
            RuntimeError: The optimizer already does so, or the model was changed or moved to another device.
        """
        if self._automatic:
            raise RuntimeError(
                "update() was called, but the optimizer already updates the average after each of its steps, so it "
                "would be updated twice per step. Leave this call out, or do not give MESA the optimizer"
            )
        self._update_average()

    @torch.no_grad()
    def _update_average(self) -> None:
        model = self._model[0]
        averages, weights = [*self.ema.parameters(), *self.ema.buffers()], [*model.parameters(), *model.buffers()]
        if [_layout(t) for t in averages] != [_layout(t) for t in weights]:
            raise RuntimeError(
                "the model's weights differ from MESA's average in number, shape, dtype or device: they were changed "
                "or moved after MESA was made. Move both with .to(...), and make MESA when the model is complete"
            )
        averaged = [t.is_floating_point() or t.is_complex() for t in averages]
        pairs = list(zip(averages, weights, averaged, strict=True))
        if any(averaged):
            foreach(
                torch._foreach_lerp_,
                [as_real(v) for v, _, is_averaged in pairs if is_averaged],
                [as_real(w.detach()) for _, w, is_averaged in pairs if is_averaged],
                weight=1 - self.beta,
            )
        if not all(averaged):
            rest = [(v, w) for v, w, is_averaged in pairs if not is_averaged]
            copy_([v for v, _ in rest], [w for _, w in rest])
        self.updates += 1

    def _follow(self, optimizer: Optimizer) -> None:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        if owned.isdisjoint(self._model[0].parameters()):
            raise ValueError(
                "the optimizer holds none of the model's parameters, so the average would be updated at the wrong "
                "times: give the optimizer that trains this model"
            )
        CompletedSteps(with_hooks(optimizer), self._update_average)

    def _check_updates(self, epoch: int) -> None:
        """Raise RuntimeError if update() was forgotten in the epoch before."""
        if self._epoch is not None and epoch > self._epoch and self.updates == self._updates_before:
            raise RuntimeError(
                f"the average was not updated once in epoch {self._epoch}, so the outputs would be kept near those of "
                "the initial weights. Call update() after every step, or give MESA the optimizer"
            )
        if epoch != self._epoch:
            self._epoch, self._updates_before = epoch, self.updates

    def train(self, mode: bool = True) -> "MESA":
        """Set the mode of this module; :attr:`ema` stays in eval mode."""
        super().train(mode)
        self.ema.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the number of updates, as a tensor: checkpoints hold tensors only."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.updates, self._epoch = int(state), None

    def extra_repr(self) -> str:
        """Return the hyperparameters, for ``repr``."""
        return f"lmbda={self.lmbda}, tau={self.tau}, beta={self.beta}, start={self.start}"


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _check_model(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if any(is_lazy(p) for p in parameters):
        raise ValueError(
            "the model has parameters without a shape yet, so there is nothing to average: run one forward before "
            "MESA is made"
        )
    if any(p.dtype.itemsize <= 2 for p in parameters):
        raise ValueError(
            "the model has parameters in half precision, where the small moves of an average are rounded away: keep "
            "them in float32, and run the forward under torch.autocast"
        )


def mesa(model: nn.Module, optimizer: Optimizer | None = None, **kwargs: Any) -> MESA:
    """MESA: a term in the loss that keeps the outputs near those of averaged weights. 4/3 passes per step.

    The term is lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau)), where v is the
    average of w over the steps, v <- beta v + (1 - beta) w.

    This is not an optimizer, but a module whose result the closure adds to the loss; there is no perturbation.

    Args:
        model: The model to be trained.
        optimizer: The optimizer that trains it; the average is updated after each of its steps.
        **kwargs: lmbda, tau, beta and start, as in :class:`steppe.MESA`.

    Raises:
        ValueError: A hyperparameter is out of range, the model cannot be averaged, or the optimizer has another
            model's parameters.

    Example:
        >>> mesa(torch.nn.Linear(2, 3), beta=0.999).updates
        0

    References:
        Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return MESA(model, optimizer, **kwargs)


class MESAStep(StepWithTerm):
    """Takes the steps of MESA in a comparison: adds the divergence from the averaged weights' outputs to the loss."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        lmbda: float = 0.8,
        tau: float = 5.0,
        beta: float = 0.995,
        start: int = 5,
    ) -> None:
        super().__init__(optimizer, mesa(model, optimizer, lmbda=lmbda, tau=tau, beta=beta, start=start))
        self.start = start

    def term(self, forward: CountedForward, logits: Tensor, batch: LabeledBatch) -> Tensor:
        """Return the divergence from the outputs of the averaged weights, whose forward is counted."""
        if batch.epoch >= self.start:
            forward.count(len(batch), recorded=False)
        value: Tensor = self.module(logits, batch.inputs, epoch=batch.epoch)
        return value


def _base_and_term(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return base, mesa(model, base, **arguments)


CARD = MethodCard(
    name="mesa",
    function=mesa,
    label="MESA",
    paper=SAF_PAPER,
    summary="Add a term to the loss that keeps the outputs near those of averaged weights. Unlike SAF, it stores no "
    "outputs of the samples.",
    equation="v <- beta v + (1 - beta) w\n"
    "L + lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau))",
    cost="4/3",
    passes=4 / 3,
    memory="the averaged weights and buffers",
    when="For classification with very many samples or classes; it also yields the averaged model.",
    when_not="For a short training with the default beta: the average is then still the initial weights.",
    usual={
        "lmbda": "0.8 on ImageNet, default 0.3 (official code)",
        "tau": "5",
        "beta": "0.9998 on ImageNet (official code); 0.999 or 0.9995 for a shorter training",
        "start": "5, or 30 % of all epochs",
    },
    verified="official code, read",
    checked="https://github.com/AngusDujw/SAF: tau^2 and the first epoch as for SAF; here the average makes no "
    "forward before E_start, and buffers that are not floating are copied. Of the paper, abstract and introduction "
    "were read.",
    caveats=(
        "Weights in half precision are an error: the small changes of the average would be rounded away.",
        "Its state_dict belongs in your checkpoint.",
    ),
    short_run={"start": 0, "beta": 0.5},
    build_example=_base_and_term,
    arguments_of=(MESA,),
    usage_code="mesa = steppe.variants.mesa(model, base)  # averages after each step of the base\n"
    "loss = F.cross_entropy(logits, y) + mesa(logits, x, epoch=epoch)",
    other_measurements=(
        "[Cosine schedule and momentum](../evidence/family.md), ten seeds: accuracy not distinguishable from "
        "SGD's, calibration error 3.2 smaller. With 40 % wrong labels 9.9 points better, where SAM is 24.9 "
        "better.",
    ),
    comparison=Comparison(
        summary="no perturbation: keeps the outputs near those of averaged weights (beta for short runs: a first "
        "guess, not measured)",
        build=plain_base,
        step_function=MESAStep,
    ),
)
