"""Place and number of warnings."""

import warnings

import torch
from torch import nn

from steppe import SAM
from support import BASES, by_closure, net, train


def test_warnings_point_at_the_line_of_the_user():
    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        w.grad = torch.ones(2)
        optimizer.step()
        optimizer.step(lambda: (optimizer.zero_grad(), (w * float("nan")).sum().backward())[0])
    assert [(c.category, c.filename) for c in caught] == [(UserWarning, __file__), (RuntimeWarning, __file__)]


def test_ordinary_training_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net()
        train(model, SAM(BASES["adamw"](model.parameters()), model=model), by_closure, 2)
