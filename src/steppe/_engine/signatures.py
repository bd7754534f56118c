"""Signatures for readers and tools: ``help()``, editors, and frameworks that build objects by :mod:`inspect`."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, Unpack, get_args, get_origin, get_type_hints


def show_signature(
    function: Callable[..., Any], form: Callable[..., Any], like: Callable[..., Any] | None = None
) -> None:
    """Set the signature that :func:`inspect.signature` returns for a function.

    Args:
        function: The function, whose own signature hides its options in ``*args`` or ``**options``.
        form: A function with the signature to show. Its ``**options: Unpack[...]`` are written out; if ``like`` is
            given, other ``**kwargs`` as well.
        like: The function that has the defaults of these options; ``function`` itself if None.
    """
    defaults = inspect.signature(like or function).parameters
    form_signature = inspect.signature(form)
    shown: list[inspect.Parameter] = []
    for parameter in form_signature.parameters.values():
        typed = get_origin(parameter.annotation) is Unpack
        if parameter.kind is not parameter.VAR_KEYWORD or not (typed or like):
            shown.append(parameter)
            continue
        kinds = get_type_hints(get_args(parameter.annotation)[0] if typed else like)
        names = {p.name for p in shown}
        shown += [
            p.replace(kind=p.KEYWORD_ONLY, annotation=kinds[name])
            for name, p in defaults.items()
            if p.kind is p.KEYWORD_ONLY and name in kinds and name not in names
        ]
    rest = [p for p in defaults.values() if like is None and p.kind is p.VAR_KEYWORD]
    function.__signature__ = form_signature.replace(parameters=shown + rest)  # type: ignore[attr-defined]


def show_constructor(method: type, base: type, without: Collection[str]) -> None:
    """Set the signature of a constructor that passes its ``*args`` and ``**kwargs`` on to that of a base class.

    Args:
        method: The class. A constructor without ``*args`` is left as it is.
        base: The class that has the other arguments.
        without: Arguments of ``base`` that ``method`` does not take.
    """
    own = inspect.signature(method.__init__).parameters  # type: ignore[misc]
    if not any(p.kind is p.VAR_POSITIONAL for p in own.values()):
        return
    keywords = {name: p for name, p in own.items() if p.kind is p.KEYWORD_ONLY}
    inherited = inspect.signature(base.__init__)  # type: ignore[misc]
    rest = [p for name, p in inherited.parameters.items() if name not in keywords and name not in without]
    order = sorted([*rest, *keywords.values()], key=lambda p: (p.kind, p.name not in keywords))
    method.__init__.__signature__ = inherited.replace(parameters=order)  # type: ignore[misc]
