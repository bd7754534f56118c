"""pytorch_optimizer: ``closure()`` and then ``step(closure)``, as in its docstrings, with its BatchNorm helpers."""

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils import disable_running_stats, enable_running_stats

from conformance.adapters.base import Adapter, Base, Cheaper, Session


class TwoClosures(Session):
    """The user makes the first backward, and the closure the second pass."""

    def take(self, losses):
        """Take one step."""
        closure = self.closure(losses)
        loss = closure()
        disable_running_stats(self.model)
        self.optimizer.step(closure)
        enable_running_stats(self.model)
        return loss


class PytorchOptimizer(Adapter):
    """github.com/kozistr/pytorch_optimizer."""

    title = "pytorch_optimizer"
    distribution = "pytorch_optimizer"
    docs = "https://pytorch-optimizers.readthedocs.io/en/latest/optimizer/"
    usage = (
        "the class form, `closure()` and then `step(closure)`, as in the docstring's example; "
        "`disable_running_stats` and `enable_running_stats` from its utilities around the second pass; LookSAM around "
        "AdamW, as in its docstring."
    )

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build with the class form, the only one."""
        optimizer = pytorch_optimizer.SAM(model.parameters(), base.cls, rho=rho, **base.options)
        if state is not None:
            optimizer.base_optimizer.load_state_dict(state)
        return TwoClosures(model, optimizer, optimizer.base_optimizer, clip=clip)

    def cheaper(self, model, base: Base, interval: int):
        """Build LookSAM."""
        optimizer = pytorch_optimizer.LookSAM(model.parameters(), torch.optim.AdamW, rho=0.05, k=interval, lr=0.01)
        return Cheaper(TwoClosures(model, optimizer, optimizer.base_optimizer), "LookSAM", 1 + 1 / interval)


ADAPTER = PytorchOptimizer()
