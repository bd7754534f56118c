"""Attributes that an optimizer shares with every object that copies or proxies it."""

from typing import Any, Generic, TypeVar, overload

_T = TypeVar("_T")
_SHARED = "_shared"


class Shared(Generic[_T]):
    """An attribute whose value lies in a dictionary that copies of the optimizer's ``__dict__`` have as well.

    Frameworks make objects that take over an optimizer's class and its ``__dict__``, or look up its attributes
    (Lightning Fabric). ``passes()`` then runs on such an object and ``step()`` on the optimizer itself. With an
    ordinary attribute, the one would not see what the other has assigned.

    Args:
        default: The value before the first assignment.

    >>> class Counter:
    ...     count = Shared(0)
    >>> counter, twin = Counter(), Counter()
    >>> counter.count = 1
    >>> twin.__dict__ = dict(counter.__dict__)
    >>> twin.count += 1
    >>> counter.count
    2
    """

    def __init__(self, default: _T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> "Shared[_T]": ...
    @overload
    def __get__(self, optimizer: object, owner: type) -> _T: ...
    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        return getattr(optimizer, _SHARED, {}).get(self._name, self._default)

    def is_set(self, optimizer: object) -> bool:
        """True if the attribute has been assigned."""
        return self._name in getattr(optimizer, _SHARED, {})

    def __set__(self, optimizer: Any, value: _T) -> None:
        shared: dict[str, Any] | None = getattr(optimizer, _SHARED, None)  # not vars(): a proxy may look it up
        if shared is None:
            shared = vars(optimizer)[_SHARED] = {}
        shared[self._name] = value


def share(optimizer: object, names: set[str]) -> None:
    """Make attributes of an object :class:`Shared` ones, in its class."""
    for name in names:
        if isinstance(getattr(type(optimizer), name, None), Shared):
            continue
        attribute: Shared[Any] = Shared(getattr(type(optimizer), name, None))
        attribute.__set_name__(type(optimizer), name)
        setattr(type(optimizer), name, attribute)
        attribute.__set__(optimizer, vars(optimizer).pop(name))
