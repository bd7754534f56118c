"""SAMPa: two passes per step that do not depend on each other."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any, ClassVar, Generic, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from steppe._checks import check_unit_interval
from steppe._engine.joint_base import names_of, owner_of
from steppe.methods._base import OwnStepMethod
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules import Memory, Perturbation, Point, ascent_steps, needs_gradient
from steppe.rules.l2 import L2
from steppe.rules.ops import accumulator, as_real, foreach, norm
from steppe.sam import Pass

SAMPA_PAPER = Paper(
    "xie2024sampa",
    ("Wanyun Xie", "Thomas Pethick", "Volkan Cevher"),
    "{SAMPa}: Sharpness-aware Minimization Parallelized",
    "2410.10683",
    2024,
    NEURIPS,
)


_Batch = TypeVar("_Batch")
_DEFAULT_PERTURBATION = L2()
_PERTURBED_RANK, _AUXILIARY_RANK = 0, 1  # of the two processes: one runs the pass at x~, the other the pass at y
_G_Y, _G_X = "gradient_at_y", "perturbed_gradient"  # keys in checkpoints


class SAMPa(OwnStepMethod):
    """SAMPa-lambda: perturb along the gradient at an auxiliary point y, so that the two gradients are independent.

        x~_t    = x_t + rho g(y_t) / |g(y_t)|
        y_{t+1} = x_t - eta g(y_t)
        x_{t+1} = Base(x_t, (1 - lambda) g(x~_t) + lambda g(y_{t+1}))

    g(x~_t) is taken on the batch of g(y_t), and g(y_{t+1}) on the next one. Before the first step g(y_0) = 0 and
    x~_0 = y_1 = x_0 on the first batch, so that the first step is a plain one. With momentum in SGD, y_{t+1} is where
    the base would step to: x_t - eta (g(y_t) + wd x_t + mu m_t), ignoring dampening and Nesterov momentum. For other
    bases it is x_t - eta g(y_t). With rho = 0, lambda = 0 and a single batch the method is the base.

    **One process.** A step uses one batch B and has two passes. The first evaluates g(y_{t+1}) on B; then the base
    steps to x_{t+1}; the second evaluates g(x~_{t+1}) on B, for the next step. The loss that :meth:`step` returns is
    the one at y. Because the base has stepped *between* the passes, :meth:`step` only counts the step, and ``.grad`` is
    cleared: clip in a step hook of the base, ``base.register_step_pre_hook``, and use no loss scaler. The memory is
    g(y), the pending g(x~) and a copy of w.

    **Two processes.** ``group`` has two ranks with the same weights. Rank 0 evaluates g(x~_t) while rank 1 evaluates
    g(y_{t+1}): one pass in each process. Then they exchange the gradients, and both take the same step. Rank 0 needs
    the batches one step later than rank 1: wrap its loader in :class:`Delayed`. Each rank returns the loss of its own
    pass. With ``model=``, rank 1 sends its buffers to rank 0. A parameter without a gradient counts as one with the
    gradient 0. The trajectory is that of one process, except that each rank draws its own dropout masks. ``.grad`` is
    the update gradient, ready for clipping. The memory is g(y), a copy of w, and one more gradient for the exchange.

    Args:
        *args: The base optimizer and rho, or the class form, as for :class:`steppe.SAM`.
        lmbda: lambda, the share of g(y_{t+1}), 0 to 1; the paper's SAMPa-0.2 has 0.2, and 0 is SAMPa.
        group: The two processes, for example ``torch.distributed.group.WORLD``; None for one process.
        perturbation: The rule, evaluated with g(y_t) in the place of the gradient.
        **kwargs: ``model`` and ``replay_rng`` as for :class:`steppe.SAM`.

    Raises:
        ValueError: lambda out of range, a group of more or less than two, a perturbation that does not use the
            gradient or makes several ascent steps, a base without a learning rate.

    A step whose update gradient is not finite is skipped; in one process, a g(x~) that is not finite skips the next
    step. A g(y) that is not finite is discarded, so that the next step has no perturbation. After an exception in the
    pass at x~, the weights are at x_{t+1}, and the next step is a first one. With two processes, an exception in one
    makes the other wait until the group's timeout.

    The authors' code sends (1 - lambda) g(x~) + lambda g(y), and computes g(y) from it by a subtraction and a division
    by lambda. The result is rounded, and with lambda = 0 that code never perturbs. There, each rank keeps its own
    BatchNorm statistics.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SAMPa(torch.optim.SGD([w], lr=0.1), rho=0.5, lmbda=0.2)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = w.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):
        ...     loss = optimizer.step(closure)
        >>> w  # x_1 = 1 - 0.1 * 2 = 0.8, x~_1 = 1.3, y_2 = 0.6, x_2 = 0.8 - 0.1 * (0.8 * 2.6 + 0.2 * 1.2)
        Parameter containing:
        tensor([0.5680], requires_grad=True)

    References:
        Xie et al., SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683.
    """

    lmbda: float
    group: "dist.ProcessGroup | None"
    paper: ClassVar[Paper] = SAMPA_PAPER
    hyperparameters: ClassVar[tuple[str, ...]] = ("lmbda",)
    why_no_accumulation: ClassVar[str] = "the gradients of a step belong to the updates of different steps"
    own_rules: ClassVar[tuple[str, ...]] = ("combination", "cadence")  # every step is made of both gradients
    why_no_first_step: ClassVar[str] = "its first pass is at y, so that the backward before first_step() would be lost"

    def __init__(
        self,
        *args: Any,
        lmbda: float = 0.2,
        group: "dist.ProcessGroup | None" = None,
        perturbation: Perturbation = _DEFAULT_PERTURBATION,
        **kwargs: Any,
    ) -> None:
        check_unit_interval("lmbda", lmbda, "the share of the gradient at y")
        if group is not None and dist.get_world_size(group) != 2:
            raise ValueError(
                f"the group has {dist.get_world_size(group)} processes, and SAMPa computes two gradients, one in "
                "each: make groups of two with torch.distributed.new_group, or leave group out for one process"
            )
        self.refuse_own_rules(kwargs)
        self.lmbda, self.group = lmbda, group
        super().__init__(*args, perturbation=perturbation, **kwargs)
        for index, param_group in enumerate(self.param_groups):
            if "lr" not in param_group:
                raise ValueError(
                    f"group {index} of {names_of(self.base)} has no 'lr', and y is one step of that length away "
                    "from x: take a base with a learning rate"
                )

    def accept_perturbation(self, perturbation: Perturbation) -> Perturbation:
        """Refuse a perturbation that does not use the gradient, or makes several ascent steps."""
        if not needs_gradient(perturbation) or ascent_steps(perturbation) > 1:
            raise ValueError(
                f"SAMPa perturbs once a step along the gradient at y, and {perturbation} does not fit. Give a "
                "perturbation that makes one ascent step along the gradient"
            )
        return perturbation

    def reset(self) -> None:
        """Reset the state of a step. A process group cannot be copied: a copy has none."""
        self.group = getattr(self, "group", None)
        self._stepped = False
        """Result of the base's step between the passes, in one process; :meth:`step_base` returns it."""

    def step_passes(self, *, accumulate: bool) -> Iterator[Pass]:
        """Yield the passes of a step: in one process those at y and at x~, in two processes that of this rank."""
        self._stepped = False
        yield from self._passes_of_one_process() if self.group is None else self._pass_of_this_rank()

    def step_base(self) -> bool:
        """Step the base; in one process, it has stepped between the passes."""
        return self._stepped if self.group is None else self.step_base_once()

    # One process.

    def _passes_of_one_process(self) -> Iterator[Pass]:
        """Yield a pass at y_{t+1}, step the base, and yield a pass at x~_{t+1} on the same batch."""
        yield self.displaced_pass(self._displace_to_y, is_last=True)
        point = self._step_between_passes()
        yield self.perturbed_pass(point)
        self._remember(point)

    @torch.no_grad()
    def _step_between_passes(self) -> Point:
        """Step the base from x_t to x_{t+1}; return the point there, with g(y_{t+1})."""
        gradients = self.gradients
        pending = {p: own[_G_X] for p, own in self.memory.items() if _G_X in own and p.requires_grad}
        self.memory.clear()  # before the base steps: if an interrupt comes after it, no step uses g(x~) twice
        parameters, found = gradients.parameters_and_gradients()
        g_y = {p: g.clone() for p, g in zip(parameters, found, strict=True)}
        if pending:
            gradients.fill_missing(pending)
            parameters, found = gradients.parameters_and_gradients()
            g_x = [pending[p] if p in pending else torch.zeros_like(g) for p, g in zip(parameters, found, strict=True)]
            self._mix(g_x, found, parameters)
        self._stepped = self.step_base_once()
        return self.point(list(g_y), _or_zeros(list(g_y.values())))

    @torch.no_grad()
    def _remember(self, point: Point) -> None:
        """Keep g(x~) and g(y) for the next step."""
        self.forget_perturbation()
        self.gradients.fill_missing(point.parameters)
        parameters, found = self.gradients.parameters_and_gradients()
        self.memory.update({p: {_G_X: g.clone()} for p, g in zip(parameters, found, strict=True)})
        for p, g in zip(point.parameters, point.gradients, strict=True):
            self.memory[p][_G_Y] = g
        self.gradients.clear()  # the base has stepped already: this gradient is for the next step

    # Two processes.

    def _pass_of_this_rank(self) -> Iterator[Pass]:
        """Yield the pass of this rank: at x~_t on the previous batch, or at y_{t+1} on the current one."""
        perturbed = dist.get_rank(self.group) == _PERTURBED_RANK
        displace = self._perturb_from_w if perturbed else self._displace_to_y
        yield self.displaced_pass(displace, is_last=True, is_perturbed=perturbed)
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Send each rank's gradient to the other, and write the update gradient."""
        parameters = self.trained_parameters()
        self.gradients.fill_missing(parameters)
        g_x, g_y = (
            self._from_rank(rank, self.gradients.views(parameters)) for rank in (_PERTURBED_RANK, _AUXILIARY_RANK)
        )
        self._mix(g_x, g_y, parameters)
        self.memory.update({p: {_G_Y: g.clone()} for p, g in zip(parameters, _or_zeros(g_y), strict=True)})
        if self.model is not None:
            buffers = list(self.model.buffers())
            if buffers:
                torch._foreach_copy_(buffers, self._from_rank(_AUXILIARY_RANK, buffers))

    def _from_rank(self, rank: int, tensors: list[Tensor]) -> list[Tensor]:
        """Return the tensors of one rank, on both; one broadcast per device and dtype."""
        flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for kind in {(t.device, t.dtype) for t in tensors}:
            flat[kind] = torch.cat([t.detach().reshape(-1) for t in tensors if (t.device, t.dtype) == kind])
        for kind in sorted(flat, key=str):
            dist.broadcast(flat[kind], group=self.group, group_src=rank)
        offsets = dict.fromkeys(flat, 0)
        sent = []
        for t in tensors:
            start = offsets[t.device, t.dtype]
            offsets[t.device, t.dtype] += t.numel()
            sent.append(flat[t.device, t.dtype][start : start + t.numel()].view(t.shape))
        return sent

    # One process and two.

    def memory_template(self) -> Memory:
        """Return zeros for the gradients that are kept."""
        keys = (_G_X, _G_Y) if self.group is None else (_G_Y,)
        zeros = {p: {key: torch.zeros_like(as_real(p.detach())) for key in keys} for p in self.trained_parameters()}
        return {self._name: zeros}

    def _mix(self, g_x: list[Tensor], g_y: list[Tensor], parameters: list[Tensor]) -> None:
        """Write the update gradient, (1 - lambda) g(x~) + lambda g(y)."""
        self.gradients.write(
            self.gradients.views(parameters), foreach(torch._foreach_lerp, g_x, g_y, weight=self.lmbda)
        )

    @torch.no_grad()
    def _displace_to_y(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if self._has_g_y(p)]
            if parameters:
                device = parameters[0].device
                length = torch.full((), -1.0, dtype=accumulator(device), device=device) * group["lr"]
                self.displace(parameters, length, [self._step_direction(p, group) for p in parameters])

    def _has_g_y(self, p: Tensor) -> bool:
        return p.requires_grad and _G_Y in self.memory.get(p, {})

    def _step_direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the direction of the base's step with g(y), for one parameter."""
        g = self.memory[p][_G_Y]
        direction: Tensor = -g if group.get("maximize", False) else g
        has_momentum = isinstance(owner_of(self.base, group), torch.optim.SGD)
        buffer = self.state.get(p, {}).get("momentum_buffer") if has_momentum else None
        if buffer is None:
            return direction
        direction = direction + group["weight_decay"] * as_real(p.detach()) + group["momentum"] * as_real(buffer)
        return direction

    @torch.no_grad()
    def _perturb_from_w(self) -> None:
        parameters = [p for p in self.trained_parameters() if self._has_g_y(p)]
        if parameters:
            self.perturb(self.point(parameters, [self.memory[p][_G_Y] for p in parameters]))


