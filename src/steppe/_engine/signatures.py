"""Signatures for readers and tools: ``help()``, editors, and frameworks that build objects by :mod:`inspect`."""

import inspect
from collections.abc import Callable
from typing import Any, Unpack, get_args, get_origin, get_type_hints


def show_signature(
    function: Callable[..., Any], form: Callable[..., Any], like: Callable[..., Any] | None = None
) -> None:
    """Set the signature that :func:`inspect.signature` returns for a function.

    Args:
        function: The function, whose own signature hides its options in ``*args`` or ``**options``.
        form: A function with the signature to show. Its ``**options: Unpack[...]`` are written out.
        like: The function that has the defaults of these options; ``function`` itself if None.
    """
    defaults = inspect.signature(like or function).parameters
    form_signature = inspect.signature(form)
    shown: list[inspect.Parameter] = []
    for parameter in form_signature.parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD or get_origin(parameter.annotation) is not Unpack:
            shown.append(parameter)
            continue
        (options,) = get_args(parameter.annotation)
        kinds, names = get_type_hints(options), {p.name for p in shown}
        shown += [
            p.replace(kind=p.KEYWORD_ONLY, annotation=kinds[name])
            for name, p in defaults.items()
            if name in kinds and name not in names
        ]
    rest = [p for p in defaults.values() if like is None and p.kind is p.VAR_KEYWORD]
    function.__signature__ = form_signature.replace(parameters=shown + rest)  # type: ignore[attr-defined]
