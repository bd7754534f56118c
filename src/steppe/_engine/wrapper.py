"""An optimizer around a base optimizer: groups, state, defaults and checkpoints are the base's."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.callers import flattened_checkpoint, unscaling_scaler
from steppe._engine.constructor import as_radius, check_not_adaptive
from steppe._engine.engine import Engine
from steppe._engine.groups import RHO
from steppe._engine.joint_base import option_names
from steppe._engine.loss_scale import unscaled_too_early
from steppe._engine.shared import Shared
from steppe._engine.stage import Stage, out_of_order
from steppe._engine.state_dict import MemoryTemplate, pack, saved_radii, unpack, with_own_part
from steppe.rules import Memory


class Wrapper(Optimizer):
    """The part of :class:`steppe.SAM` that is an ordinary optimizer.

    The base's objects are looked up at every use, because ``load_state_dict`` of either optimizer replaces them.
    """

    _base: Optimizer
    _default_rho = Shared[float | Tensor](0.05)
    """Radius of a group that brings none: the constructor's, or the last one written to :attr:`rho`."""
    _engine: Engine
    _mode = Shared("")
    """The last of ``train`` and ``eval`` that was called."""
    _memory_template = Shared[Memory]({})
    """Zero-filled memory of the rules, for a checkpoint before the first step."""

    @property
    def base(self) -> Optimizer:
        """The base optimizer. It cannot be replaced."""
        return self._base

    @base.setter
    def base(self, base: Optimizer) -> None:
        raise AttributeError(
            "the base optimizer cannot be replaced: radii, memory and hooks belong to the one that is wrapped, which "
            "would go on stepping. Make a new optimizer around the other base, SAM(base, rho=..., model=...)"
        )

    base_optimizer = base
    """The base optimizer, under the name that it has in the constructor and in the classic implementation."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with its radius ``sam_rho``."""
        if not torch.compiler.is_compiling() and (unscaling := unscaling_scaler()) is not None:
            self._note_unscaling(*unscaling)
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    def _note_unscaling(self, scaler: Any, key: int) -> None:
        """Refuse ``scaler.unscale_(optimizer)`` before the last pass has ended; before a first pass, only note it.

        Raises:
            RuntimeError: It is called in a loop over the passes.
        """
        stage = self._engine.stage
        if stage in (Stage.IN_PASS, Stage.BETWEEN_PASSES):
            raise unscaled_too_early(stage.value)
        self._engine.unscaled_by = scaler, key

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

    @property
    def rho(self) -> float | Tensor:
        """The radius. Writing it sets that of every group, and the default of groups that are added later.

        Reading it returns that default where the groups differ; ``param_groups[i]["sam_rho"]`` is the radius of one.
        """
        radii = [group.get(RHO, self._default_rho) for group in self.param_groups]
        return radii[0] if all(_is_same(radius, radii[0]) for radius in radii) else self._default_rho

    @rho.setter
    def rho(self, rho: float | Tensor) -> None:
        self._default_rho = rho = as_radius(rho)
        for group in self.param_groups:
            group[RHO] = rho

    @property
    def train(self) -> Callable[[], None]:
        """Call ``train()`` of a base that has one: a schedule-free optimizer, before training.

        Raises:
            AttributeError: The base has no such method, so that ``hasattr(optimizer, "train")`` is that of the base.
        """
        return self._of_base("train")

    @property
    def eval(self) -> Callable[[], None]:
        """Call ``eval()`` of a base that has one: a schedule-free optimizer, before an evaluation or a checkpoint.

        Raises:
            AttributeError: The base has no such method, so that ``hasattr(optimizer, "eval")`` is that of the base.
        """
        return self._of_base("eval")

    def _of_base(self, name: str) -> Callable[[], None]:
        method = getattr(self.base, name)

        def call() -> None:
            if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS, Stage.BETWEEN_PASSES):
                if name == "train" and self._mode != "eval":
                    return  # the Hugging Face Trainer calls train() in every pass; the base would raise in its step
                raise out_of_order(f"{name}()", self._engine.stage)  # it writes other weights, restored by the pass
            method()
            self._mode = name

        return call

    def __copy__(self) -> Self:
        """Return another object for the same optimizer; both have one state, the base's and that of the step."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Return the base's checkpoint, with everything that the next step depends on inside it.

        A plain base optimizer loads it as well.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._engine.load_from_base()
        memory = self._memory_template if self._engine.steps == 0 else {}
        packed = pack(self.base, self._engine.memory or MemoryTemplate(memory), self._engine.steps)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = changed if (changed := post_hook(self, packed)) is not None else packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, or of a plain base optimizer; the latter leaves the radii as they are.

        Args:
            state_dict: The dictionary that :meth:`state_dict` returned.

        Raises:
            RuntimeError: A step is pending.
            ValueError: The groups do not fit (from the base), or are those of ASAM in the classic implementation.
        """
        if self._engine.stage in (Stage.AFTER_FIRST_STEP, Stage.IN_PASS):
            raise out_of_order("load_state_dict()", self._engine.stage)
        if (flattened := flattened_checkpoint()) is not None:
            state_dict = with_own_part(state_dict, flattened)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = changed if (changed := hook(self, state_dict)) is not None else state_dict
        radii = [group.get(RHO, self._default_rho) for group in self.param_groups]
        base_state, memory, steps = unpack(state_dict, self.base)
        names = option_names(self.base)
        for index, group in enumerate(base_state.get("param_groups", ())):
            check_not_adaptive(index, group, names)
        self.base.load_state_dict(base_state)
        self._engine.memory, self._engine.steps = memory, steps
        for group, radius in zip(self.param_groups, radii, strict=True):
            group.setdefault(RHO, radius)
        for group, radius in zip(self.param_groups, saved_radii(state_dict) or [], strict=False):
            group[RHO] = radius
        self._engine.stage = Stage.IDLE
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


def _is_same(a: float | Tensor, b: float | Tensor) -> bool:
    """True if two radii are equal; tensors are not read, because that would synchronize."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)
