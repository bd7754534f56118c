"""unifiedsam: ``first_step`` and ``second_step`` with manual control of both passes, as in its README."""

from typing import ClassVar

from unifiedsam import unifiedSAM

from conformance.adapters.base import Adapter, Base, FirstAndSecond


class UnifiedSession(FirstAndSecond):
    """The README's manual control, which clears the gradients before the first pass."""

    zero_grad_last: ClassVar = False


class UnifiedSam(Adapter):
    """github.com/dimitris-oik/unifiedsam."""

    title = "unifiedsam"
    distribution = "unifiedsam"
    docs = "https://github.com/dimitris-oik/unifiedsam#readme"
    usage = (
        "the class form with `lambd=1.0`, which is SAM; the README's manual control by `first_step(zero_grad=True)` "
        "and `second_step()`, because its quick start, `step(closure)` alone, raises an error in the first step; "
        "schedules on `base_optimizer`; clipping before `second_step`."
    )

    def build(self, model, base: Base, rho=0.05, *, clip=None, state=None):
        """Build with the class form, the only one."""
        optimizer = unifiedSAM(model.parameters(), base.cls, rho=rho, lambd=1.0, **base.options)
        if state is not None:
            optimizer.base_optimizer.load_state_dict(state)
        return UnifiedSession(model, optimizer, optimizer.base_optimizer, clip=clip)


ADAPTER = UnifiedSam()
