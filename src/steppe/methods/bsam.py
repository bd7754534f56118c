"""bSAM: SAM as variational inference, with a Gaussian around the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._engine.state_dict import parameters
from steppe._tensors.random import normal
from steppe.methods._base import Method, PassAtPoint
from steppe.methods._card import USUAL_RATIO, Comparison, MethodCard
from steppe.methods._options import Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import as_real, foreach
from steppe.sam import SAM, Closure, Params, Pass, Stage

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
    """Climb in proportion to the variance: e = rho g / s, and no norm."""

    def __call__(self, point: Point) -> ScaledDirection:
        """Return the climb from w."""
        return ScaledDirection(
            foreach(torch._foreach_div, point.gradients, [state["scale"] for state in point.base_state])
        )


@dataclass(frozen=True)
class Curved:
    """Go down with g_e, and keep |g| of the sampled point for the scale."""

    needs_unperturbed_gradient: ClassVar[bool] = True

    sizes: dict[Tensor, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """|g| by parameter, summed over the passes that accumulate."""

    def __call__(self, point: Point, perturbed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """Return g_e."""
        for p, g in zip(point.parameters, point.gradients, strict=True):
            self.sizes[p] = self.sizes[p] + g.abs() if p in self.sizes else g.abs()
        return point.gradients if perturbed is None else perturbed


class Posterior(Optimizer):
    """The step of bSAM: the mean w and the scale s of N(w, 1/(N s)), from g_e in ``.grad`` and |g| in ``sizes``."""

    _step_supports_amp_scaling = True
    found_inf: Tensor | None

    def __init__(self, params: Params, sizes: dict[Tensor, Tensor], **defaults: Any) -> None:
        self.sizes = sizes
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "sizes": self.sizes}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose scale is its ``scale`` everywhere at first."""
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
            raise RuntimeError("bSAM steps with two gradients: give the closure to BSAM.step")
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            members = [p for p in dict.fromkeys(group["params"]) if p.grad is not None]
            if not members:
                continue
            g_e = [as_real(p.grad) for p in members if p.grad is not None]
            sizes = [self.sizes[p] if p in self.sizes else g.abs() for p, g in zip(members, g_e, strict=True)]
            momentum, scale = ([self.state[p][key] for p in members] for key in ("momentum", "scale"))
            weights = [as_real(p) for p in members]
            (beta1, beta2), delta = group["betas"], group["weight_decay"]
            # g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)
            to = foreach(torch._foreach_add, g_e, weights, alpha=delta)
            foreach(torch._foreach_lerp_, momentum, _unless(bad, to, momentum), weight=1 - beta1)
            # s <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)
            to = foreach(torch._foreach_mul, foreach(torch._foreach_sqrt, scale), sizes)
            foreach(torch._foreach_add_, to, scalar=delta + group["damping"])
            foreach(torch._foreach_lerp_, scale, _unless(bad, to, scale), weight=1 - beta2)
            # w <- w - alpha g_m / s
            step = foreach(torch._foreach_div, momentum, scale)
            foreach(torch._foreach_mul_, step, scalar=group["lr"])
            foreach(torch._foreach_sub_, weights, _unless(bad, step, [t.new_zeros(()) for t in step]))
        return None


