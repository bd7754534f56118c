"""Digests of the parts of a task that is an object, by which a folder notices that its runs are of another one.

The digests of an unchanged task are the same in each session, wherever its code is written. So they leave out what its
own code or a session may change on the way: the state of objects, records that functions keep, packages. They find what
differs in functions, in the numbers and names that these use, and in the data; equal digests promise nothing.
"""

from __future__ import annotations

import argparse
import dis
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steppe.experiments.errors import is_users
from steppe.experiments.tasks.check import few_samples, same_tensors
from steppe.experiments.tasks.samples import RandomStream, TensorSamples
from steppe.experiments.tasks.task import Metric, Task
from steppe.experiments.world import World
from steppe.flatness._batches import list_tensors

_DATA = ("train", "test", "validation")
_NO_PARTS = ("name", "entry_point", "counted", "initial_weights", "then")
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...), PurePath, torch.dtype, torch.device)
_CHANGING = frozenset(
    {"append", "extend", "insert", "add", "update", "pop", "popitem", "setdefault", "remove", "discard", "clear"}
)
"""Methods by which a function changes a list or the like."""


def digests_of_object(task: Task | None) -> dict[str, str] | None:
    """Return the digests of a task that is an object; None without a task, or for one that is named by its file."""
    return None if task is None or task.entry_point else digests(task)


def digests(task: Task) -> dict[str, str]:
    """Return the digest of each part of a task, by its name, without parts that cannot be read through."""
    found = {}
    for name in (one.name for one in fields(task) if one.name not in _NO_PARTS):
        digest, value = _Digest(), getattr(task, name)
        with suppress(Exception):  # of the user's own objects, and of lists that hold themselves
            if name in _DATA and value is not None:
                digest.add_data(task, name)
            else:
                digest.add(value)
            found[name] = digest.text
    return found | ({} if task.then is None else {f"then.{name}": text for name, text in digests(task.then).items()})


