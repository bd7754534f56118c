"""Numbers as they are written on the page."""

import math
import re
from collections.abc import Sequence

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def typographic(text: str) -> str:
    """Give numbers in a text their minus sign.

    >>> typographic("SAM -1.20 points, [-2.00, -0.40], PreAct ResNet-18")
    'SAM −1.20 points, [−2.00, −0.40], PreAct ResNet-18'
    """
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


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
    (middle, deviation), power = _aligned((mean, sd), sd)
    return f"({middle} ± {deviation}){power}" if power else f"{middle} ± {deviation}"


def change(mean: float, interval: tuple[float, float] | None) -> str:
    """Write a difference and its interval, all to the same digit.

    >>> change(-0.25, (-0.4822, -0.0178)), change(0.25, None)
    ('−0.25 [−0.48, −0.02]', '+0.25')
    """
    if interval is None or not math.isfinite(sum(interval)):
        return f"{'+' if mean > 0 else ''}{number(mean)}"
    low, high = interval
    values, power = _aligned((mean, low, high), (high - low) / 2)
    signed = [value if value[0] == "−" else f"+{value}" for value in values]
    return "{} [{}, {}]{}".format(*signed, power)


def _aligned(values: Sequence[float], accuracy: float) -> tuple[list[str], str]:
    """Write values to the second digit of `accuracy`, at most to the sixth of the largest, with one power of ten."""
    largest = max(map(abs, values))
    order = math.floor(math.log10(largest)) if largest else 0
    power = 0 if -4 <= order < 5 else order
    last = math.floor(math.log10(accuracy)) if accuracy > 0 else order - 1
    places = max(0, power + 1 - max(last, order - 4))
    texts = [f"{value / 10**power:.{places}f}".replace("-", "−") for value in values]
    return texts, _power(power) if power else ""


def _power(exponent: int) -> str:
    return f"×10{str(exponent).translate(_SUPERSCRIPTS)}"
