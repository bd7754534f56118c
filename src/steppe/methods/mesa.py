"""MESA: sharpness-aware training by a term of the loss, with averaged weights."""

import copy
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from steppe._engine.callers import warn
from steppe.methods._card import Comparison, MethodCard, plain_base
from steppe.methods._step_function import Batch, Forward
from steppe.methods._trajectory import WithTerm, check, check_epoch, eager, kl_divergence, zero
from steppe.methods.saf import SAF_PAPER
from steppe.papers import Paper
from steppe.rules.ops import (
    as_real,
    copy_,
    foreach,
)


class MESA(nn.Module):
    """MESA: SAF's trajectory loss with the outputs of averaged weights in place of remembered ones.

    v_t = beta v_{t-1} + (1 - beta) w_t after every step, and from epoch E_start on
    L_traj(w) = lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau)).
    A further forward a step, without gradients: 4/3 passes. The memory is one copy of weights and buffers.

    The copy is :attr:`ema`, always in eval mode: the statistics of its BatchNorm layers are averages of the model's,
    its dropout is off, and its forward touches neither the model's buffers nor torch's generators.

    Args:
        model: the model to be trained, not in half precision (1 - beta would round to nothing), on its device. Of a
            ``DistributedDataParallel`` or compiled model, the module inside is taken.
        optimizer: updates the average after each of its steps, also a :class:`steppe.SAM`, once a step and at w.
            Without it, call :meth:`update` after every step.
        lmbda: lambda, the weight of the term; the official code's recipe for ImageNet has 0.8, its default is 0.3.
        tau: tau, the temperature; 5, which the authors seldom tune.
        beta: beta, the average's memory of about 1 / (1 - beta) steps; 0.9998 is the official code's, for ImageNet. The
            initial weights keep the share beta^t, so a shorter training needs less, such as 0.9995 or 0.999.
        start: E_start, the first epoch with the term, counted from 0: 5, or 30 % of all epochs.

    Raises:
        ValueError: a hyperparameter that makes no sense, a model that cannot be averaged, an optimizer of another one;
            outputs of another shape (when called).
        RuntimeError: (when called) an epoch went by without a single update; the model has changed, or moved to
            another device.

    Differences from the official code: tau^2 and the first epoch as for :class:`SAF`; before E_start the forward of the
    average is not made; buffers that are not floating are copied, not averaged and truncated.

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

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """

    paper: ClassVar[Paper] = SAF_PAPER

    ema: nn.Module
    """The model with the averaged weights v, in eval mode; often the better one to evaluate."""

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
        check(lmbda, tau, start)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be at least 0 and less than 1, got {beta}: with 1 the average never moves")
        model = _bare(model)
        _check_model(model)
        self.lmbda, self.tau, self.beta, self.start = lmbda, tau, beta, start
        self.updates = 0
        """How many steps were averaged."""
        self._epoch: int | None = None
        self._updates_before, self._said_young = 0, False
        self._model = (model,)  # in a tuple: it is no submodule of ours
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.ema.zero_grad(set_to_none=True)
        self._automatic = optimizer is not None
        if optimizer is not None:
            self._follow(optimizer)

    @eager
    def forward(self, logits: Tensor, *inputs: Any, epoch: int, **kwargs: Any) -> Tensor:
        """Return the term for a batch.

        Args:
            logits: f(w, x), of shape (n, classes, ...), as the model has returned them.
            inputs: what the model was called with; ``kwargs`` as well.
            epoch: the number of the epoch, counted from 0.

        Returns:
            A 0-dim tensor, float32 or wider; zero without a graph before E_start.
        """
        check_epoch(epoch)
        if self.training:
            self._watch(epoch)
        if epoch < self.start:
            return zero(logits)
        if self.start > 0 and not self._said_young and (share := self.beta**self.updates) > 0.5:
            self._said_young = True
            warn(
                f"after {self.updates} steps, {share:.0%} of MESA's average is still the initial weights, because beta "
                f"= {self.beta}: the outputs are drawn to those. Take a smaller beta, or a later start"
            )
        accelerators = [logits.device] if logits.device.type not in ("cpu", "meta", "mps") else []
        kind = accelerators[0].type if accelerators else "cuda"
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=kind):
            average = self.ema(*inputs, **kwargs)
        if not isinstance(average, Tensor) or average.shape != logits.shape or average.dim() < 2:
            found = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise ValueError(
                f"the model with the averaged weights returned {found}, and the logits have shape "
                f"{tuple(logits.shape)}: the term compares the two, class by class. Give the inputs that the logits "
                "were made from, and a model that returns a tensor of shape (n, classes, ...)"
            )
        return self.lmbda * self.tau**2 * kl_divergence(average, logits, self.tau).mean()

    def update(self) -> None:
        """Average the weights, v = beta v + (1 - beta) w; to be called after every step, at w.

        Raises:
            RuntimeError: the optimizer does it already; the model has changed, or moved to another device.
        """
        if self._automatic:
            raise RuntimeError(
                "update() was called, and the optimizer calls it after each of its steps: the average would move twice "
                "a step. Leave this call out, or do not give MESA the optimizer"
            )
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        model = self._model[0]
        averages, weights = [*self.ema.parameters(), *self.ema.buffers()], [*model.parameters(), *model.buffers()]
        if [_kind(t) for t in averages] != [_kind(t) for t in weights]:
            raise RuntimeError(
                "the model's weights differ from MESA's average in number, shape, dtype or device: they were changed "
                "or moved after MESA was made. Move both with .to(...), and make MESA when the model is complete"
            )
        moving = [t.is_floating_point() or t.is_complex() for t in averages]
        pairs = list(zip(averages, weights, moving, strict=True))
        if any(moving):
            foreach(
                torch._foreach_lerp_,
                [as_real(v) for v, _, moves in pairs if moves],
                [as_real(w.detach()) for _, w, moves in pairs if moves],
                weight=1 - self.beta,
            )
        if not all(moving):
            copy_([v for v, _, moves in pairs if not moves], [w for _, w, moves in pairs if not moves])
        self.updates += 1

    def _follow(self, optimizer: Optimizer) -> None:
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        if owned.isdisjoint(self._model[0].parameters()):
            raise ValueError(
                "the optimizer holds none of the model's parameters, so its steps are not the model's, and the average "
                "would be taken at the wrong times: give the optimizer that trains this model"
            )
        me = weakref.ref(self)  # a MESA that is given up is not to be updated for ever

        def after_step(*_: Any) -> None:
            if (mesa := me()) is not None:
                mesa._average()

        optimizer.register_step_post_hook(after_step)

    def _watch(self, epoch: int) -> None:
        """Notice a forgotten update()."""
        if self._epoch is not None and epoch > self._epoch and self.updates == self._updates_before:
            raise RuntimeError(
                f"the average was not updated once in epoch {self._epoch}: the outputs would be drawn to weights that "
                "never move. Call update() after every step, or give MESA the optimizer, which then does"
            )
        if epoch != self._epoch:
            self._epoch, self._updates_before = epoch, self.updates

    def train(self, mode: bool = True) -> "MESA":
        """Set the mode of this module; :attr:`ema` stays in eval mode."""
        super().train(mode)
        self.ema.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Return what a checkpoint needs beside the average itself; a tensor, as all that is stored."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` returned."""
        self.updates, self._epoch = int(state), None

    def extra_repr(self) -> str:
        """Say the hyperparameters."""
        return f"lmbda={self.lmbda}, tau={self.tau}, beta={self.beta}, start={self.start}"


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _bare(model: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


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
    """MESA: a term of the loss that keeps the outputs near those of averaged weights. 4/3 passes a step, no climb.

    Not an optimizer but what its closure adds to the loss; the arguments are those of :class:`steppe.MESA`.

    Source: Du et al., Sharpness-Aware Training for Free, arXiv 2205.14083.
    """
    return MESA(model, optimizer, **kwargs)


class AveragedWeights(WithTerm):
    """Stay near the outputs of averaged weights (MESA)."""

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

    def term(self, forward: Forward, logits: Tensor, batch: Batch) -> Tensor:
        """Compare with the average's outputs, for which it makes a pass of its own."""
        if batch.epoch >= self.start:
            forward.count(len(batch), recorded=False)
        value: Tensor = self.module(logits, batch.images, epoch=batch.epoch)
        return value


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return (base, mesa(model, base, **given))


CARD = MethodCard(
    name="mesa",
    function=mesa,
    label="MESA",
    about="It needs no memory of the samples, as SAF does.",
    equation="v <- beta v + (1 - beta) w\n"
    "L + lambda tau^2 / |B| sum_{i in B} KL(softmax(f(v, x_i) / tau) || softmax(f(w, x_i) / tau))",
    cost="4/3",
    passes=4 / 3,
    memory="the averaged weights and buffers",
    when="For classification with very many samples or classes; the averaged model comes with it.",
    when_not="For a short training with the default beta: the average is then still the initial weights.",
    usual={
        "lmbda": "0.8 on ImageNet, default 0.3 (official code)",
        "tau": "5",
        "beta": "0.9998 on ImageNet (official code); 0.999 or 0.9995 for a shorter training",
        "start": "5, or 30 % of all epochs",
    },
    checked="The official code, https://github.com/AngusDujw/SAF, was read. tau^2 and the first epoch as for SAF; "
    "here the average's forward is not made before E_start, and buffers that are not floating are copied. Of the "
    "paper, abstract and introduction were read.",
    caveats=(
        "Weights in half precision are refused: the average's small moves would be rounded away.",
        "Its state_dict belongs into your checkpoint.",
    ),
    make=_made,
    arguments_of=(MESA,),
    use="mesa = steppe.variants.mesa(model, base)  # averages after each step of the base\n"
    "loss = F.cross_entropy(logits, y) + mesa(logits, x, epoch=epoch)",
    comparison=Comparison(
        summary="no climb: stays near the outputs of averaged weights (beta for short runs: a first guess, not measured)",
        build=plain_base,
        step_function=AveragedWeights,
    ),
)
