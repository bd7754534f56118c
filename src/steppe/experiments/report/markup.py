"""HTML in which what comes from outside cannot become markup, and numbers as a reader likes them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

__all__ = ["Markup", "change", "element", "join", "number", "spread"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_VOID = frozenset({"col", "line", "rect", "circle"})


class Markup(str):
    """Text that is HTML already; any other string is escaped on its way in."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str | None) -> Markup:
    """Build one element. An attribute that is None is left out; `class_` is class, and `data_x` is data-x.

    >>> element("td", "a < b", class_="wide", title=None, data_name='"')
    '<td class="wide" data-name="&quot;">a &lt; b</td>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>" if name == "col" else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*content)}</{name}>")


def join(*content: str) -> Markup:
    """Put pieces after each other.

    >>> join("1 < 2", Markup("<br>"))
    '1 &lt; 2<br>'
    """
    return Markup("".join(piece if isinstance(piece, Markup) else html.escape(piece) for piece in content))


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, a dash where there is none.

    >>> number(0.123456), number(-1.5e-5), number(math.nan), number(512.0)
    ('0.123', '−1.5×10⁻⁵', '–', '512')
    """
    if value is None or not math.isfinite(value):
        return "–"
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa.replace("-", "−") + (_power(int(exponent)) if e else "")


def spread(mean: float, sd: float | None) -> str:
    """Write mean ± standard deviation to the second digit of the latter; the mean alone where there is one run.

    >>> spread(0.123456, 0.0456), spread(1.234e-7, 5.6e-9), spread(2.0, None)
    ('0.123 ± 0.046', '(1.234 ± 0.056)×10⁻⁷', '2')
    """
    if sd is None or not math.isfinite(mean + sd):
        return number(mean)
    (ours, theirs), power = _alike((mean, sd), sd)
    return f"({ours} ± {theirs}){power}" if power else f"{ours} ± {theirs}"


def change(mean: float, half: float | None) -> str:
    """Write a difference and its interval from mean - half to mean + half, all to the same place.

    >>> change(-0.25, 0.2322), change(0.25, None)
    ('−0.25 [−0.48, −0.02]', '+0.25')
    """
    if half is None or not math.isfinite(mean + half):
        return f"{'+' if mean > 0 else ''}{number(mean)}"
    values, power = _alike((mean, mean - half, mean + half), half)
    middle, low, high = (value if value[0] == "−" else f"+{value}" for value in values)
    return f"{middle} [{low}, {high}]{power}"


def _alike(values: Sequence[float], accuracy: float) -> tuple[list[str], str]:
    """Values to the second digit of `accuracy`, at most to the sixth of the largest; a power of ten that all share."""
    largest = max(map(abs, values))
    order = math.floor(math.log10(largest)) if largest else 0
    power = 0 if -4 <= order < 5 else order
    last = math.floor(math.log10(accuracy)) if accuracy > 0 else order - 1
    places = max(0, power + 1 - max(last, order - 4))
    texts = [f"{value / 10**power:.{places}f}".replace("-", "−") for value in values]
    return texts, _power(power) if power else ""


def _power(exponent: int) -> str:
    return f"×10{str(exponent).translate(_SUPERSCRIPTS)}"
