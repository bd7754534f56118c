"""How to average: exponentially, equally from a step on, and equally over the last part."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from steppe._checks import check_count, check_positive_share, check_unit_interval
from steppe.averaging.average import Average


class EMA(Average):
    """Exponential moving average: a <- d a + (1 - d) w after each step.

    The average is over about 1 / (1 - d) steps, 1000 by default. With ``warmup``, d is (1 + n) / (10 + n) after n
    averaged steps as long as this is smaller than ``decay``: the first weights have no large share in the average.

    Args:
        model, optimizer: As for :class:`Average`.
        decay: d, between 0 and 1.
        warmup: Begin with a smaller d; False is ``get_ema_multi_avg_fn(decay)`` of torch from the first step.
        **options: ``start``, ``every``, ``device`` and ``module`` of :class:`Average`.

    Raises:
        ValueError: A decay out of range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> model = torch.nn.ParameterList([w])
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> averaged = EMA(model, optimizer, decay=0.5, warmup=False)
        >>> w.grad = torch.tensor([1.0])
        >>> for _ in range(3):  # w is 0, -1, -2
        ...     optimizer.step()
        >>> averaged.module[0].item()  # (0 + -1) / 2 = -0.5, (-0.5 + -2) / 2
        -1.25

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
        Morales-Brotons et al., Exponential Moving Average of Weights in Deep Learning, arXiv 2411.18704.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        decay: float = 0.999,
        *,
        warmup: bool = True,
        **options: Any,
    ) -> None:
        check_unit_interval("decay", decay, "the share of the earlier average")
        super().__init__(model, optimizer, **options)
        self.decay, self.warmup = decay, warmup

    def _average_function(self) -> Callable[..., None]:
        n = int(self.n_averaged)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        function: Callable[..., None] = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        return function


class SWA(Average):
    """Stochastic weight averaging: the equal mean of the weights after steps start + every, start + 2 every, ...

    a <- a + (w - a) / (n + 1), after n averaged ones. The paper starts at about three quarters of the training, with a
    constant or cyclical learning rate from there on (:class:`torch.optim.swa_utils.SWALR`), averages once an epoch, and
    then computes the statistics of BatchNorm layers anew (:meth:`Average.refresh_statistics`).

    Args:
        model, optimizer, options: As for :class:`Average`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> model = torch.nn.ParameterList([w])
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> averaged = SWA(model, optimizer, start=1)
        >>> w.grad = torch.tensor([1.0])
        >>> for _ in range(4):  # w is 0, -1, -2, -3
        ...     optimizer.step()
        >>> averaged.module[0].item()
        -2.0

    References:
        Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, arXiv 1803.05407.
    """

    def _average_function(self) -> Callable[..., None]:
        function: Callable[..., None] = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
        return function


class LastPart(SWA):
    """The equal mean over the last part of a known number of steps: Polyak-Ruppert averaging of the tail.

    a = mean of w_t over the last max(1, round(share T)) of T steps.

    Args:
        model, optimizer: As for :class:`Average`.
        total_steps: T, the number of steps of the whole training.
        share: The share of the steps to average, above 0 and at most 1.
        **options: ``every``, ``device`` and ``module`` of :class:`Average`.

    Raises:
        ValueError: ``total_steps`` or ``share`` out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> LastPart(model, optimizer, total_steps=1000, share=0.25).start
        750

    References:
        Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992.
        Jain et al., Parallelizing Stochastic Gradient Descent for Least Squares Regression, arXiv 1610.03774.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        total_steps: int,
        share: float = 0.25,
        **options: Any,
    ) -> None:
        check_count("total_steps", total_steps, "the number of steps of the training")
        check_positive_share("share", share, "the part of the steps to average")
        super().__init__(model, optimizer, start=total_steps - max(1, round(share * total_steps)), **options)


def from_name(
    name: str, model: nn.Module, optimizer: Optimizer | None = None, *, total_steps: int, **options: Any
) -> Average:
    """Return the average of a name, as in ``sam+ema``: ``"ema"`` is :class:`EMA`, ``"swa"`` :class:`LastPart`.

    Args:
        name: ``"ema"`` or ``"swa"``.
        model, optimizer: As for :class:`Average`.
        total_steps: The number of steps of the whole training, of which ``"swa"`` averages the last quarter.
        **options: Those of the class.

    Raises:
        ValueError: There is no such name.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> type(from_name("ema", model, optimizer, total_steps=1000, decay=0.99)).__name__
        'EMA'
    """
    if name == "ema":
        return EMA(model, optimizer, **options)
    if name == "swa":
        return LastPart(model, optimizer, total_steps=total_steps, **options)
    raise ValueError(f"there is no average {name!r}: 'ema' is the exponential moving one, 'swa' that of the last part")
