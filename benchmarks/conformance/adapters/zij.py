"""zij: ``first_step`` and ``second_step`` around a base optimizer of zij, as in its docstrings."""

from unittest import mock

import torch
import zij
from zij.core.lr_scheduler import LambdaLR, OneCycleLR

from conformance.adapters.base import Adapter, Base, Cheaper, FirstAndSecond, Session


class ZijSession(FirstAndSecond):
    """The classic loop; schedules are those of zij, because torch's reject optimizers of zij."""

    def schedule(self, make):
        """Attach zij's scheduler of the same name."""
        with mock.patch.multiple(torch.optim.lr_scheduler, LambdaLR=LambdaLR, OneCycleLR=OneCycleLR):
            super().schedule(make)


class LookSession(Session):
    """LookSAM: the user makes the first backward, and the closure the second pass."""

    def take(self, losses):
        """Take one step."""
        closure = self.closure(losses)
        loss = closure()
        self.optimizer.step(closure)
        return loss


def own(cls):
    """Return zij's optimizer of the same name, as in its README, or the class itself."""
    return getattr(zij, cls.__name__, cls)


class Zij(Adapter):
    """github.com/junaidaliop/zij."""

    title = "zij"
    distribution = "zij"
    docs = "https://junaidaliop.github.io/zij/"
    usage = (
        "`zij.SAM(params, base_optimizer=zij.SGD, ...)` with `first_step(zero_grad=True)`, the loss again, and "
        "`second_step(zero_grad=True)`, as in the docstring; `zij.core.lr_scheduler` on `base_optimizer`; clipping "
        "before `second_step`; LookSAM around AdamW, because its docstring asks for a base that counts its steps. "
        "zij 0.1.1 requires torch < 2.13; it is installed without that pin, with the same torch as the others."
    )

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build with the class form, the only one."""
        optimizer = zij.SAM(model.parameters(), own(base.cls), rho=rho, **base.options)
        if state is not None:
            optimizer.base_optimizer.load_state_dict(state)
        return ZijSession(model, optimizer, optimizer.base_optimizer, clip=clip)

    def cheaper(self, model, base: Base, interval: int):
        """Build LookSAM."""
        optimizer = zij.LookSAM(model.parameters(), own(torch.optim.AdamW), rho=0.05, k=interval, lr=0.01)
        return Cheaper(LookSession(model, optimizer, optimizer.base_optimizer), "LookSAM", 1 + 1 / interval)


ADAPTER = Zij()