class BSAM(Method):
    """bSAM: the weights are the mean of a Gaussian N(w, 1/(N s)), whose scale s is learned like Adam's.

        g   = gradient at w + n, n ~ N(0, 1 / (N s))
        e   = rho g / s
        g_e = gradient at w + e
        g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)
        s   <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)
        w   <- w - alpha g_m / s

    all entry by entry. An optimizer of its own, with no base: the constructor takes parameters. Two passes a step.
    Beside the weights it keeps g_m and s (as Adam does), and within a step a copy of w and one of g. The loss that
    :meth:`step` gives back is that at w + n. The state of a parameter is ``momentum`` (g_m) and ``scale`` (s), so a
    sample of the posterior is ``w + torch.randn_like(w) * (n_data * scale) ** -0.5``.

    The noise depends on ``seed`` and the step's number alone; no global generator is touched. With ``accumulate=True``
    every micro-batch has its own noise and its own climb, as in the authors' experiments, which split a batch in 8.

    Args:
        params: parameters or groups, as ``torch.optim`` takes them; a group may bring its own ``lr``, ``sam_rho``,
            ``betas``, ``weight_decay``, ``damping``, ``n_data`` and (at the start only) ``scale``.
        lr: alpha; 0.5 in the authors' CIFAR examples. It is larger than Adam's because s starts at 1.
        n_data: N, the number of training samples; with data augmentation, the authors multiply it by 4.
        rho: rho; 0.01 in the authors' CIFAR examples, 5e-5 on TinyImageNet. It multiplies g / s as it is, without a
            norm, so the loss must be a mean over samples, and unscaled: no loss scaler.
        betas: beta1 and beta2.
        weight_decay: delta, the precision of the prior divided by N; 10 / N to 25 / N is usual.
        damping: gamma, a floor for s.
        scale: s at the start.
        seed: what makes the noise of two runs, or of two workers, differ.
        model: the module that the passes run, as in :class:`steppe.SAM`.
        replay_rng: as in :class:`steppe.SAM`.

    Raises:
        ValueError: a hyperparameter out of range, no parameters.

    The authors' code (JAX) steps with the scale before its update, where the paper's algorithm and this use the one
    after it. It starts the second pass from the running statistics that the first one left, and keeps the second's.

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

    Source: Möllenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620.
    """

    paper: ClassVar[Paper] = BSAM_PAPER
    base: Posterior
    combination: Curved
    seed: int
    _own: ClassVar[tuple[str, ...]] = ("seed",)
    _no_scaler: ClassVar[str] = "e = rho g / s has no norm to divide the scale by, so it climbs 65536 times too far"

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
        self.seed = seed
        curved = Curved()
        own = {"lr": lr, "n_data": n_data, "betas": betas, "weight_decay": weight_decay, "damping": damping}
        super().__init__(
            Posterior(params, curved.sizes, scale=scale, **own),
            rho,
            perturbation=Natural(),
            combination=curved,
            model=model,
            replay_rng=replay_rng,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._micro_batch = 0

    def passes(self, *, accumulate: bool = False) -> Iterator[Pass]:
        """Yield the two passes of a step: at a sample w + n, and at w + e.

        Args:
            accumulate: add g_e to what ``.grad`` held before, and |g| to that of the passes before: one loop for each
                micro-batch, each loss weighed by the micro-batch's share.
        """
        self._begin("passes()")
        before = self._engine.gradients.copies() if accumulate else {}
        self._micro_batch = self._micro_batch + 1 if accumulate else 0
        if not accumulate:
            self.combination.sizes.clear()
        yield from self._yield_pass(PassAtPoint(self, self._move_to_sample, is_last=False))
        sam_pass = Pass(self, self._engine.point(), is_last=True)
        yield from self._yield_pass(sam_pass)
        self._engine.combine(self.combination)
        self._engine.gradients.add(before)
        self._stage = Stage.READY

    def first_step(self, zero_grad: bool = False) -> NoReturn:
        """Refused: the first pass is not at w.

        Raises:
            RuntimeError: always.
        """
        self._refuse(
            "first_step()",
            "its first pass is at a sample around w, so the backward before first_step() would be at the wrong point. "
            "Use step(closure) or passes()",
        )

    def _base_step(self) -> bool:
        try:
            return super()._base_step()
        finally:
            self.combination.sizes.clear()

    @torch.no_grad()
    def _move_to_sample(self) -> None:
        members = list(dict.fromkeys(p for p in parameters(self.base) if p.requires_grad))
        scales = [self.state[p]["scale"] for p in members]
        who = f"BSAM/{self._micro_batch}"
        noise = dict(zip(members, normal(who, self.seed, self._engine.steps, scales), strict=True))
        for group in self.param_groups:
            around = [p for p in group["params"] if p in noise]
            if around:
                widths = foreach(torch._foreach_sqrt, [self.state[p]["scale"] * group["n_data"] for p in around])
                one = torch.ones((), device=around[0].device)
                self._engine.displace(around, one, foreach(torch._foreach_div, [noise[p] for p in around], widths))


def _unless(bad: Tensor | None, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """The new, unless the device found it bad."""
    if bad is None:
        return new
    return [torch.where(bad.to(t.device) != 0, o, t) for t, o in zip(new, old, strict=True)]


def _check(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, wrong, why in (
        ("n_data", group["n_data"] < 1, "it is the number of training samples"),
        ("betas", not (0 <= beta1 < 1 and 0 <= beta2 < 1), "each is at least 0 and below 1"),
        ("weight_decay", group["weight_decay"] < 0, "it is the prior's precision divided by n_data"),
        ("damping", group["damping"] < 0, "it is added to the scale"),
        ("scale", group["scale"] <= 0, "the variance is 1 / (n_data scale)"),
    ):
        if wrong:
            raise ValueError(f"{name} is {group[name]}, which cannot be: {why}")
    if not isinstance(group["lr"], Tensor) and group["lr"] < 0:
        raise ValueError(f"lr must be at least 0, got {group['lr']}: it is the length of a step")


def bsam(
    params: Any, lr: Rho = 0.5, rho: Rho = 0.01, *, n_data: int, model: nn.Module | None = None, **kwargs: Any
) -> SAM:
    """bSAM: SAM as the optimal relaxation of Bayes, with a variance for each weight. Two passes a step.

    An optimizer of its own: it has no base, and takes the parameters. ``n_data`` is the number of training samples;
    further arguments are those of :class:`steppe.methods.bsam.BSAM`.

    Source: Moellenhoff and Khan, SAM as an Optimal Relaxation of Bayes, arXiv 2210.01620.
    """
    return BSAM(params, lr, rho=rho, n_data=n_data, model=model, **kwargs)


def _made(base: Optimizer, model: nn.Module, **given: Any) -> tuple[Any, ...]:
    return (bsam(model.parameters(), model=model, **given),)


def _build(base: Optimizer, *, rho: float, model: nn.Module, images: int, seed: int, lr: float = 0.5) -> Optimizer:
    parameters = [p for group in base.param_groups for p in group["params"]]
    return bsam(parameters, lr, rho, n_data=images, model=model, seed=seed)


CARD = MethodCard(
    name="bsam",
    function=bsam,
    label="bSAM",
    about="It is an optimizer of its own, and its scale s gives a posterior to sample from.",
    equation="g = gradient at w + n,  n ~ N(0, 1 / (N s));   e = rho g / s;   g_e = gradient at w + e\n"
    "g_m <- beta1 g_m + (1 - beta1) (g_e + delta w)\n"
    "s   <- beta2 s + (1 - beta2) (sqrt(s) |g| + delta + gamma)\n"
    "w   <- w - lr g_m / s",
    cost="2",
    passes=2,
    memory="g_m and s, as Adam does, so that memory is counted beside SGD; a copy of the weights, and within a step g",
    when="Where the uncertainty of the weights is wanted too.",
    when_not="Around a base of yours: it has none. With a loss scaler, or a loss that is not a mean over samples.",
    usual={
        "lr": "0.5 in the authors' CIFAR examples",
        "rho": "0.01 in the authors' CIFAR examples, 5e-5 on TinyImageNet",
        "n_data": "training samples; with augmentation, the authors multiply by 4",
        "betas": "unverified",
        "weight_decay": "10 / N to 25 / N",
        "damping": "unverified",
        "scale": "unverified",
    },
    checked="The official code (JAX), https://github.com/team-approx-bayes/bayesian-sam, was read: it steps with "
    "the scale before its update, where the paper's algorithm and this use the one after it, and keeps the second"
    " pass's running statistics.",
    caveats=(
        "rho multiplies g / s without a norm: it cannot be compared with SAM's.",
        "The loss that a step gives back is that at w + n.",
    ),
    required={"n_data": 60_000},
    make=_made,
    arguments_of=(BSAM,),
    use="optimizer = steppe.variants.bsam(model.parameters(), n_data=60_000, model=model)",
    comparison=Comparison(
        summary=f"SAM as Bayes: its own optimizer, at its own lr and at rho / 5 ({USUAL_RATIO})",
        build=_build,
        rho_factor=0.2,
    ),
)
