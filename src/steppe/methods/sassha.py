"""SASSHA: SAM's gradient, divided by the root of the size of the Hessian's diagonal at w + e."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from steppe._checks import check_below_one, check_count, check_nonnegative, check_positive, check_seed
from steppe._engine.distributed import average_over_
from steppe._engine.gradients import skip_unless, unless_skipped
from steppe._engine.hints import checked
from steppe._tensors.dtensor import sharded_part
from steppe._tensors.graph import check_twice_differentiable
from steppe._tensors.random import integers
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import COPY, USUAL_RATIO, Comparison, MethodCard
from steppe.methods._closures import one_number
from steppe.methods._options import Rho
from steppe.methods._step_function import CountedForward, LabeledBatch, StepFunction
from steppe.papers import ICML, Paper, cites
from steppe.rules.ops import all_finite, as_real, copy_, is_sharded
from steppe.sam import Closure, Params, Pass

SASSHA_PAPER = Paper(
    "shin2025sassha",
    ("Dahun Shin", "Dongyeop Lee", "Jinseok Chung", "Namhoon Lee"),
    "{SASSHA}: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation",
    "2502.18153",
    2025,
    ICML,
)


class Preconditioned(Optimizer):
    """The base optimizer of SASSHA: w <- (1 - lr weight_decay) w - lr m / (sqrt(D) + eps).

    It reads g_s from ``.grad``, and the estimates of the Hessian's diagonal from :attr:`estimates`.
    """

    _step_supports_amp_scaling = True  # it accepts found_inf, so that a step is skipped without synchronization
    found_inf: Tensor | None

    def __init__(self, params: Params, **defaults: Any) -> None:
        self.estimates: dict[Tensor, Tensor] = {}
        """z (H z) for the step that is being taken; without an entry, D of the parameter remains as it is."""
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "estimates": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            real = as_real(p.detach())
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "momentum": torch.zeros_like(real),
                "hessian": torch.zeros_like(real),
                "correction": real.new_zeros(()),
            }

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update m, D and w."""
        if closure is not None:
            raise RuntimeError("the step of SASSHA needs the gradients of two passes: give the closure to SASSHA.step")
        for group in self.param_groups:
            for p in dict.fromkeys(group["params"]):
                if p.grad is not None:
                    self._update(group, p, as_real(p.grad))
        return None

    def _update(self, group: dict[str, Any], p: Tensor, g_s: Tensor) -> None:
        state, w, (beta1, beta2) = self.state[p], as_real(p), group["betas"]
        if state["step"].device != p.device:  # torch moves all entries of a loaded state but this one
            state["step"] = state["step"].to(p.device)
        # entries of half precision would round the number of the step and 1 - beta^t
        exact = torch.promote_types(w.dtype, torch.float32)
        t = state["step"].to(exact) + 1
        m = state["momentum"].lerp(g_s, 1 - beta1)
        hessian, correction = state["hessian"], state["correction"]
        if p in self.estimates:
            hessian = hessian.lerp(self.estimates[p].abs(), 1 - beta2)
            correction = _one_minus_power(beta2, t).to(correction.dtype)
        direction = m / _one_minus_power(beta1, t) / ((hessian / correction).sqrt() + group["eps"])
        direction.masked_fill_(correction == 0, 0.0)  # no estimate yet: the weights wait for the first one
        new = (w * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction).to(w.dtype)
        old = [state["step"], state["momentum"], state["hessian"], state["correction"], w]
        copy_(old, unless_skipped(self, [t.to(state["step"].dtype), m, hessian, correction, new], old))


def _one_minus_power(beta: float, t: Tensor) -> Tensor:
    """Return 1 - beta^t, without the cancellation for beta near 1."""
    return -torch.expm1(t * (math.log(beta) if beta else -math.inf))


