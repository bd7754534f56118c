"""The optimizer: the one state machine, and the three ways to drive it."""

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, overload
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe import papers
from steppe._engine.callers import called_by_scaler, called_by_trainer, inside_an_accumulation, warn
from steppe._engine.constructor import base_and_rho, check_groups
from steppe._engine.engine import Engine
from steppe._engine.state_dict import RHO, has_ours, pack, parameters, unpack
from steppe.rules import Cadence, Combination, Memory, Perturbation, Point, ascent_steps, needs_gradient, scale_free
from steppe.rules.l2 import L2
from steppe.rules.periodic import Periodic
from steppe.rules.perturbed import Perturbed

Closure: TypeAlias = Callable[[], Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_F = TypeVar("_F", bound=Callable[..., Any])
# Dynamo would drop what a compiled step writes to our attributes.
_eager: Callable[[_F], _F] = torch.compiler.disable
_OPTIONS = ("replay_rng", "per_rank", "stochastic_rounding")
_ALONG_G, _EVERY_STEP, _G_S = L2(), Periodic(), Perturbed()
_wrapped: WeakSet[Optimizer] = WeakSet()


class Stage(enum.Enum):
    """Where a step stands, in the words of the error that a call out of order gets."""

    AT_W = "between two steps"
    IN_PASS = "inside a walk of passes()"
    BETWEEN_PASSES = "inside the loop over passes(), before its end"
    PERTURBED = "between first_step() and second_step()"
    READY = "after passes(), before step()"


class SAM(Optimizer):
    """Sharpness-aware minimization around any base optimizer.

    min_w max_{|e| <= rho} L(w + e): a first pass at w gives g, a second one at w + e(g) gives g_s, and the base
    optimizer steps from w with a combination of the two. ``param_groups``, ``state`` and ``defaults`` *are* the
    base's, so learning-rate schedules, clipping, checkpoints and hooks work on either object.

    Three ways to drive it, each leaving weights, buffers and random generators as one ordinary pass would:
    ``step(closure)``, the explicit :meth:`passes`, and the classic :meth:`first_step` / :meth:`second_step`.

    Args:
        base_optimizer: an instance of any optimizer that does not need a closure of its own.
        rho: the neighborhood radius, at least 0; the default of every group. A group may bring its own ``sam_rho``.
        model: the module that the passes run. With it the second pass changes no buffer (BatchNorm's running
            statistics, ...), starts from the buffers that the first one started from, and adds nothing to the
            gradients of parameters that belong to other optimizers.
        perturbation: which way up, :class:`~steppe.L2` or any :class:`~steppe.rules.Perturbation`.
        combination: which gradient goes down.
        cadence: at which steps to climb.
        replay_rng: let the second pass draw the same random numbers (dropout masks, ...) as the first.
        per_rank: with a ``DistributedDataParallel`` model, let every rank climb along the gradient of its own samples
            (m-sharpness, m = the samples of a rank: the SAM paper's setting), and average the gradients that they find
            there. It saves the first pass's communication. Without it, all ranks climb together, as one process would
            on all samples.
        scaler: the loss scaler of a loop in float16. With it ``step(closure)`` works there too, and rules that depend
            on the size of the gradients see them without its scale. It belongs to the loop: copies have none.
        stochastic_rounding: round weights in half precision up or down at random when they climb. A step of rho is
            often smaller than their last bit; so it arrives on average, where rounding to nearest would lose it.

    The class form ``SAM(params, BaseClass, rho=..., **kwargs)`` builds the base from its class.

    Raises:
        ValueError: a rho that is negative or not finite, no parameters, a model that does not hold them; ``per_rank``
            with a model or rules that cannot do it.
        TypeError: a base that is not an optimizer, or that needs its own closure (LBFGS); an engine under which SAM
            would be silently wrong (FSDP1, DeepSpeed).

    A step whose gradient is not finite in either pass is skipped, and counted in :attr:`skipped_steps`. On an
    accelerator that is decided without synchronization: exactly by a base that takes ``found_inf`` (``fused=True``);
    any other gets a zero gradient for that step, so that only its momentum and weight decay act.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss_at_w = optimizer.step(closure)

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412.
    """

    paper: ClassVar[papers.Paper] = papers.SAM
    base: Optimizer
    rho: float | Tensor
    model: nn.Module | None
    perturbation: Perturbation
    combination: Combination
    cadence: Cadence
    replay_rng: bool
    per_rank: bool
    stochastic_rounding: bool
    scaler: torch.amp.GradScaler | None
    _said_plain = False
    _current_pass: "Pass | None"

    @overload
    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float | Tensor = 0.05,
        *,
        model: nn.Module | None = None,
        perturbation: Perturbation = _ALONG_G,
        combination: Combination = _G_S,
        cadence: Cadence = _EVERY_STEP,
        replay_rng: bool = True,
        per_rank: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        stochastic_rounding: bool = False,
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: Params,
        base_class: Callable[..., Optimizer],
        rho: float | Tensor = 0.05,
        *,
        model: nn.Module | None = None,
        perturbation: Perturbation = _ALONG_G,
        combination: Combination = _G_S,
        cadence: Cadence = _EVERY_STEP,
        replay_rng: bool = True,
        per_rank: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None: ...

    def __init__(
        self,
        *args: Any,
        model: nn.Module | None = None,
        perturbation: Perturbation = _ALONG_G,
        combination: Combination = _G_S,
        cadence: Cadence = _EVERY_STEP,
        replay_rng: bool = True,
        per_rank: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        base, rho = base_and_rho(*args, **kwargs)
        if model is not None and set(model.parameters()).isdisjoint(parameters(base)):
            raise ValueError(
                "model= holds none of the optimizer's parameters, so its running statistics would be protected and "
                "those of the trained model would not: pass the module whose parameters the base optimizer got"
            )
        if base in _wrapped or has_ours(base):
            for group in base.param_groups:
                group.pop(RHO, None)  # an earlier wrapper's radius: this one's argument is meant
        _wrapped.add(base)
        if per_rank and (needs_gradient(cadence) or not needs_gradient(perturbation)):
            raise ValueError(_apart(perturbation, cadence))
        slots = {"perturbation": perturbation, "combination": combination, "cadence": cadence}
        options = {
            "replay_rng": replay_rng,
            "per_rank": per_rank,
            "scaler": scaler,
            "stochastic_rounding": stochastic_rounding,
        }
        self.__setstate__({"base": base, "rho": rho, "model": model, **options, **slots})
        for group in base.param_groups:
            group.setdefault(RHO, rho)
        check_groups(base.param_groups, base.defaults)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base", "rho", "model", *_OPTIONS, "perturbation", "combination", "cadence")
        engine = self._engine
        return {**{name: self.__dict__[name] for name in kept}, "memory": engine.memory, "steps": engine.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.base = state["base"]  # first: what torch sets up looks at our defaults, which are the base's
        super().__setstate__({name: value for name, value in state.items() if name not in ("memory", "steps")})
        self._stage, self._current_pass, self._recording = Stage.AT_W, None, False
        self.scaler = state.get("scaler")
        self._template: Memory = {}
        self._below = SimpleNamespace(param_groups=self.param_groups, step=self._take)
        self._engine = Engine(self.base, self.model, **{name: state[name] for name in _OPTIONS})
        self._engine.memory = state.get("memory", self._engine.memory)
        self._engine.steps = state.get("steps", self._engine.steps)

    # The base's own objects, looked up at every use: either object's load_state_dict may have replaced them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with its radius ``sam_rho``."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its radius is its ``sam_rho``, or else this optimizer's rho."""
        group = {RHO: self.rho, **param_group}
        check_groups([group], self.defaults)
        self.base.add_param_group(group)
        self._engine.protect(self.model, replay_rng=self.replay_rng, per_rank=self.per_rank)

    @property
    def current_pass(self) -> "Pass | None":
        """The pass that runs now, for a closure that wants to know which one it is; None outside of one."""
        return self._current_pass

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite; reading it waits for the device."""
        return int(self._engine.gradients.skipped)

    # CUDA graphs: one a kind of step.

    @property
    def perturbs_next(self) -> bool | None:
        """Whether the next step climbs; None where the cadence decides by the gradient at w."""
        return None if needs_gradient(self.cadence) else bool(self.cadence(self._engine.point_of_step()))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let a step be captured in a CUDA graph under any cadence that goes by the step's number.

        The graph is of a step of that kind: replay it only where :attr:`perturbs_next` is what it was at the capture, and
        call :meth:`replayed` after each replay but the first, of which the capture itself has been told.

        Raises:
            RuntimeError: the cadence decides by the gradient at w, which a graph cannot ask.
        """
        if needs_gradient(self.cadence):
            raise RuntimeError(
                f"CUDA graph capture with {self.cadence}: it decides by the gradient at w, on the host, in the middle "
                "of the step. Take a cadence that goes by the step's number, or no graph"
            )
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def replayed(self) -> None:
        """Count a step that the replay of a CUDA graph has taken; all else that it changes lies in tensors."""
        self._engine.steps += 1

    # Driving it.

    def passes(self, *, accumulate: bool = False) -> Iterator["Pass"]:
        """Yield the passes of one step, each a context for one forward+backward over all micro-batches.

        Every pass starts with cleared gradients. After the loop the weights are back at w and ``.grad`` holds what
        goes down, ready for unscaling, clipping and :meth:`step`.

        Args:
            accumulate: add this gradient to what ``.grad`` held before. One loop for each micro-batch then gives
                each its own perturbation (m-sharpness with a smaller m); to perturb once for all of them, run all
                micro-batches inside the walk instead.

        Raises:
            RuntimeError: a step is pending, or a walk was not entered with ``with``; or ``accelerator.accumulate()`` is
                in force, whose other micro-batches would be lost.

        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
        >>> for sam_pass in optimizer.passes():
        ...     with sam_pass:
        ...         w.square().sum().div(2).backward()
        >>> w.grad
        tensor([3.3000, 4.4000])
        >>> optimizer.step()
        """
        self._begin("passes()")
        if not accumulate and inside_an_accumulation():
            raise RuntimeError(
                "passes() inside accelerator.accumulate(): every pass starts with cleared gradients, so all "
                "micro-batches but the last would be lost. steppe.integrations.accelerate has the loop that runs them "
                "all in each pass, and accumulate=True gives each a perturbation of its own"
            )
        before = self._engine.gradients.copies() if accumulate else {}
        yield from self._ahead() if self._is_single_pass() else self._from_w()
        self._engine.combine(self.combination)
        self._engine.gradients.add(before)
        self._stage = Stage.READY

    @_eager
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; return the loss at w where a closure was run.

        Between two steps, ``closure`` (the closure of ``torch.optim``: zero_grad, forward, backward, return the
        loss) is called once a pass; of a method whose only pass is the climbed one, the loss is that at w + e. After
        :meth:`passes`, or with a :meth:`first_step` pending, the passes have been made: it is not called, and the base
        steps from w. With neither passes nor closure, this is a plain step of the base, and says so once.

        Raises:
            RuntimeError: called inside the loop over :meth:`passes`; or gradients were accumulated before the
                closure, which the second pass would lose; or a loss scaler and the step disagree about who unscales.
        """
        if self._stage is Stage.AT_W and closure is not None:
            return self._step_by(closure)
        if self._stage is Stage.AT_W:
            return self._plain_step()
        if self._stage not in (Stage.PERTURBED, Stage.READY):
            raise self._out_of_order("step()")
        self._check_scale()
        if self._stage is Stage.PERTURBED:
            if called_by_scaler():
                self._engine.unscaled()
            self._finish_classic()
        self._take()
        return None

    @_eager
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb from w along the gradient that a backward has left (the classic API).

        The second pass draws the random numbers that followed the last ``zero_grad()`` or step: the same dropout
        masks, if the first forward came right after it. :meth:`passes` needs no such care, and restores the weights
        on any exception.

        Raises:
            RuntimeError: called twice, or inside a walk of :meth:`passes`.
        """
        self._begin("first_step()")
        if self._is_single_pass():
            raise RuntimeError(
                f"first_step() with {self.perturbation}: it climbs without the gradient at w, so its only pass comes "
                "after the climb, and the backward before first_step() would be lost. Use passes() or step(closure)"
            )
        if self.per_rank:
            raise RuntimeError(
                "first_step() with per_rank=True: the backward before it has averaged the ranks' gradients already. "
                "Use passes() or step(closure), which keep them apart"
            )
        if ascent_steps(self.perturbation) > 1:
            raise RuntimeError(
                f"first_step() with {self.perturbation}: it climbs {ascent_steps(self.perturbation)} times a step, and the "
                "classic API has a place for one climb. Use passes() or step(closure)"
            )
        point = self._engine.point_after_first_pass()
        if self.cadence(self._engine.unscaled_view(self.cadence, point)):
            self._perturb(point)
        self._stage = Stage.PERTURBED
        if zero_grad:
            self.zero_grad()

    @_eager
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Come back to w, and step with the gradient that the second backward has left (the classic API).

        Raises:
            RuntimeError: no :meth:`first_step` is pending.
        """
        if self._stage is not Stage.PERTURBED:
            raise RuntimeError(
                "second_step() was called before first_step(): there is no perturbation to come back from. Call "
                "first_step() after the first backward, and second_step() after the second"
            )
        self.step()
        if zero_grad:
            self.zero_grad()
        else:
            self._engine.protection.mark_generators()

    def restore(self) -> None:
        """Give a pending step up: the weights are back at w, and the next pass is a first one."""
        self._engine.abort()
        self._stage = Stage.AT_W

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. A step that was ready but not taken (a scaler skipped it) is given up."""
        super().zero_grad(set_to_none)
        self._engine.gradients.cleared()
        if self._stage in (Stage.READY, Stage.AT_W):
            self._stage = Stage.AT_W
            self._engine.protection.mark_generators()

    def _is_single_pass(self) -> bool:
        """Whether nobody needs a pass at w."""
        return not needs_gradient(self.perturbation) and not self.combination.needs_unperturbed_gradient

    def _ahead(self) -> Iterator["Pass"]:
        """The only pass of a step, at w + e or at w."""
        point = self._engine.point_before_passes()
        yield from self._yield_pass(Pass(self, point if self.cadence(point) else None, ahead=True, is_last=True))

    def _from_w(self) -> Iterator["Pass"]:
        """A pass at w, and one at the end of each climb."""
        planned = None if needs_gradient(self.cadence) else self.cadence(self._engine.point_of_step())
        yield from self._yield_pass(Pass(self, is_last=None if planned is None else not planned))
        point: Point | None = self._engine.point_after_first_pass()
        if planned is None and point is not None:
            planned = self.cadence(self._engine.unscaled_view(self.cadence, point))
        for left in reversed(range(ascent_steps(self.perturbation) if planned else 0)):
            sam_pass = Pass(self, point or self._engine.point_after_ascent_step(), is_last=left == 0)
            point = None  # nothing here may keep the first gradient alive through the second pass
            yield from self._yield_pass(sam_pass)

    # What the three ways share.

    def _begin(self, caller: str) -> None:
        if self._stage in (Stage.PERTURBED, Stage.IN_PASS):
            raise self._out_of_order(caller)
        self.restore()  # where a Ctrl-C hit the coming back itself
        if has_ours(self.base):  # our checkpoint was loaded into the base
            self._engine.take_from_base()
        check_groups(self.param_groups, self.defaults)
        self._check_capture()
        self._engine.scale = self._loss_scale()
        if self._is_single_pass() and needs_gradient(self.cadence):
            raise ValueError(
                f"{self.cadence} asks for the gradient at w, and {self.perturbation} saves the pass that gives it: "
                "take a cadence that looks at the step's number only, and says so with needs_gradient = False"
            )

    def _check_capture(self) -> None:
        """Refuse to be captured in a CUDA graph by which every replay would do what this step does, whatever its turn.

        A rule that draws random numbers by the step's number gets the same ones at every replay.
        """
        if not _is_capturing(next(parameters(self.base))):
            return
        if self.cadence != _EVERY_STEP and not self._recording:
            raise RuntimeError(
                f"CUDA graph capture with {self.cadence}: it decides on the host, and every replay would repeat this "
                "step's decision. Capture a graph for each kind of step, in `with optimizer.recording():`, and replay "
                "the one that optimizer.perturbs_next asks for"
            )
        if self.replay_rng:
            raise RuntimeError(
                "CUDA graph capture with replay_rng=True: the states of the generators cannot be read or set in a "
                "graph. Give SAM replay_rng=False; the two passes then see different dropout masks"
            )

    def _out_of_order(self, caller: str) -> RuntimeError:
        return RuntimeError(
            f"{caller} was called {self._stage.value}: this step is not complete, and going on would lose it. "
            f"End the loop over passes(), or call second_step() or step() after first_step(), before the next; "
            f"restore() gives the step up and brings the weights back to w"
        )

    def _plain_step(self) -> Any:
        if called_by_trainer():
            raise RuntimeError(
                "transformers.Trainer steps after one backward and gives no closure, so SAM would be silently off: use "
                "steppe.integrations.transformers.SAMTrainer, or its SAMTrainerMixin before a Trainer of your own"
            )
        if all(group.get("lr", 1.0) == 0.0 for group in self.param_groups):
            # torch.distributed.checkpoint, which wants to see the names and shapes of a state before it loads one
            self._template = self._empty_memory()
        elif not self._said_plain:
            self._said_plain = True
            warn(
                "step() was called with neither passes behind it nor a closure: this is a plain step of "
                f"{type(self.base).__name__}, without sharpness-aware minimization. Give step() a closure, or run "
                "the forward and backward in `for sam_pass in optimizer.passes(): with sam_pass: ...`"
            )
        return self.base.step()

    def _empty_memory(self) -> Memory:
        """What the rules will keep from step to step, with nothing in it yet; a checkpoint of step 0 is not heard."""
        return self._engine.empty_memory(self.perturbation, self.combination, self.cadence)

    def _perturb(self, point: Point, *, ahead: bool = False) -> None:
        self._engine.perturb(
            point, self.perturbation, keep_unperturbed=self.combination.needs_unperturbed_gradient, ahead=ahead
        )

    def _base_step(self) -> bool:
        """Let the base step, unless a gradient is not finite; return whether it did (a method may override it)."""
        return self._engine.gradients.step_if_finite()

    def _step_by(self, closure: Closure) -> Any:
        """The passes by a closure, and the step, by way of the loss scaler if there is one."""
        if called_by_scaler():
            raise RuntimeError(
                "scaler.step(optimizer, closure): the scaler has unscaled the gradients that were there, and those "
                "of the closure's passes would go down multiplied by its scale (65536 at first). Make the optimizer "
                "with scaler=scaler and call optimizer.step(closure); or use passes(), then scaler.step(optimizer)"
            )
        loss = self._run(closure)
        if self._engine.scale is None or self.scaler is None:
            self._take()
        else:
            self._below.param_groups = self.param_groups
            self.scaler.step(self._below)  # type: ignore[arg-type]
            self._stage = Stage.AT_W
        return loss

    def _take(self) -> None:
        """Step from w with what is in .grad."""
        self._stage = Stage.AT_W
        if self._base_step():
            self._engine.steps += 1

    def _check_scale(self) -> None:
        """Refuse to step with gradients that nobody has unscaled, or whose scale a rule should have known."""
        scales = called_by_scaler()
        if self._engine.scale is not None and not scales:
            raise RuntimeError(
                "step() after passes with a loss scaler: the gradients are still multiplied by its scale. Call "
                "scaler.step(optimizer), which unscales them, in the place of optimizer.step()"
            )
        rules = (self.perturbation, self.combination, self.cadence)
        mixes = (
            self._stage is Stage.PERTURBED and self.combination.needs_unperturbed_gradient
        )  # it has g scaled, and g_s unscaled
        sized = [self.combination] if mixes else [rule for rule in rules if not scale_free(rule)]
        if scales and self._engine.scale is None and sized:
            raise RuntimeError(
                f"scaler.step(optimizer) with {sized[0]}, which depends on the size of the gradients: it has seen them "
                "multiplied by a scale that changes on the way. Make the optimizer with scaler=scaler, so that it sees "
                "them without. (A rule that gives the same for any multiple of g says so by scale_free = True)"
            )

    def _loss_scale(self) -> Tensor | None:
        """What the scaler multiplies losses by, without a look at it."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        anywhere = next(parameters(self.base))
        return self.scaler.scale(torch.ones((), device=anywhere.device))

    def _finish_classic(self) -> None:
        self._engine.restore()
        self._engine.combine(self.combination)

    def _run(self, closure: Closure) -> Any:
        """The closure once a pass; the loss of the first."""
        losses: list[Any] = []
        outside = self._engine.gradients.accumulated_outside()
        for sam_pass in self.passes():
            with sam_pass, torch.enable_grad():
                if not losses:
                    self._engine.gradients.put(outside)  # the closure is to clear them, as with any optimizer
                losses.append(closure())
                self._engine.gradients.refuse_if_kept(outside)
                outside = {}
        return losses[0]

    def _yield_pass(self, sam_pass: "Pass") -> Iterator["Pass"]:
        yield sam_pass
        if not sam_pass.done:
            self._stage = Stage.AT_W
            raise RuntimeError(
                "a walk of passes() was not entered, so its pass has no protection and no perturbation: write "
                "`for sam_pass in optimizer.passes():` and, inside the loop, `with sam_pass:` around forward and backward"
            )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Return the base's checkpoint, with what our next step depends on inside it.

        A plain base optimizer loads it as well.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        memory = self._template if self._engine.steps == 0 else {}
        packed = pack(self.base, self._engine.memory or memory, self._engine.steps)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = changed if (changed := post_hook(self, packed)) is not None else packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of a plain base optimizer (the radii stay as they are then).

        Raises:
            RuntimeError: a step is pending.
            ValueError: the groups do not fit (from the base).
        """
        if self._stage in (Stage.PERTURBED, Stage.IN_PASS):
            raise self._out_of_order("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = changed if (changed := hook(self, state_dict)) is not None else state_dict
        radii = [group.get(RHO, self.rho) for group in self.param_groups]
        theirs, self._engine.memory, self._engine.steps = unpack(state_dict, self.base)
        self.base.load_state_dict(theirs)
        for group, radius in zip(self.param_groups, radii, strict=True):
            group.setdefault(RHO, radius)
        self._stage = Stage.AT_W
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        rules = f"perturbation={self.perturbation}, combination={self.combination}, cadence={self.cadence}"
        return f"{type(self).__name__}({rules}, base={self.base!r})"


def _is_capturing(parameter: Tensor) -> bool:
    return parameter.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _apart(perturbation: Perturbation, cadence: Cadence) -> str:
    if needs_gradient(perturbation):
        why = f"{cadence} decides by the gradient at w, which differs between the ranks: some would climb, others wait"
    else:
        why = f"{perturbation} does not look at the gradient, so every rank climbs alike (Random: give each a seed)"
    return f"per_rank=True: {why}. Leave per_rank out, or take other rules"


class Pass:
    """The context of one pass: the climb on entry (if it is not the first), and the way back, also on an exception."""

    def __init__(
        self, optimizer: SAM, climb_from: Point | None = None, *, ahead: bool = False, is_last: bool | None
    ) -> None:
        self._optimizer = optimizer
        self._climb_from = climb_from
        self._ahead = ahead
        self.is_perturbed = climb_from is not None
        """Whether this pass runs at w + e."""
        self.is_first = ahead or climb_from is None
        """Whether this is the step's first pass: at w, unless it climbs already."""
        self.is_last = is_last
        """Whether its gradient is the step's last one; None where the cadence decides by that gradient."""
        self.done = False
        """Whether it was run."""
        self._apart: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> Self:
        if self.done:
            raise RuntimeError("this walk has been walked: each one that passes() yields is entered once")
        sam = self._optimizer
        point, self._climb_from = self._climb_from, None
        if point is not None:
            sam._perturb(point, ahead=self._ahead)
            del point  # with it goes the first gradient
        else:
            sam._engine.protection.first_pass()
        try:
            Optimizer.zero_grad(sam)
            self._apart = sam._engine.ranks.pass_to(is_last=self.is_last)
            self._apart.__enter__()
        except BaseException:  # a Ctrl-C here would find no __exit__ yet
            sam._engine.restore()
            raise
        sam._stage, sam._current_pass = Stage.IN_PASS, self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.done = True
        self._apart.__exit__(None, None, None)
        sam = self._optimizer
        sam._current_pass = None
        sam._engine.restore()
        sam._stage = Stage.BETWEEN_PASSES if kind is None else Stage.AT_W