class _Digest:
    """A digest of things that are added one by one."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen = set[int]()

    @property
    def text(self) -> str:
        return self._hash.hexdigest()[:16]

    def add_data(self, task: Task, split: str) -> None:
        """Add tensors as they are; of other data, a few samples as they are read, unless each reading differs."""
        with RandomStream(0, 0, 0).active():
            samples = task.samples(split)
            if isinstance(samples, TensorSamples):
                self.add(samples.tensors)
                return
            self.add(len(samples))
            world = World(torch.device("cpu"))
            batch = few_samples(samples, world)
            if same_tensors(batch, few_samples(samples, world)):
                self.add(list_tensors(batch))

    def add(self, thing: Any) -> None:
        """Add what is the same in each session of anything."""
        if isinstance(thing, _CONSTANTS):
            self._add_text(repr(thing))
        elif isinstance(thing, Tensor | np.ndarray):
            self._add_numbers(thing)
        elif isinstance(thing, list | tuple):
            self._add_text(f"{len(thing)} things")
            for each in thing:
                self.add(each)
        elif isinstance(thing, set | frozenset):
            self._add_text(repr(sorted(map(repr, thing))))  # the order of texts differs from session to session
        elif isinstance(thing, Mapping):
            self.add([*thing.keys(), *thing.values()])
        elif isinstance(thing, functools.partial):
            self.add([thing.func, thing.args, thing.keywords])
        elif isinstance(thing, Metric):
            self.add([getattr(thing, one.name) for one in fields(thing)])
        elif isinstance(thing, MethodType):
            self.add([thing.__func__, thing.__self__])
        elif isinstance(thing, CodeType):
            self.add([thing.co_code, thing.co_names, thing.co_consts])
        elif isinstance(thing, FunctionType) and _is_own(thing.__module__, thing.__code__.co_filename):
            self._add_function(thing)
        elif isinstance(thing, type) and _is_own(thing.__module__):
            self._add_class(thing)
        elif hasattr(thing, "__wrapped__"):  # by functools.cache and its like
            self.add(thing.__wrapped__)
        elif hasattr(thing, "__qualname__"):  # of a package
            self._add_text(f"{getattr(thing, '__module__', '')}.{thing.__qualname__}")
        else:
            self._add_object(thing)

    def _add_text(self, text: str) -> None:
        self._hash.update(f"{len(text)}:{text}".encode(errors="surrogateescape"))

    def _add_numbers(self, numbers: Tensor | np.ndarray[Any, Any]) -> None:
        self._add_text(f"{numbers.dtype} {tuple(numbers.shape)}")
        try:
            if isinstance(numbers, Tensor):
                numbers = numbers.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            self._hash.update(b"" if numbers.dtype.hasobject else numbers.tobytes())
        except (RuntimeError, TypeError):  # a kind of tensors whose bytes cannot be read
            pass

    def _add_function(self, function: FunctionType) -> None:
        """Add a function's code, and what it uses and does not change."""
        if self._is_known(function):
            return
        code = function.__code__
        self.add(code)
        used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        own = {name: cell.cell_contents for name, cell in cells if _has_content(cell)}
        variables = {name: function.__globals__[name] for name in _names(code, "LOAD_GLOBAL", function.__globals__)}
        assigned = _names(code, "STORE_GLOBAL") | _names(code, "STORE_DEREF")
        used += [value for name, value in sorted((own | variables).items()) if name not in assigned]
        changes = _names(code, "STORE_SUBSCR") or _CHANGING & {name for each in _codes(code) for name in each.co_names}
        for value in used:
            kept_record = changes and isinstance(value, list | set | dict | Tensor | np.ndarray)
            self.add(type(value) if kept_record else value)

    def _add_class(self, of: type) -> None:
        """Add a class's functions and constants, and those of its bases."""
        if self._is_known(of):
            return
        self.add([*of.__bases__])
        for name, value in sorted(vars(of).items()):
            if isinstance(value, property):
                value = value.fget
            value = getattr(value, "__func__", value)  # of a class method or a static one
            is_method = isinstance(value, FunctionType)
            if is_method or (isinstance(value, _CONSTANTS) and name[:2] != "__" and name not in _assigned(of)):
                self._add_text(name)
                self.add(value)

    def _add_object(self, thing: Any) -> None:
        """Add the class of an object, and its numbers and names that no method of it assigns."""
        of: type = type(thing)
        if self._is_known(thing):
            return
        self.add(of)
        if not (_is_own(of.__module__) or isinstance(thing, nn.Module | SimpleNamespace | argparse.Namespace)):
            return
        for name, value in sorted(getattr(thing, "__dict__", {}).items()):
            if name[:1] != "_" and isinstance(value, _CONSTANTS) and name not in _assigned(of):
                self._add_text(name)
                self.add(value)
        if of.__module__.startswith("torch.nn.modules.loss"):
            self.add(dict(thing.named_buffers()))  # the weights of classes

    def _is_known(self, thing: Any) -> bool:
        known = id(thing) in self._seen
        self._seen.add(id(thing))
        return known


def _is_own(module: str | None, file: str | None = None) -> bool:
    """True for code of the user's own: that of a notebook or a script, or of a module that is not installed."""
    file = file or getattr(sys.modules.get(module or ""), "__file__", None)
    return module == "__main__" or (bool(file) and is_users(str(file)))


def _has_content(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # assigned later
        return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _names(code: CodeType, operation: str, among: Mapping[str, Any] | None = None) -> set[str]:
    """Return the names on which a function's code has an operation."""
    found = {str(one.argval) for each in _codes(code) for one in dis.get_instructions(each) if one.opname == operation}
    return found if among is None else found & among.keys()


@functools.cache
def _assigned(of: type) -> frozenset[str]:
    """Return the attributes that methods of a class assign after its construction."""
    found = set[str]()
    for each in of.__mro__:
        for name, method in vars(each).items():
            if isinstance(method, FunctionType) and name not in ("__init__", "__post_init__"):
                found |= _names(method.__code__, "STORE_ATTR")
    return frozenset(found)
