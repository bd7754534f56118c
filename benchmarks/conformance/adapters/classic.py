"""The classic single-file implementation, from a checkout: its README's loop, with its BatchNorm helpers."""

import os
from pathlib import Path

import classic_sam
from conformance.adapters.base import Adapter, Base, Session

README = "https://github.com/davda54/sam#readme"
CHECKOUT = Path(os.environ["CONFORMANCE_CLASSIC"])


SAM = classic_sam.load(CHECKOUT / "sam.py").SAM
bypass_bn = classic_sam.load(CHECKOUT / "example" / "utility" / "bypass_bn.py")


class FirstAndSecond(Session):
    """``first_step`` and ``second_step`` around the user's own passes; schedulers are attached to the base."""

    @property
    def scheduled(self):
        """The base, as in the README."""
        return self.optimizer.base_optimizer

    def take(self, losses):
        """Take one step."""
        bypass_bn.enable_running_stats(self.model)
        loss = self.backward(losses)
        self.optimizer.first_step(zero_grad=True)
        bypass_bn.disable_running_stats(self.model)
        self.backward(losses)
        if self.clip is not None:
            from torch.nn.utils import clip_grad_norm_

            clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.second_step(zero_grad=True)
        return loss

    def backward(self, losses):
        """Run forward and backward over all micro-batches; return the loss."""
        total = 0.0
        for loss in losses:
            value = loss() if len(losses) == 1 else loss() / len(losses)
            value.backward()
            total = value.detach() + total
        return total


class Classic(Adapter):
    """github.com/davda54/sam."""

    title = "classic"
    distribution = ""
    docs = README
    usage = (
        "the README's loop of `first_step(zero_grad=True)` and `second_step(zero_grad=True)` with its example's "
        "BatchNorm helpers; schedules on `base_optimizer`; clipping before `second_step`."
    )

    @property
    def version(self):
        """The file has no version."""
        return "single file"

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build with the class form, the only one."""
        optimizer = SAM(model.parameters(), base.cls, rho=rho, **base.options)
        if state is not None:
            optimizer.base_optimizer.load_state_dict(state)
        return FirstAndSecond(model, optimizer, optimizer.base_optimizer, clip=clip)


ADAPTER = Classic()
