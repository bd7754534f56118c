"""A sequence that is made when it is read."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar, overload

_T = TypeVar("_T")


class LazySequence(Sequence[_T]):
    """A lazily evaluated sequence: most rules read neither radii nor states, which take time for many parameters."""

    def __init__(self, make: Callable[[], Sequence[_T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Sequence[_T]:
        return self._make()

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._made)
