"""bSAM: SAM as variational inference, with a Gaussian distribution of the weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._checks import check_nonnegative, check_seed
from steppe._engine.gradients import unless_skipped
from steppe._engine.hints import checked
from steppe._engine.slots import SLOTS
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import as_real, foreach, normal
from steppe.sam import Closure, Params, Pass

BSAM_PAPER = Paper(
    "moellenhoff2023bsam",
    ("Thomas Möllenhoff", "Mohammad Emtiyaz Khan"),
    "{SAM} as an Optimal Relaxation of {Bayes}",
    "2210.01620",
    2023,
    ICLR,
)


@dataclass(frozen=True)
class Natural:
    """Perturb in proportion to the variance: e = rho g / s, without a norm."""

    def __call__(self, point: Point) -> ScaledDirection:
        return ScaledDirection(
            foreach(torch._foreach_div, point.gradients, [state["scale"] for state in point.base_state])
        )


class Posterior(Optimizer):
    """The base optimizer of bSAM: steps the mean w and the scale s of N(w, 1/(N s)).

    It reads g_e from ``.grad``, and |g| of the sampled point from :attr:`sizes`.
    """

    _step_supports_amp_scaling = True  # it accepts found_inf, so that a step is skipped without synchronization
    found_inf: Tensor | None

    def __init__(self, params: Params, **defaults: Any) -> None:
        self.sizes: dict[Tensor, Tensor] = {}
        """|g| by parameter, summed over the micro-batches of a step; |g_e| is used where it is missing."""
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "sizes": self.sizes}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its ``scale`` is the initial scale of all its entries."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        for p in group["params"]:
            real = as_real(p.detach())
            self.state[p] = {"momentum": torch.zeros_like(real), "scale": torch.full_like(real, group["scale"])}

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Update g_m, s and w."""
        if closure is not None:
            raise RuntimeError("the step of bSAM needs the gradients of two passes: give the closure to BSAM.step")
        for group in self.param_groups:
            parameters = [p for p in dict.fromkeys(group["params"]) if p.grad is not None]
            if not parameters:
                continue
            g_e = [as_real(p.grad) for p in parameters if p.grad is not None]
            sizes = [self.sizes[p] if p in self.sizes else g.abs() for p, g in zip(parameters, g_e, strict=True)]
            momentum, scale = ([self.state[p][key] for p in parameters] for key in ("momentum", "scale"))
            weights = [as_real(p) for p in parameters]
            (beta1, beta2), delta = group["betas"], group["weight_decay"]
            # g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)
            target = foreach(torch._foreach_add, g_e, weights, alpha=delta)
            foreach(torch._foreach_lerp_, momentum, unless_skipped(self, target, momentum), weight=1 - beta1)
            # s <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)
            target = foreach(torch._foreach_mul, foreach(torch._foreach_sqrt, scale), sizes)
            foreach(torch._foreach_add_, target, scalar=delta + group["damping"])
            foreach(torch._foreach_lerp_, scale, unless_skipped(self, target, scale), weight=1 - beta2)
            # w <- w - alpha g_m / s
            step = foreach(torch._foreach_div, momentum, scale)
            foreach(torch._foreach_mul_, step, scalar=group["lr"])
            foreach(torch._foreach_sub_, weights, unless_skipped(self, step, [t.new_zeros(()) for t in step]))
        return None


