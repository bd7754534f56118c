"""Several base optimizers as one, such as Muon for the matrices and AdamW for everything else."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from operator import methodcaller
from typing import Any, NoReturn, TypeAlias, cast

from torch import Tensor
from torch.optim import Optimizer

from steppe._engine.groups import parameters_of

Base: TypeAlias = Optimizer | Sequence[Optimizer]
"""One base optimizer, or several that share one perturbation."""

_BASE = "base"
"""Key of a new group: the base, or its number, to which the group is added."""
_AMP_ATTRIBUTES = ("grad_scale", "found_inf")


class JointBase(Optimizer):
    """Several optimizers of different parameters, stepped one after the other.

    Groups, states and hyperparameters stay those of the optimizers: nothing is copied, so that each can have its own
    learning-rate schedule.

    Args:
        optimizers: The optimizers, at least two.

    Raises:
        ValueError: Two of them share a parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        owners: dict[Tensor, Optimizer] = {}
        for optimizer in optimizers:
            for p in parameters_of(optimizer):
                if owners.setdefault(p, optimizer) is not optimizer:
                    _refuse_shared(p, owners[p], optimizer)
        self.__setstate__({"optimizers": tuple(optimizers)})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers: tuple[Optimizer, ...] = state["optimizers"]
        super().__setstate__({})  # hooks; no Optimizer.__init__, which would make groups and states of its own

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.optimizers))}]"

    # Looked up at every use: load_state_dict of each optimizer replaces its groups and its state.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in a new list."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        _refuse_assignment("param_groups")

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of all optimizers as one mapping, which writes to them."""
        return cast("defaultdict[Tensor, Any]", _JointState(self.optimizers))

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        _refuse_assignment("state")

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults that all optimizers have, with the values of the first; a copy.

        OneCycleLR and the like look here for the names that they may expect in every group.
        """
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {name: value for name, value in first.items() if all(name in other for other in others)}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        _refuse_assignment("defaults")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if all optimizers skip their step themselves where ``found_inf`` is 1 (torch's private protocol)."""
        return all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer under its key ``base``: one of the optimizers, or its number.

        Raises:
            ValueError: The group does not name one of the optimizers, or holds a parameter of another one.
        """
        group = dict(param_group)
        named = group.pop(_BASE, None)
        optimizer = next((o for i, o in enumerate(self.optimizers) if named is o or _is_number(named, i)), None)
        if optimizer is None:
            names = ", ".join(f"{i} ({name})" for i, name in enumerate(map(_name, self.optimizers)))
            raise ValueError(
                f"the new group does not say which base takes it: write add_param_group({{'params': ..., "
                f"'{_BASE}': number}}) with one of {names}, or with the optimizer itself"
            )
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        new = {item[1] if isinstance(item, tuple) else item for item in group["params"]}
        for other in self.optimizers:
            if other is not optimizer and (shared := new.intersection(parameters_of(other))):
                _refuse_shared(next(iter(shared)), other, optimizer)
        optimizer.add_param_group(group)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step each optimizer."""
        scaling = {name: self.__dict__[name] for name in _AMP_ATTRIBUTES if name in self.__dict__}
        try:
            for optimizer in self.optimizers:
                vars(optimizer).update(scaling)
            # A loop in C: an interrupt between two steps of a Python loop would leave half of the weights unchanged.
            list(map(methodcaller("step"), self.optimizers))
        finally:
            for optimizer in self.optimizers:
                for name in scaling:
                    vars(optimizer).pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return one checkpoint in the form of every optimizer's: parameters and groups are numbered through.

        What an optimizer has beside these two (keys of its own) is under ``base.<number>.<key>``.
        """
        packed: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for number, optimizer in enumerate(self.optimizers):
            own = optimizer.state_dict()
            for group in own["param_groups"]:
                packed["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
            for index, entries in own["state"].items():
                key = first + index if isinstance(index, int) else f"{_BASE}.{number}.state.{index}"
                packed["state"][key] = entries
            for key in own.keys() - {"state", "param_groups"}:
                packed[f"{_BASE}.{number}.{key}"] = own[key]
            first += sum(1 for _ in parameters_of(optimizer))
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of the same optimizers, in the same order.

        Raises:
            ValueError: The groups do not fit. No optimizer has been changed then.
        """
        groups = list(state_dict["param_groups"])
        sizes = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if sizes != expected:
            raise ValueError(
                f"the checkpoint has groups of {sizes} parameters, and {names_of(self)} have groups of {expected}: "
                "load it into the same base optimizers, in the same order"
            )
        for number, optimizer in enumerate(self.optimizers):
            own, groups = groups[: len(optimizer.param_groups)], groups[len(optimizer.param_groups) :]
            optimizer.load_state_dict(_part(state_dict, number, own))

    # Properties, so that hasattr is false where no optimizer has the method, as for the schedule-free ones.

    @property
    def train(self) -> Callable[[], None]:
        """Call ``train()`` of each optimizer that has one."""
        return self._of_each("train")

    @property
    def eval(self) -> Callable[[], None]:
        """Call ``eval()`` of each optimizer that has one."""
        return self._of_each("eval")

    def _of_each(self, name: str) -> Callable[[], None]:
        methods = [method for optimizer in self.optimizers if callable(method := getattr(optimizer, name, None))]
        if not methods:
            raise AttributeError(f"none of {names_of(self)} has {name}()")

        def call() -> None:
            for method in methods:
                method()

        return call


class _JointState(MutableMapping[Tensor, Any]):
    """The states of several optimizers, by parameter; reading a missing one makes an empty one, as in torch."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _of(self, key: Tensor) -> MutableMapping[Tensor, Any]:
        owns = (o.state for o in self._optimizers if key in o.state or any(p is key for p in parameters_of(o)))
        return next(owns, self._optimizers[0].state)

    def __getitem__(self, key: Tensor) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._of(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def get(self, key: Tensor, default: Any = None) -> Any:
        """Return the state of a parameter, or the default; make none."""
        return next((o.state[key] for o in self._optimizers if key in o.state), default)

    def __iter__(self) -> Iterator[Tensor]:
        for optimizer in self._optimizers:
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


def as_one(bases: Any) -> Any:
    """Return several optimizers as one; anything else as it is.

    Raises:
        TypeError: Something in a list of optimizers is not an optimizer.
        ValueError: Two of the optimizers share a parameter.
    """
    if not isinstance(bases, list | tuple) or not any(isinstance(base, Optimizer) for base in bases):
        return bases
    if wrong := [base for base in bases if not isinstance(base, Optimizer)]:
        what = f"the class {wrong[0].__name__}" if isinstance(wrong[0], type) else f"a {type(wrong[0]).__name__}"
        raise TypeError(
            f"the list of base optimizers holds {what}, and each must be an instance of an optimizer: write "
            "SAM([torch.optim.Muon(matrices, ...), torch.optim.AdamW(others, ...)], rho=0.05)"
        )
    return bases[0] if len(bases) == 1 else JointBase(bases)


def optimizers_of(base: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers of which a base is made: itself, or those of a joint one."""
    return base.optimizers if isinstance(base, JointBase) else (base,)


def owner_of(base: Optimizer, group: dict[str, Any]) -> Optimizer:
    """Return the optimizer whose group this is."""
    return next(o for o in optimizers_of(base) if any(own is group for own in o.param_groups))


def option_names(base: Optimizer) -> set[str]:
    """Return the names of the options that the base reads, in one of its optimizers at least."""
    return {name for optimizer in optimizers_of(base) for name in optimizer.defaults}


def names_of(base: Optimizer) -> str:
    """Return the names of the base's classes, for a message."""
    return " and ".join(map(_name, optimizers_of(base)))


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _is_number(named: object, number: int) -> bool:
    return isinstance(named, int) and not isinstance(named, bool) and named == number


def _part(state_dict: Mapping[str, Any], number: int, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the checkpoint of one optimizer: its groups and states, numbered from 0, and keys of its own.

    torch.distributed.checkpoint names the parameters in the place of their numbers.
    """
    indices = {index: own for own, index in enumerate(index for group in groups for index in group["params"])}
    prefix = f"{_BASE}.{number}."
    extra = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    state: dict[Any, Any] = {}
    for index, entries in state_dict["state"].items():
        if index in indices:
            state[indices[index]] = entries
        elif isinstance(index, str) and index.startswith(f"{prefix}state."):
            state[index.removeprefix(f"{prefix}state.")] = entries
    renumbered = [{**group, "params": [indices[index] for index in group["params"]]} for group in groups]
    return {**extra, "state": state, "param_groups": renumbered}


def _refuse_assignment(name: str) -> NoReturn:
    raise AttributeError(
        f"{name} of several base optimizers cannot be assigned, because each has its own: change what is in it, or "
        f"assign that of one of them (optimizer.base.optimizers[0].{name} = ...)"
    )


def _refuse_shared(p: Tensor, one: Optimizer, other: Optimizer) -> NoReturn:
    raise ValueError(
        f"a parameter of shape {tuple(p.shape)} belongs to two of the base optimizers ({_name(one)} and "
        f"{_name(other)}): both would step it. Give each parameter to one of them"
    )
