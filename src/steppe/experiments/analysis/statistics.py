"""Mean, standard deviation and confidence interval of a few runs."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom: the table of every textbook, for example
# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2, to one digit more.
_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def t_quantile(df: int) -> float:
    """Return the 97.5 % quantile of Student's t with `df` degrees of freedom (at least 1), to 1e-4.

    >>> t_quantile(2)
    4.3027
    """
    if df < 1:
        raise ValueError(f"df={df}: one run has no spread, so it has no confidence interval; take two or more")
    if df <= len(_T_975):
        return _T_975[df - 1]
    z = 1.959964  # the normal distribution's, and its expansion in 1/df: Abramowitz and Stegun 26.7.5
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `n` values; `sd` and `half_width` are None for a single one."""

    n: int
    mean: float
    sd: float | None

    @property
    def half_width(self) -> float | None:
        """Half the 95 % confidence interval of the mean, by Student's t."""
        return None if self.sd is None else t_quantile(self.n - 1) * self.sd / math.sqrt(self.n)

    @property
    def sign(self) -> int | None:
        """1 or -1 when the interval lies above or below 0; 0 when it holds 0; None for a single value."""
        if self.half_width is None:
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))

    def text(self, form: str, form_of_sd: str | None = None, sign: str = "±") -> str:
        """Return mean and standard deviation, both formatted by `form` unless another is given for the latter."""
        return f"{self.mean:{form}}" + ("" if self.sd is None else f"{sign}{self.sd:{form_of_sd or form}}")


def estimate(values: Sequence[float]) -> Estimate:
    """Summarize at least one value.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(n=3, mean=2.0, sd=1.0)
    """
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(len(values), statistics.fmean(values), sd)
