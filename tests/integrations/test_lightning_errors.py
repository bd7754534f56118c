"""Errors of SAMCallback for what is not supported, and of SAM in Lightning without the callback."""

from functools import partial

import pytest
import torch
from lightning_reference import IGNORED_WARNINGS, Classifier, MixedPrecision, by_hand, fit, pl

import steppe
from steppe.integrations.lightning import SAMCallback
from support import BASES, model_bits, net

pytestmark = IGNORED_WARNINGS


def assert_fit_raises(match, module=None, error=RuntimeError, callback=None, **options):
    with pytest.raises(error, match=match):
        fit(module or Classifier(), callback or SAMCallback(rho=0.5), **options)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_unsupported_options_raise_with_the_reason():
    class TakesIterator(Classifier):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    class OwnStep(pl.plugins.Precision):
        def optimizer_step(self, optimizer, model, closure, **kwargs):
            return optimizer.step(closure)

    class Lbfgs(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class FSDPTrainer(pl.Trainer):
        strategy, precision_plugin = pl.strategies.FSDPStrategy(), pl.plugins.Precision()

    with pytest.raises(RuntimeError, match="FSDPStrategy: it shards weights.*strategy='ddp'"):
        SAMCallback().setup(FSDPTrainer.__new__(FSDPTrainer), Classifier(), "fit")
    with pytest.raises(RuntimeError, match="uses lightning.pytorch, which was imported first: import only the package"):
        SAMCallback().setup(object(), Classifier(), "fit")
    assert_fit_raises("cannot take the same batch from the iterator again", TakesIterator())
    assert_fit_raises("OwnStep: its optimizer_step is its own", plugins=[OwnStep()])
    assert_fit_raises("LBFGS cannot be the base", Lbfgs(), TypeError)
    assert_fit_raises("count from 0 to 0", error=ValueError, callback=SAMCallback(optimizers=[1]))
    manual = Classifier()
    manual.automatic_optimization = False
    assert_fit_raises("in manual optimization.*sam_pass.is_perturbed", manual, callback=SAMCallback(log_sharpness=True))
    assert_fit_raises(
        "argument 'model'.*which protects running statistics",
        error=TypeError,
        callback=SAMCallback(lambda base: steppe.SAM(base)),
    )
    assert_fit_raises(
        "returned SGD, and SAMCallback needs a steppe.SAM",
        error=TypeError,
        callback=SAMCallback(lambda base, model: base),
    )
    with pytest.raises(TypeError, match=r"SAMCallback\(rho=0.05\)"):
        SAMCallback(0.05)
    with pytest.raises(TypeError, match=r"two radii, rho=0.1 and the method's own rho=0.5"):
        SAMCallback(partial(steppe.variants.asam, rho=0.5), rho=0.1)


# Without the callback.


class ReadyMadeSam(Classifier):
    """A module that is trained without the callback."""

    def configure_optimizers(self):
        return steppe.SAM(super().configure_optimizers(), rho=0.5, model=self)


def test_loss_scaler_without_the_callback_warns_or_raises():
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises((RuntimeError, UserWarning), match="without a closure and without passes before it"):
        fit(ReadyMadeSam(), plugins=plugins)


def test_accumulation_without_the_callback_raises():
    with pytest.raises(RuntimeError, match="accumulated before step"):
        fit(ReadyMadeSam(), accumulate_grad_batches=2)


def test_explicit_passes_without_the_callback_equal_loop_by_hand():
    class Passes(ReadyMadeSam):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            for sam_pass in opt.passes():
                with sam_pass:
                    torch.manual_seed(100 + batch_idx)
                    self.manual_backward(super().training_step(batch, batch_idx))
            opt.step()

    module, twin = Passes(), net()
    fit(module)
    by_hand(twin, steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin))
    assert model_bits(module.model) == model_bits(twin)
