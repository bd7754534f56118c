"""Averages of the weights over training, on :class:`torch.optim.swa_utils.AveragedModel`: EMA, SWA, the last part.

An average follows an optimizer, any of torch or a :class:`steppe.SAM`, and is updated after each of its completed
steps. So it is an average of the weights w between the steps, never of perturbed ones.

Example:
    >>> import torch
    >>> from steppe.averaging import EMA
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> averaged = EMA(model, optimizer, decay=0.99)
    >>> model(torch.ones(4, 2)).square().mean().backward()
    >>> optimizer.step()  # updates the average
    >>> with averaged.applied():  # the model has the averaged weights in this block
    ...     output = model(torch.ones(1, 2))
"""

from steppe.averaging.average import Average
from steppe.averaging.averages import EMA, SWA, LastPart, from_name

__all__ = ["EMA", "SWA", "Average", "LastPart", "from_name"]