def _or_zeros(gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients, or zeros if they are not finite: a NaN in the memory would skip every later step."""
    finite = norm(gradients).isfinite()
    if finite.is_cpu:
        return gradients if finite else [torch.zeros_like(g) for g in gradients]
    return [g.masked_fill(finite.logical_not().to(g.device), 0.0) for g in gradients]


class Delayed(Generic[_Batch]):
    """Delay the batches of a loader by one step, for rank 0 of :class:`SAMPa`; the first batch comes twice.

    A further iteration, the next epoch, begins with the last batch of the one before.

    Args:
        batches: A data loader, the same on both ranks and in the same order.

    Example:
        >>> batches = Delayed(["a", "b", "c"])
        >>> list(batches), list(batches)
        (['a', 'a', 'b'], ['c', 'a', 'b'])
    """

    def __init__(self, batches: Iterable[_Batch]) -> None:
        self._batches = batches
        self._before: list[_Batch] = []

    def __iter__(self) -> Iterator[_Batch]:
        for batch in self._batches:
            before = self._before[0] if self._before else batch
            self._before = [batch]
            yield before

    def __len__(self) -> int:
        if not isinstance(self._batches, Sized):
            raise TypeError(f"the batches ({type(self._batches).__name__}) have no length, so Delayed has none")
        return len(self._batches)


def sampa(
    base_optimizer: Base,
    rho: Rho = 0.1,
    *,
    lmbda: float = 0.2,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[Options],
) -> SAMPa:
    """SAMPa: two independent passes per step. On two devices they take the time of one.

    x~ = x + rho g(y) / |g(y)|,   y' = x - lr g(y),   x' = Base(x, (1 - lambda) g(x~) + lambda g(y')).

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.1 in the official code.
        lmbda: lambda, the share of g(y'); 0.2 is SAMPa-0.2, and 0 is SAMPa.
        group: Two processes, each of which runs one of the passes; None runs both in one process.
        **options: ``model`` and the other options of :class:`steppe.SAM`.

    Raises:
        ValueError: lambda is out of range, or the group is not of two processes.

    Example:
        >>> sampa(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)).lmbda
        0.2

    References:
        Xie et al., SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683.
    """
    return SAMPa(base_optimizer, rho, lmbda=lmbda, group=group, **options)


CARD = MethodCard(
    name="sampa",
    function=sampa,
    label="SAMPa",
    paper=SAMPA_PAPER,
    summary="Perturb along the gradient at an auxiliary point, which is known one step earlier. The two passes of a "
    "step are then independent, and two devices can make them at the same time.",
    equation="x~ = x + rho g(y) / |g(y)|\ny' = x - lr g(y)\nx' = Base(x, (1 - lambda) g(x~) + lambda g(y'))",
    cost="2",
    passes=2,
    memory=f"{COPY}; from step to step g(y) and the pending g(x~)",
    when="With two devices to spare (`group=`), for SAM in the time of the base.",
    when_not="With a loss scaler in one process, or with gradient accumulation.",
    usual={"rho": "0.1 (official code)", "lmbda": "0.2 (SAMPa-0.2); 0 is SAMPa"},
    verified="official code, read",
    checked="https://github.com/LIONS-EPFL/SAMPa: it recovers g(y) from the sum by a subtraction and a division by "
    "lambda, which rounds, and with lambda = 0 never perturbs; here both gradients are sent. There each rank keeps "
    "its own BatchNorm statistics.",
    caveats=(
        "In one process SAMPa is not faster than SAM. With two processes its speed has not been measured here.",
        "The loss that a step returns is that at y, not at w.",
        "In one process the base steps between the passes: clip in a step hook of the base.",
    ),
    usage_code="optimizer = steppe.variants.sampa(base, model=model)  # in one process; in two:\n"
    "# optimizer = steppe.variants.sampa(base, group=torch.distributed.group.WORLD, model=model)",
    comparison=Comparison(summary="two passes that do not depend on each other, at SAM's rho"),
)