class BSAM(OwnStepMethod):
    """bSAM: the weights are the mean of a Gaussian N(w, 1/(N s)), whose scale s is learned like Adam's.

        g   = gradient at w + n, n ~ N(0, 1 / (N s))
        e   = rho g / s
        g_e = gradient at w + e
        g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)
        s   <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)
        w   <- w - alpha g_m / s

    All operations are elementwise. The method is an optimizer of its own, without a base: the constructor takes the
    parameters. A step has two passes, and the loss that :meth:`step` returns is the one at w + n. The memory is g_m and
    s, of Adam's size, and within a step a copy of w and one of g. The state of a parameter is ``momentum`` (g_m) and
    ``scale`` (s): a sample of the posterior is ``w + torch.randn_like(w) * (n_data * scale) ** -0.5``.

    The noise depends only on ``seed`` and the numbers of the step and the micro-batch; no global generator is used.
    With :func:`steppe.closures.micro_batches`, or ``passes(accumulate=True, loss_weight=...)``, every micro-batch has
    its own noise, its own perturbation rho g_i / s and its part in the mean of |g_i|, as in the authors' experiments,
    which split a batch in 8.

    Args:
        params: Parameters or groups, as ``torch.optim`` takes them; a group may have its own ``lr``, ``sam_rho``,
            ``betas``, ``weight_decay``, ``damping``, ``n_data`` and (as the initial value) ``scale``.
        lr: alpha; 0.5 in the authors' CIFAR examples. It is larger than Adam's because s starts at 1.
        n_data: N, the number of training samples; with data augmentation, the authors multiply it by 4.
        rho: rho; 0.01 in the authors' CIFAR examples, 5e-5 on TinyImageNet. e = rho g / s is not normalized, so the
            loss must be a mean over samples, without a loss scaler.
        betas: beta1 and beta2.
        weight_decay: delta, the precision of the prior divided by N: 40 / N in the authors' CIFAR examples, where N is
            four times the number of images, and 25 / N on TinyImageNet.
        damping: gamma, a floor for s.
        scale: The initial s.
        seed: The seed of the noise; two runs, or two workers, with the same one draw the same noise.
        model: The module that the passes run, as for :class:`steppe.SAM`.
        replay_rng: As for :class:`steppe.SAM`.

    Raises:
        ValueError: A hyperparameter out of range, no parameters.

    The authors' code (JAX) divides the step by s before its update; the paper's algorithm and this one, by s after it.
    There, the second pass starts from the running statistics that the first one left, and its own are kept.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = BSAM([w], lr=0.1, n_data=1000, rho=0.01)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(100):
        ...     loss = optimizer.step(closure)
        >>> bool(w.abs() < 0.1), list(optimizer.state[w])
        (True, ['momentum', 'scale'])

    References:
        Möllenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620.
    """

    paper: ClassVar[Paper] = BSAM_PAPER
    base: Posterior
    seed: int
    hyperparameters: ClassVar[tuple[str, ...]] = ("seed",)
    own_rules: ClassVar[tuple[str, ...]] = SLOTS  # its base steps with all three
    why_no_scaler: ClassVar[str] = (
        "e = rho g / s has no norm to divide the scale by, so that the perturbation is 65536 times too large"
    )
    why_no_first_step: ClassVar[str] = (
        "its first pass is at a sample around w, so that the backward before first_step() would be at the wrong point"
    )

    @partial(checked, owner="BSAM")
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.5,
        *,
        n_data: int,
        rho: float | Tensor = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-4,
        damping: float = 0.1,
        scale: float = 1.0,
        seed: int = 0,
        model: nn.Module | None = None,
        replay_rng: bool = True,
    ) -> None:
        check_seed(seed)
        self.seed = seed
        own = {"lr": lr, "n_data": n_data, "betas": betas, "weight_decay": weight_decay, "damping": damping}
        base = Posterior(params, scale=scale, **own)
        super().__init__(base, rho, perturbation=Natural(), model=model, replay_rng=replay_rng)

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the two passes of a step: at a sample w + n, and at w + e.

        Args:
            accumulate: Add g_e to the earlier ``.grad``, and |g| to that of the earlier micro-batches of the step.
        """
        sizes = self.base.sizes
        if not self.micro_batch:
            sizes.clear()
        yield self.displaced_pass(self._displace_to_sample, is_last=False)
        point = self.point()
        parameters, g = point.parameters, [t.detach().abs() for t in point.gradients]
        sam_pass = self.perturbed_pass(point)
        del point  # else the first gradient stays in memory through the second pass
        yield sam_pass
        self.gradients.fill_missing(parameters)
        self.combine()
        sizes.update({p: sizes[p] + size if p in sizes else size for p, size in zip(parameters, g, strict=True)})
        self.gradients.accumulate(self.gradients.before_loop or {})

    def step_base(self) -> bool:
        """Step mean and scale, and clear |g|."""
        try:
            return self.step_base_once()
        finally:
            self.base.sizes.clear()

    @torch.no_grad()
    def _displace_to_sample(self) -> None:
        parameters = self.trained_parameters()
        scales = [self.state[p]["scale"] for p in parameters]
        drawn = normal(f"BSAM/{self.micro_batch}", self.seed, self.steps_taken, scales)
        noise = dict(zip(parameters, drawn, strict=True))
        for group in self.param_groups:
            around = [p for p in group["params"] if p in noise]
            if around:
                widths = foreach(torch._foreach_sqrt, [self.state[p]["scale"] * group["n_data"] for p in around])
                one = torch.ones((), device=around[0].device)
                self.displace(around, one, foreach(torch._foreach_div, [noise[p] for p in around], widths))


def _check(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, wrong, why in (
        ("n_data", not 1 <= group["n_data"] < math.inf, "it is the number of training samples"),
        ("betas", not (0 <= beta1 < 1 and 0 <= beta2 < 1), "each is at least 0 and below 1"),
        ("weight_decay", not 0 <= group["weight_decay"] < math.inf, "it is the prior's precision divided by n_data"),
        ("damping", not 0 <= group["damping"] < math.inf, "it is added to the scale"),
        ("scale", not 0 < group["scale"] < math.inf, "the variance is 1 / (n_data scale)"),
    ):
        if wrong:
            raise ValueError(f"{name} is out of range, got {group[name]}: {why}")
    if not isinstance(group["lr"], Tensor):
        check_nonnegative("lr", group["lr"], "the length of a step")


def bsam(
    params: Any, lr: Rho = 0.5, rho: Rho = 0.01, *, n_data: int, model: nn.Module | None = None, **kwargs: Any
) -> BSAM:
    """bSAM: SAM as variational inference, with a mean and a variance for each weight. Two passes per step.

    w <- w - lr g_m / s, with g_m the mean of g_e + delta w, g_e the gradient at w + rho g / s, g that at a draw from
    N(w, 1 / (n_data s)), and s the mean of sqrt(s) |g| + delta + gamma.

    This is an optimizer of its own: it has no base, and takes the parameters.

    Args:
        params: The parameters, or groups of them.
        lr: The learning rate; 0.5 in the authors' CIFAR examples.
        rho: rho, the factor of g / s, which is not normalized; 0.01 in the authors' CIFAR examples.
        n_data: N, the number of training samples; with augmentation, the authors multiply it by 4.
        model: The module that the passes run, as in :class:`steppe.SAM`.
        **kwargs: The further arguments of ``steppe.methods.bsam.BSAM``.

    Raises:
        ValueError: A hyperparameter is out of range.

    Example:
        >>> bsam([torch.nn.Parameter(torch.zeros(2))], n_data=100).param_groups[0]["lr"]
        0.5

    References:
        Möllenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620.
    """
    return BSAM(params, lr, rho=rho, n_data=n_data, model=model, **kwargs)


def _own_optimizer(base: Optimizer, model: nn.Module, **arguments: Any) -> tuple[Any, ...]:
    return (bsam(model.parameters(), model=model, **arguments),)


def _replace_base(
    base: Optimizer, *, rho: float, model: nn.Module, samples: int, seed: int, lr: float = 0.5
) -> Optimizer:
    parameters = [p for group in base.param_groups for p in group["params"]]
    return bsam(parameters, lr, rho, n_data=samples, model=model, seed=seed)


CARD = MethodCard(
    name="bsam",
    function=bsam,
    label="bSAM",
    paper=BSAM_PAPER,
    summary="Train the mean and the scale of a Gaussian around the weights, with SAM as variational inference. It is "
    "an optimizer of its own, and its scale s gives a posterior to sample from.",
    equation="g = gradient at w + n,  n ~ N(0, 1 / (N s));   e = rho g / s;   g_e = gradient at w + e\n"
    "g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)\n"
    "s   <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)\n"
    "w   <- w - lr g_m / s",
    cost="2",
    passes=2,
    memory="g_m and s, as many numbers as Adam keeps; a copy of the weights; within a step, g",
    when="When the uncertainty of the weights is needed too.",
    when_not="Around a base optimizer: bSAM has none. With a loss scaler, or a loss that is not a mean over samples.",
    usual={
        "lr": "0.5 in the authors' CIFAR examples",
        "rho": "0.01 in the authors' CIFAR examples, 5e-5 on TinyImageNet",
        "n_data": "training samples; with augmentation, the authors multiply by 4",
        "betas": "0.9 and 0.999 in the authors' examples",
        "weight_decay": "40 / N in their CIFAR examples (N with the factor 4), 25 / N on TinyImageNet",
        "damping": "0.1 (official code)",
        "scale": "unverified",
    },
    verified="official code, read",
    checked="https://github.com/team-approx-bayes/bayesian-sam (JAX): it updates w with the scale before its own "
    "update, where the paper's algorithm and this one use the scale after it, and keeps the running statistics of the "
    "second pass.",
    caveats=(
        "rho multiplies g / s without a norm: it cannot be compared with SAM's.",
        "The loss that a step returns is that at w + n.",
    ),
    required={"n_data": 60_000},
    build_example=_own_optimizer,
    arguments_of=(BSAM,),
    usage_code="optimizer = steppe.variants.bsam(model.parameters(), n_data=60_000, model=model)",
    comparison=Comparison(
        summary=f"SAM as variational inference: its own optimizer, at its own lr and at rho / 5 ({USUAL_RATIO})",
        build=_replace_base,
        rho_factor=0.2,
    ),
)