class SASSHA(OwnStepMethod):
    """SASSHA: SAM's gradient, divided by the root of the size of the Hessian's diagonal at w + e.

        e   = rho g / |g|
        g_s = gradient at w + e
        m   <- beta1 m + (1 - beta1) g_s
        D   <- beta2 D + (1 - beta2) |z (H z)|          at every ``interval``-th step, H the Hessian at w + e
        w   <- (1 - lr weight_decay) w - lr m' / (sqrt(D') + eps)

    z has random signs, and the mean of z (H z) is the diagonal of H (Hutchinson). m' = m / (1 - beta1^t) and D' = D /
    (1 - beta2^t), where t is the number of the step, for D' that of the last estimate. The method is an optimizer of
    its own, without a base: the constructor takes the parameters. A step has two passes. The memory is m and D, of
    Adam's size, and within a step a copy of w. The state of a parameter is ``momentum`` (m), ``hessian`` (D),
    ``correction`` (1 - beta2^t of the last estimate) and ``step`` (t).

    The estimate needs second derivatives, which an ordinary backward cannot make: give the loss to
    :func:`steppe.closures.hessian_diagonal`, and use what it returns in every step. A step whose gradient or estimate
    is not finite is skipped; on an accelerator the next estimate is then that of the next ``interval``-th step. A
    parameter that has no estimate yet only decays.

    z depends only on ``seed`` and the number of the step; no global generator is used. With
    ``DistributedDataParallel``, H is that of the samples of all ranks.

    Args:
        params: Parameters or groups, as ``torch.optim`` takes them; a group may have its own ``lr``, ``sam_rho``,
            ``betas``, ``eps`` and ``weight_decay``.
        lr: The learning rate; 0.15 in the authors' code, 0.3 for their ResNet-50 and 0.6 for their ViT on ImageNet.
        rho: rho; 0.2 in most of the authors' experiments on images.
        betas: beta1 and beta2.
        eps: eps, added to the root of D'; more than 0. 1e-4 in the authors' code, 1e-6 in some of their experiments.
        weight_decay: The decay per step, divided by lr. The authors give it the weight decay of SGD divided by lr.
        interval: The number of steps from one estimate to the next; the first step makes one.
        seed: The seed of z; all workers of a training need the same one.
        model: The module that the passes run, as for :class:`steppe.SAM`.
        replay_rng: As for :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter out of range, no parameters.
        RuntimeError: (in a step) No estimate was made where one is due, or not for all parameters that have a
            gradient; sharded parameters; several processes without a ``DistributedDataParallel`` module in ``model``.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = SASSHA([w], lr=0.1, rho=0.01, eps=1e-6)
        >>> loss = hessian_diagonal(optimizer, lambda: 0.5 * w[0] ** 2 + 50.0 * w[1] ** 2)
        >>> for _ in range(50):
        ...     value = optimizer.step(lambda: (optimizer.zero_grad(), loss())[1])
        >>> bool(value < 1e-2), list(optimizer.state[w])
        (True, ['step', 'momentum', 'hessian', 'correction'])

    References:
        Shin et al., SASSHA: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation,
        arXiv 2502.18153.
    """

    paper: ClassVar[Paper] = SASSHA_PAPER
    base: Preconditioned
    interval: int
    seed: int
    hyperparameters: ClassVar[tuple[str, ...]] = ("interval", "seed")
    own_rules: ClassVar[tuple[str, ...]] = ("combination", "cadence")  # its base steps with g_s and H of one point
    why_no_scaler: ClassVar[str] = (
        "the estimate z (H z) is that of the loss times the scale, and float16 has no range for second derivatives"
    )
    why_no_first_step: ClassVar[str] = (
        "its estimate of the Hessian is made in the last of its passes, and first_step() runs none"
    )

    @partial(checked, owner="SASSHA")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.15,
        *,
        rho: float | Tensor = 0.2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        interval: int = 10,
        seed: int = 0,
        model: nn.Module | None = None,
        replay_rng: bool = True,
    ) -> None:
        check_count("interval", interval, "the number of steps from one estimate of the Hessian to the next")
        check_seed(seed)
        self.interval, self.seed = interval, seed
        base = Preconditioned(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(base, rho, model=model, replay_rng=replay_rng)

    def reset(self) -> None:
        """Discard the estimate of a step."""
        self._pending: dict[Tensor, Tensor] = {}
        """z (H z) by parameter, summed over the losses of a step; of complex parameters, as real tensors."""
        self._latest: dict[Tensor, Tensor] = {}
        """That of the running loop over passes(); it counts when the loop has ended."""

    @property
    def estimates_next(self) -> bool:
        """True if this step, or between two steps the next one, estimates the Hessian."""
        return self.steps_taken % self.interval == 0

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield SAM's two passes.

        Args:
            accumulate: Add g_s to the earlier ``.grad``, and z (H z) to that of the earlier micro-batches of the step.

        Raises:
            RuntimeError: Parameters have a gradient that the estimate does not cover.
        """
        if not self.micro_batch:
            self._pending.clear()
        self._latest = {}
        for sam_pass in self.sam_passes(accumulate=accumulate):
            yield sam_pass
            if sam_pass.is_last:
                self._check_complete()
        latest, self._latest = self._latest, {}
        self._pending.update({p: self._pending[p] + z if p in self._pending else z for p, z in latest.items()})

    def step_base(self) -> bool:
        """Update m, D and w, and clear the estimate.

        Raises:
            RuntimeError: No estimate was made where one is due, or the ranks would have different ones.
        """
        try:
            self.base.estimates = self._estimates()
            return self.step_base_once()
        finally:
            self.base.estimates = {}
            self._pending.clear()

    def observe(self, loss: Tensor) -> None:
        """Estimate the Hessian of a loss before its backward; for :func:`steppe.closures.hessian_diagonal`.

        Only in the last pass of a step that estimates. The estimate counts once the backward of the loss is run, and
        with the factor that this backward gives the loss (the share of a micro-batch).

        Raises:
            RuntimeError: Sharded parameters, or an operation without a (right) second derivative.
        """
        sam_pass = self.current_pass
        if sam_pass is None or not sam_pass.is_last or not self.estimates_next:
            return
        if loss.requires_grad and torch.is_grad_enabled():
            register: Any = loss.register_hook
            register(partial(_add, self._latest, self._products(loss)))

    def _products(self, loss: Tensor) -> dict[Tensor, Tensor]:
        """Return z (H z) of a loss, by the parameters on which it depends."""
        parameters, model = self.trained_parameters(), self.model
        if any(map(is_sharded, parameters)) or (model is not None and sharded_part(model) is not None):
            self.refuse(
                "an estimate of the Hessian",
                "it takes derivatives with respect to whole weights, and some of these are sharded. Use "
                "DistributedDataParallel, or another method",
            )
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        check_twice_differentiable(gradients)
        used = [
            (p, g, z) for p, g, z in zip(parameters, gradients, self._signs(parameters), strict=True) if g is not None
        ]
        curved = [(g, z) for _, g, z in used if g.requires_grad]
        inputs = [p for p, _, _ in used]
        products: tuple[Tensor | None, ...] = (None,) * len(used)
        if curved:
            outputs, along = [g for g, _ in curved], [z for _, z in curved]
            # the loss keeps its graph for the backward that fills .grad
            products = torch.autograd.grad(outputs, inputs, along, retain_graph=True, allow_unused=True)
        return {
            p: torch.zeros_like(as_real(z)) if product is None else as_real(z) * as_real(product.detach())
            for (p, _, z), product in zip(used, products, strict=True)
        }

    def _signs(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return z, tensors of random signs; of a complex number, one for the real and one for the imaginary part."""
        real = [as_real(p.detach()) for p in parameters]
        drawn = integers("SASSHA", self.seed, self.steps_taken, real, below=2)
        signs = [(2 * n - 1).to(t.dtype) for n, t in zip(drawn, real, strict=True)]
        return [torch.view_as_complex(z) if p.is_complex() else z for z, p in zip(signs, parameters, strict=True)]

    def _estimates(self) -> dict[Tensor, Tensor]:
        """Return the estimate of this step, the same on all ranks; empty if none is due."""
        pending = self._pending
        if not pending:
            if self.estimates_next and self.gradients.any():
                self.refuse(
                    "a step without an estimate of the Hessian",
                    f"the first of every {self.interval} steps makes one, and the backward of a plain loss cannot. "
                    "Make criterion = steppe.closures.hessian_diagonal(optimizer, loss) once, and run the backward of "
                    "criterion(...) in every pass",
                )
            return {}
        if group := self._process_group():
            for p in self.trained_parameters():  # a rank may leave some out, and the others would wait for it
                pending.setdefault(p, torch.zeros_like(as_real(p.detach())))
            average_over_([pending[p] for p in self.trained_parameters()], group)
        skip_unless(all_finite(list(pending.values())), self.gradients.parameters_and_gradients()[1])
        return dict(pending)

    def _check_complete(self) -> None:
        """Refuse gradients of the last pass without an estimate: their parameters would never move."""
        if not self._latest:
            return  # none is due, or there is an error in step_base()
        replica = self._replica()
        if replica is not None and replica.find_unused_parameters:
            return  # .grad may be that of other ranks
        missing = [p for p in self.trained_parameters() if p.grad is not None and p not in self._latest]
        if missing:
            self.refuse(
                f"{len(missing)} parameters with a gradient and without an estimate of the Hessian",
                "the loss that was given to closures.hessian_diagonal does not depend on them, as far as its graph "
                "shows, and they would only decay. Give it the whole loss, with all of its terms; activation "
                "checkpointing needs use_reentrant=False",
            )

    def _replica(self) -> DistributedDataParallel | None:
        modules = () if self.model is None else self.model.modules()
        return next((module for module in modules if isinstance(module, DistributedDataParallel)), None)

    def _process_group(self) -> "dist.ProcessGroup | None":
        """Return the processes that train the model together; None for one process."""
        if (replica := self._replica()) is not None:
            group: dist.ProcessGroup = replica.process_group
            return group
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.refuse(
                f"{dist.get_world_size()} processes without a DistributedDataParallel module",
                "each process would divide by the Hessian of its own samples, and the weights of the processes would "
                "drift apart. Give model= the DistributedDataParallel module that the passes run",
            )
        return None


@torch.no_grad()
def _add(estimate: dict[Tensor, Tensor], products: dict[Tensor, Tensor], factor: Tensor) -> None:
    """Add the products of a loss, times the derivative of what is minimized with respect to this loss."""
    for p, product in products.items():
        weighted = (product * factor.reshape(()).to(product)).contiguous()
        estimate[p] = estimate[p] + weighted if p in estimate else weighted


@cites(SASSHA_PAPER)
def hessian_diagonal(optimizer: SASSHA, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss that also estimates the diagonal of its Hessian at w + e, for SASSHA.

    z (H z), with random signs z and H z the derivative of z'g. Use the returned loss in place of ``loss`` in the
    closure, or in a loop over :meth:`~steppe.SAM.passes`, in every step. Its value and its gradient are those of
    ``loss``. In the last pass of a step that estimates, it takes the gradient once more, with a graph, and a product
    with the Hessian, together about three gradients; in all other passes it does nothing. No further forward is run, so
    that BatchNorm and random generators are as without it, and ``.grad`` is filled by your own backward.

    Several micro-batches inside each pass work: the estimate is that of their sum, with the factors of their losses.
    Terms that are added to the result are not in it. Activation checkpointing needs ``use_reentrant=False``; a model
    that ``torch.compile`` has compiled has no second derivatives.

    Args:
        optimizer: The optimizer that :func:`~steppe.variants.sassha` returns.
        loss: Function of any arguments that returns the mean loss, without a backward.

    Returns:
        A function of the same arguments, which returns the loss for the backward.

    Raises:
        TypeError: The optimizer is another one, which would not use the estimate.
        ValueError: (when called) The loss is not one number.
        RuntimeError: (when called) Sharded parameters.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = sassha(model.parameters(), model=model)
        >>> criterion = hessian_diagonal(optimizer, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(8, 2), torch.randint(3, (8,))
        >>> loss_at_w = optimizer.step(lambda: criterion(model(x), y))

    References:
        Shin et al., SASSHA: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation,
        arXiv 2502.18153.
    """
    if not isinstance(optimizer, SASSHA):
        raise TypeError(
            f"hessian_diagonal needs an optimizer of steppe.variants.sassha, got {type(optimizer).__name__}: it would "
            "not use the estimate"
        )

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        value = one_number(loss(*args, **kwargs))
        optimizer.observe(value)
        return value

    return observed


def _check(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    check_below_one("betas[0]", beta1, "beta1, the share of the mean of gradients that a step keeps")
    check_below_one("betas[1]", beta2, "beta2, the share of the mean of Hessians that an estimate keeps")
    check_positive("eps", group["eps"], "added to the root of the Hessian, which may be 0")
    check_nonnegative("weight_decay", group["weight_decay"], "the decay of the weights per step, divided by lr")
    if not isinstance(group["lr"], Tensor):
        check_nonnegative("lr", group["lr"], "the length of a step")


def sassha(params: Any, lr: Rho = 0.15, rho: Rho = 0.2, *, model: nn.Module | None = None, **kwargs: Any) -> SASSHA:
    """SASSHA: SAM's gradient, divided by the root of the size of the Hessian's diagonal. Two passes per step.

    w <- (1 - lr weight_decay) w - lr m / (sqrt(D) + eps), e = rho g / |g|, m a mean of the gradients at w + e, and D
    one of |diagonal of the Hessian there|.

    This is an optimizer of its own: it has no base, and takes the parameters. The closure needs the loss that
    :func:`steppe.closures.hessian_diagonal` returns.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate; 0.15 in the authors' code.
        rho: rho; 0.2 in most of the authors' experiments on images.
        model: The module that the passes run, as in :class:`steppe.SAM`.
        **kwargs: The further arguments of ``steppe.methods.sassha.SASSHA``.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> sassha([torch.nn.Parameter(torch.zeros(2))], interval=5).interval
        5

    References:
        Shin et al., SASSHA: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation,
        arXiv 2502.18153.
    """
    return SASSHA(params, lr, rho=rho, model=model, **kwargs)


_PER_ESTIMATE = 3
"""Gradients that an estimate costs: one more backward with a graph, and a product with the Hessian, as two."""


class SASSHAStep(StepFunction):
    """Takes the steps of SASSHA in a comparison, and counts the cost of its estimates."""

    optimizer: SASSHA

    def step(self, forward: CountedForward, batch: LabeledBatch) -> Tensor:
        """Take one step."""
        forward.wrap_loss(partial(hessian_diagonal, self.optimizer))
        if self.optimizer.estimates_next:
            forward.count(_PER_ESTIMATE * len(batch), recorded=True)
        return super().step(forward, batch)


def _own_optimizer(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return sassha(model.parameters(), model=model, **arguments), hessian_diagonal


def _replace_base(
    base: Optimizer,
    *,
    rho: float,
    model: nn.Module,
    seed: int,
    lr: float = 0.15,
    eps: float = 1e-4,
    weight_decay: float = 0.0,
    interval: int = 10,
) -> Optimizer:
    parameters = [p for group in base.param_groups for p in group["params"]]
    options = {"eps": eps, "weight_decay": weight_decay, "interval": interval}
    return sassha(parameters, lr, rho, model=model, seed=seed, **options)


CARD = MethodCard(
    name="sassha",
    function=sassha,
    label="SASSHA",
    paper=SASSHA_PAPER,
    summary="Divide the mean of SAM's gradients by the root of the size of the Hessian's diagonal at w + e, which is "
    "estimated at every tenth step. It is an optimizer of its own.",
    equation="e = rho g / |g|;   g_s = gradient at w + e;   m <- beta1 m + (1 - beta1) g_s\n"
    "D <- beta2 D + (1 - beta2) |z (H z)|   at every interval-th step; H at w + e, z random signs\n"
    "w <- (1 - lr weight_decay) w - lr m' / (sqrt(D') + eps)\n"
    "m' = m / (1 - beta1^t),   D' = D / (1 - beta2^t) with t of the last estimate",
    cost="2",
    passes=2,
    memory=f"m and D; {COPY}; in an estimate, the graph of g_s",
    when="To measure what the curvature adds to SAM, beside SAM around AdamW.",
    when_not="With operations without second derivatives (`torch.compile`), shards or a loss scaler.",
    usual={
        "lr": "0.15 in the official code, 0.3 for its ResNet-50 and 0.6 for its ViT on ImageNet",
        "rho": "0.2 on images, 0.25 for ViT, 0.01 for fine-tuning a language model (official scripts)",
        "betas": "0.9 and 0.999 (official code)",
        "eps": "1e-4 (official code), 1e-6 in some of its scripts",
        "weight_decay": "5e-4 / lr for its ResNet on CIFAR-10, 2e-4 / lr for its ViT",
        "interval": "10 (official code), 1 in its fine-tuning",
    },
    verified="official code, read",
    checked="https://github.com/LOG-postech/Sassha: 20 steps agree if the graph holds copies of the weights. If not, "
    "as in networks, it restores `.data` before the estimate, which is 3 to 5 % off (three small ones, rho = 0.2). Of "
    "the paper, texts that repeat its equations were read. M-SASSHA, several z, other exponents are not offered.",
    caveats=(
        "A step that estimates is an error without `closures.hessian_diagonal`, and costs three gradients more.",
        "For thousands of steps, D' is far below the mean of the estimates: t counts steps, as in the official code.",
        "m and D have the dtype of the weights. In bfloat16, D hardly moves with beta2 = 0.999: keep float32 weights.",
    ),
    short_run={"interval": 2},
    build_example=_own_optimizer,
    arguments_of=(SASSHA,),
    usage_code="optimizer = steppe.variants.sassha(model.parameters(), model=model)\n"
    "criterion = steppe.closures.hessian_diagonal(optimizer, F.cross_entropy)\n"
    "optimizer.step(lambda: criterion(model(x), y))",
    comparison=Comparison(
        summary="divides SAM's gradient by the root of the Hessian's diagonal: its own optimizer, at its own lr and at "
        f"4 times SAM's rho ({USUAL_RATIO})",
        build=_replace_base,
        passes=lambda interval: 2 + _PER_ESTIMATE / interval,
        step_function=SASSHAStep,
        rho_factor=4.0,
    ),
)
