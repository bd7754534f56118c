"""SAMPa: the two passes of a step are independent of each other."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any, ClassVar, Generic, NoReturn, TypeVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.state_dict import parameters
from steppe.methods._base import Method, PassAtPoint
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Options, Rho
from steppe.papers import NEURIPS, Paper
from steppe.rules import Memory, Perturbation, Point, ascent_steps, needs_gradient
from steppe.rules.l2 import L2
from steppe.rules.ops import accumulator, as_real, foreach, norm
from steppe.sam import SAM, Pass, Stage

SAMPA_PAPER = Paper(
    "xie2024sampa",
    ("Wanyun Xie", "Thomas Pethick", "Volkan Cevher"),
    "{SAMPa}: Sharpness-aware Minimization Parallelized",
    "2410.10683",
    2024,
    NEURIPS,
)


_Batch = TypeVar("_Batch")
_ALONG_G = L2()
_CLIMBS, _LOOKS_AHEAD = 0, 1  # the ranks of the two processes
_G_Y, _G_X = "gradient_at_y", "gradient_at_climb"


class SAMPa(Method):
    """SAMPa-lambda: climb along the gradient at an auxiliary point y, so that both gradients are known at once.

        x~_t    = x_t + rho g(y_t) / |g(y_t)|
        y_{t+1} = x_t - eta g(y_t)
        x_{t+1} = Base(x_t, (1 - lambda) g(x~_t) + lambda g(y_{t+1}))

    g(x~_t) is taken on the batch of g(y_t), and g(y_{t+1}) on the next one. Before the first step g(y_0) = 0 and
    x~_0 = y_1 = x_0 on the first batch, so the first step is a plain one. With momentum in SGD, y_{t+1} is where the
    base would go: x_t - eta (g(y_t) + wd x_t + mu m_t), without regard to dampening and Nesterov. For other bases it
    is x_t - eta g(y_t). rho = 0 with lambda = 0 and one batch for ever is the base.

    **One process.** A step takes one batch B: it evaluates g(y_{t+1}) on B, lets the base step to x_{t+1}, and
    evaluates g(x~_{t+1}) on B at once, for the next step. Two passes a step; the loss is that at y. The base steps
    *between* them, so after :meth:`passes` only :meth:`step`'s book-keeping is left, and ``.grad`` is cleared: clip in
    a step hook of the base, ``base.register_step_pre_hook``, and use no loss scaler. It keeps g(y), the waiting g(x~)
    and a copy of w.

    **Two processes**, ``group`` of two ranks with the same weights: rank 0 evaluates g(x~_t) while rank 1 evaluates
    g(y_{t+1}); they exchange gradients, and both step alike. One pass a step and process. Rank 0 reads the batches
    one step later than rank 1: wrap its loader in :class:`Delayed`. A closure's loss is each rank's own. Buffers are
    rank 1's, sent with ``model=``. A parameter without a gradient counts as one with the gradient 0. The
    trajectory is that of one process, except that each rank draws its own dropout masks. ``.grad`` is what goes down,
    ready for clipping. It keeps g(y), a copy of w, and one more gradient for the exchange.

    Args:
        *args: the base optimizer and rho, or the class form, as :class:`steppe.SAM` takes them.
        lmbda: lambda, the share of g(y_{t+1}), 0 to 1; the paper's SAMPa-0.2 has 0.2, and 0 is SAMPa.
        group: two processes, for example ``torch.distributed.group.WORLD``; None is one process.
        perturbation: how to climb along g(y_t).
        **kwargs: ``model`` and ``replay_rng`` as in :class:`steppe.SAM`.

    Raises:
        ValueError: lambda out of range, a group of more or less than two, a perturbation that does not look at the
            gradient or climbs several times, a base without a learning rate.

    A gradient that is not finite skips the step that it goes down in: for g(x~) in one process, the next one. g(y) is
    then forgotten, so that the next climb starts from nothing. An exception in the pass at x~ leaves x_{t+1}, and
    starts afresh there. With two processes, the other one waits for its partner until the group's timeout.

    The authors' code sends (1 - lambda) g(x~) + lambda g(y) and takes g(y) back out of it by a subtraction and a
    division by lambda: rounded, and with lambda = 0 it never climbs. It leaves each rank its own BatchNorm statistics.

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

    Source: Xie et al., SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683.
    """

    lmbda: float
    group: "dist.ProcessGroup | None"
    paper: ClassVar[Paper] = SAMPA_PAPER
    _own: ClassVar[tuple[str, ...]] = ("lmbda",)

    def __init__(
        self,
        *args: Any,
        lmbda: float = 0.2,
        group: "dist.ProcessGroup | None" = None,
        perturbation: Perturbation = _ALONG_G,
        **kwargs: Any,
    ) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda must be between 0 and 1, got {lmbda}: it is the share of the gradient at y")
        if not needs_gradient(perturbation) or ascent_steps(perturbation) > 1:
            raise ValueError(
                f"SAMPa climbs once a step along the gradient at y, and {perturbation} does not: give a perturbation "
                "that climbs once along the gradient"
            )
        if group is not None and dist.get_world_size(group) != 2:
            raise ValueError(
                f"the group has {dist.get_world_size(group)} processes, and SAMPa has two gradients to share out: make "
                "groups of two with torch.distributed.new_group, or leave group out for one process"
            )
        if not {"combination", "cadence"}.isdisjoint(kwargs):
            raise TypeError(
                "SAMPa has a combination and a cadence of its own: every step goes down with both gradients"
            )
        self.lmbda, self.group = lmbda, group
        super().__init__(*args, perturbation=perturbation, **kwargs)
        for index, at in enumerate(self.param_groups):
            if "lr" not in at:
                raise ValueError(
                    f"group {index} of {type(self.base).__name__} has no 'lr', and y is one step of that length away "
                    "from x: take a base with a learning rate"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.group = getattr(self, "group", None)  # processes are not copied
        super().__setstate__(state)
        self._went = False

    # Driving it.

    def passes(self, *, accumulate: bool = False) -> Iterator[Pass]:
        """Yield the passes of a step: in one process at y and at x~, in two the one of this rank.

        Raises:
            RuntimeError: ``accumulate`` is asked for.
        """
        if accumulate:
            self._refuse(
                "passes(accumulate=True)",
                "the gradients of a step go down in different steps. Run all micro-batches inside each walk",
            )
        self._begin("passes()")
        self._went = False
        yield from self._in_turn() if self.group is None else self._at_once()
        self._stage = Stage.READY

    def first_step(self, zero_grad: bool = False) -> NoReturn:
        """Refused: the first pass is not at w.

        Raises:
            RuntimeError: always.
        """
        self._refuse(
            "first_step()",
            "its first pass is at y, so the backward before first_step() would be lost. Use step(closure) or passes()",
        )

    def _base_step(self) -> bool:
        return self._went if self.group is None else super()._base_step()

    # In one process.

    def _in_turn(self) -> Iterator[Pass]:
        """At y_{t+1} on this batch; then the base steps; then at x~_{t+1} on the same batch."""
        yield from self._yield_pass(PassAtPoint(self, self._move_to_y, is_last=True))
        at = self._descend()
        self._memory.clear()
        yield from self._yield_pass(Pass(self, at, is_last=True))
        self._remember(at)

    @torch.no_grad()
    def _descend(self) -> Point:
        """Let the base step from x_t to x_{t+1}; return where it stands, with g(y_{t+1})."""
        gradients = self._engine.gradients
        waiting = {p: own[_G_X] for p, own in self._memory.items() if _G_X in own}
        g_y = {p: g.clone() for p, g in zip(gradients.holders(), gradients.of(gradients.holders()), strict=True)}
        if waiting:
            gradients.fill(waiting)
            members = gradients.holders()
            both = [
                (waiting[p] if p in waiting else torch.zeros_like(g), g)
                for p, g in zip(members, gradients.of(members), strict=True)
            ]
            self._mix([x for x, _ in both], [y for _, y in both], members)
        self._went = super()._base_step()
        return self._engine.point(list(g_y), _or_nothing(list(g_y.values())))

    @torch.no_grad()
    def _remember(self, point: Point) -> None:
        gradients = self._engine.gradients
        self._engine.abort()
        gradients.fill(point.parameters)
        members = gradients.holders()
        self._memory.update({p: {_G_X: g.clone()} for p, g in zip(members, gradients.of(members), strict=True)})
        for p, g in zip(point.parameters, point.gradients, strict=True):
            self._memory[p][_G_Y] = g
        torch.optim.Optimizer.zero_grad(self)  # it waits for the next step, and is nothing to step with now

    # In two processes.

    def _at_once(self) -> Iterator[Pass]:
        """At x~_t on the batch before on one rank, and at y_{t+1} on this batch on the other."""
        ascent_steps = dist.get_rank(self.group) == _CLIMBS
        sam_pass = PassAtPoint(self, self._move_up if ascent_steps else self._move_to_y, is_last=True)
        sam_pass.is_perturbed = ascent_steps
        yield from self._yield_pass(sam_pass)
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        gradients = self._engine.gradients
        members = list(dict.fromkeys(p for p in parameters(self.base) if p.requires_grad))
        gradients.fill(members)
        g_x, g_y = (self._from_rank(rank, gradients.of(members)) for rank in (_CLIMBS, _LOOKS_AHEAD))
        self._mix(g_x, g_y, members)
        self._memory.update({p: {_G_Y: g.clone()} for p, g in zip(members, _or_nothing(g_y), strict=True)})
        if self.model is not None:
            buffers = list(self.model.buffers())
            if buffers:
                torch._foreach_copy_(buffers, self._from_rank(_LOOKS_AHEAD, buffers))

    def _from_rank(self, rank: int, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors of one rank, on both."""
        flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for kind in {(t.device, t.dtype) for t in tensors}:
            flat[kind] = torch.cat([t.detach().reshape(-1) for t in tensors if (t.device, t.dtype) == kind])
        for kind in sorted(flat, key=str):
            dist.broadcast(flat[kind], group=self.group, group_src=rank)
        rest = dict.fromkeys(flat, 0)
        sent = []
        for t in tensors:
            start = rest[t.device, t.dtype]
            rest[t.device, t.dtype] += t.numel()
            sent.append(flat[t.device, t.dtype][start : start + t.numel()].view(t.shape))
        return sent

    # What both share.

    @property
    def _memory(self) -> dict[Tensor, dict[str, Tensor]]:
        return self._engine.memory.setdefault("SAMPa", {})

    def _empty_memory(self) -> Memory:
        keys = (_G_X, _G_Y) if self.group is None else (_G_Y,)
        trained = [p for p in parameters(self.base) if p.requires_grad]
        return {"SAMPa": {p: {key: torch.zeros_like(as_real(p.detach())) for key in keys} for p in trained}}

    def _mix(self, g_x: list[Tensor], g_y: list[Tensor], members: list[Tensor]) -> None:
        """Make .grad what goes down."""
        self._engine.gradients.set(members, foreach(torch._foreach_lerp, g_x, g_y, weight=self.lmbda))

    @torch.no_grad()
    def _move_to_y(self) -> None:
        for group in self.param_groups:
            members = [p for p in group["params"] if _G_Y in self._memory.get(p, {})]
            if members:
                device = members[0].device
                length = torch.full((), -1.0, dtype=accumulator(device), device=device) * group["lr"]
                ahead = [self._ahead_of(p, group) for p in members]
                self._engine.displace(members, length, ahead)

    def _ahead_of(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What the learning rate multiplies on the way to y."""
        g = self._memory[p][_G_Y]
        ahead: Tensor = -g if group.get("maximize", False) else g
        buffer = self.state.get(p, {}).get("momentum_buffer") if isinstance(self.base, torch.optim.SGD) else None
        if buffer is None:
            return ahead
        ahead = ahead + group["weight_decay"] * as_real(p.detach()) + group["momentum"] * as_real(buffer)
        return ahead

    @torch.no_grad()
    def _move_up(self) -> None:
        members = [p for p in dict.fromkeys(parameters(self.base)) if _G_Y in self._memory.get(p, {})]
        if members:
            at = self._engine.point(members, [self._memory[p][_G_Y] for p in members])
            self._engine.move(at, self.perturbation)


def _or_nothing(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients, or zeros if they are not finite: nothing is to be remembered of them."""
    finite = norm(gradients).isfinite()
    if finite.is_cpu:
        return gradients if finite else [torch.zeros_like(g) for g in gradients]
    return [g.masked_fill(finite.logical_not().to(g.device), 0.0) for g in gradients]


class Delayed(Generic[_Batch]):
    """Batches one step later, the first of all twice: what rank 0 of :class:`SAMPa` reads.

    Every iteration goes on from the last batch of the one before, as one epoch follows another.

    Args:
        batches: a data loader, the same on both ranks and in the same order.

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
            raise TypeError(
                f"the batches ({type(self._batches).__name__}) have no length, so neither has what delays them"
            )
        return len(self._batches)


def sampa(
    base_optimizer: Optimizer,
    rho: Rho = 0.1,
    *,
    lmbda: float = 0.2,
    group: dist.ProcessGroup | None = None,
    **options: Unpack[Options],
) -> SAM:
    """SAMPa: the two passes of a step do not wait for each other. Two passes a step, on two devices in the time of one.

    They follow each other in one process; ``group``, of two processes, lets each make one of them.

    Source: Xie et al., SAMPa: Sharpness-aware Minimization Parallelized, arXiv 2410.10683.
    """
    return SAMPa(base_optimizer, rho, lmbda=lmbda, group=group, **options)


CARD = MethodCard(
    name="sampa",
    function=sampa,
    label="SAMPa",
    about="The climb goes along the gradient at an auxiliary point, which is known a step ahead.",
    equation="x~ = x + rho g(y) / |g(y)|\ny' = x - lr g(y)\nx' = Base(x, (1 - lambda) g(x~) + lambda g(y'))",
    cost="2",
    passes=2,
    memory=f"{COPY}; from step to step g(y) and the waiting g(x~)",
    when="With two devices to spare (`group=`), for SAM in the time of the base.",
    when_not="With a loss scaler in one process, or to accumulate gradients.",
    usual={"rho": "unverified", "lmbda": "0.2 (SAMPa-0.2); 0 is SAMPa"},
    checked="The official code, https://github.com/LIONS-EPFL/SAMPa, was read: it takes g(y) out of the sum by a "
    "subtraction and a division by lambda, which rounds, and with lambda = 0 never climbs; here both gradients "
    "are sent. It leaves each rank its own BatchNorm statistics.",
    caveats=(
        "In one process it only costs: the speed is with two, and has not been measured here on devices.",
        "The loss that a step gives back is that at y, not at w.",
        "In one process the base steps between the passes: clip in a step hook of the base.",
    ),
    use="optimizer = steppe.variants.sampa(base, model=model)  # in one process; in two:\n"
    "# optimizer = steppe.variants.sampa(base, group=torch.distributed.group.WORLD, model=model)",
    comparison=Comparison(summary="two passes that need not wait for each other, at SAM's rho"),
)
