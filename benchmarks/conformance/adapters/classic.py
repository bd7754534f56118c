"""The classic single-file implementation, from a checkout: its README's loop, with its BatchNorm helpers."""

import os
from pathlib import Path
from typing import ClassVar

import classic_sam
from conformance.adapters.base import Adapter, Base, FirstAndSecond

README = "https://github.com/davda54/sam#readme"
CHECKOUT = Path(os.environ["CONFORMANCE_CLASSIC"])


SAM = classic_sam.load(CHECKOUT / "sam.py").SAM
bypass_bn = classic_sam.load(CHECKOUT / "example" / "utility" / "bypass_bn.py")


class ClassicSession(FirstAndSecond):
    """The loop of the README, with the helpers of its example."""

    def before_first_pass(self):
        """Enable the running statistics."""
        bypass_bn.enable_running_stats(self.model)

    def before_second_pass(self):
        """Disable the running statistics."""
        bypass_bn.disable_running_stats(self.model)


class Classic(Adapter):
    """github.com/davda54/sam."""

    title = "classic"
    distribution = ""
    docs = README
    usage = (
        "the README's loop of `first_step(zero_grad=True)` and `second_step(zero_grad=True)` with its example's "
        "BatchNorm helpers; schedules on `base_optimizer`; clipping before `second_step`."
    )

    not_applicable: ClassVar = {"C37": "a file in the user's own project, without annotations"}

    @property
    def version(self):
        """The file has no version."""
        return "single file"

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build with the class form, the only one."""
        optimizer = SAM(model.parameters(), base.cls, rho=rho, **base.options)
        if state is not None:
            optimizer.base_optimizer.load_state_dict(state)
        return ClassicSession(model, optimizer, optimizer.base_optimizer, clip=clip)


ADAPTER = Classic()
