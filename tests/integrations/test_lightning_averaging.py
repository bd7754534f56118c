"""Averaged weights in Lightning: its own callback beside SAMCallback, and the averages of Steppe."""

import pytest
import torch
from lightning_reference import BATCHES, IGNORED_WARNINGS, Classifier, by_hand, fit, loader, pl
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import steppe
from steppe.averaging import EMA
from steppe.integrations.lightning import SAMCallback
from support import BASES, model_bits, net

pytestmark = IGNORED_WARNINGS
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
if not hasattr(callbacks, "EMAWeightAveraging"):
    pytest.skip("EMAWeightAveraging needs Lightning 2.6", allow_module_level=True)


def averaged_by_hand(k=1, **options):
    """Train by SAM in a plain loop; return the model and its average after each step."""
    model = net()
    optimizer = steppe.SAM(BASES["momentum"](model.parameters()), rho=0.1, model=model)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)

    def step():
        optimizer.step()
        average.update_parameters(model)

    by_hand(model, optimizer, k=k, step=step, **options)
    return model, average


@pytest.mark.parametrize("k", [1, 2])
def test_callback_of_lightning_averages_the_steps_of_sam(k):
    averaging = callbacks.EMAWeightAveraging(decay=0.9)
    module = Classifier()
    fit(module, SAMCallback(rho=0.1), averaging, accumulate_grad_batches=k)
    _, average = averaged_by_hand(k)
    assert model_bits(module.model) == model_bits(average.module)  # Lightning ends with the average in the module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_callback_of_lightning_evaluates_the_average_and_resumes(tmp_path):
    class Validated(Classifier):
        seen = ()

        def validation_step(self, batch, batch_idx):
            self.seen = (*self.seen, model_bits(self.model))

    def run(name, epochs, **options):
        module = Validated()
        checkpoint = callbacks.ModelCheckpoint(dirpath=tmp_path / name)
        chosen = [SAMCallback(rho=0.1), callbacks.EMAWeightAveraging(decay=0.9), checkpoint]
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, callbacks=chosen, limit_val_batches=1, **quiet
        )
        trainer.fit(module, loader(), loader(1), **options)
        return module, checkpoint.best_model_path

    whole, _ = run("whole", 2)
    _, path = run("half", 1)
    resumed, _ = run("resumed", 2, ckpt_path=path)
    assert model_bits(resumed.model) == model_bits(whole.model)
    assert resumed.seen[-1] == whole.seen[-1] == model_bits(whole.model)


class Averaged(Classifier):
    """Keeps an average of its own, and saves it in the checkpoint."""

    averaged = None

    def on_train_start(self):
        average = EMA(self.model, self.optimizers(), 0.9, warmup=False)
        self.__dict__["averaged"] = average  # not as a submodule, whose parameters the checkpoint would hold twice
        if self.state_of_average is not None:
            average.load_state_dict(self.state_of_average)

    state_of_average = None

    def on_save_checkpoint(self, checkpoint):
        checkpoint["averaged"] = self.averaged.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.state_of_average = checkpoint["averaged"]


@pytest.mark.parametrize("k", [1, 2])
def test_average_of_the_optimizer_in_a_module_is_updated_once_a_step(k):
    module = Averaged()
    fit(module, SAMCallback(rho=0.1), accumulate_grad_batches=k)
    model, average = averaged_by_hand(k)
    assert model_bits(module.model) == model_bits(model)
    assert int(module.averaged.n_averaged) == int(average.n_averaged) == 2 * -(-BATCHES // k)
    for mine, theirs in zip(module.averaged.module.parameters(), average.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_average_in_a_checkpoint_of_lightning_resumes_to_the_same_bits(tmp_path):
    whole = Averaged()
    fit(whole, SAMCallback(rho=0.1))
    half = Averaged()
    trainer = fit(half, SAMCallback(rho=0.1), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Averaged()
    fit(resumed, SAMCallback(rho=0.1), ckpt_path=tmp_path / "half.ckpt")
    assert model_bits(resumed.averaged) == model_bits(whole.averaged)


def test_average_of_the_base_that_the_callback_wraps_raises():
    class OfBase(Classifier):
        def configure_optimizers(self):
            base = super().configure_optimizers()
            self.__dict__["averaged"] = EMA(self.model, base)
            return base

    with pytest.raises(TypeError, match="give the average the SAM itself"):
        fit(OfBase(), SAMCallback(rho=0.1))
