"""Short trainings for the tests of averaged weights, and an interrupt at any line."""

import gc
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import steppe
from support import (
    BASES,
    batch,
)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def sam(model, **options):
    return steppe.SAM(BASES["momentum"](model.parameters()), rho=0.5, model=model, **options)


def steps(model, optimizer, drive, numbers):
    """Train, and yield after each step."""
    for number in numbers:
        x, y = batch(number)
        yield drive(optimizer, lambda x=x, y=y: F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y))


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


class Interrupt(BaseException):
    pass


SOURCE = str(Path(steppe.__file__).parent) + "/"
OF_AVERAGES = (SOURCE + "averaging/", SOURCE + "_engine/completed_steps.py")


def interrupted(step, at, source=OF_AVERAGES):
    """Take a step, raise at a line event (by its number); return the number of lines."""
    count = 0

    def local(frame, event, _):
        nonlocal count
        if event == "line":
            count += 1
            if count - 1 == at:
                sys.settrace(None)
                raise Interrupt
        return local

    before = sys.gettrace()
    gc.disable()
    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(source) else None)
    try:
        step()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    return count
