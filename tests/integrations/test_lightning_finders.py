"""Trials of Lightning's learning-rate finder and batch-size finder take steps of SAM, and leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from lightning_reference import BATCHES, IGNORED_WARNINGS, Classifier, by_hand, pl, state_bits

import steppe
from steppe.integrations.lightning import SAMCallback
from support import batch, model_bits

pytestmark = IGNORED_WARNINGS
TRIALS, EPOCHS, RHO = 10, 3, 0.5


class LrFinder(pl.callbacks.LearningRateFinder):
    """The finder of Lightning, without its choice."""

    def __init__(self):
        super().__init__(min_lr=1e-2, max_lr=1.0, num_training_steps=TRIALS, early_stop_threshold=None, attr_name="lr")

    def on_fit_start(self, *args):
        super().on_fit_start(*args)
        args[1].lr = 0.1
        for group in args[0].optimizers[0].param_groups:
            group["lr"] = 0.1


class BatchFinder(pl.callbacks.BatchSizeFinder):
    """The finder of Lightning, without its choice."""

    def __init__(self):
        super().__init__(steps_per_trial=2, max_trials=2)

    def on_fit_start(self, trainer, module):
        super().on_fit_start(trainer, module)
        module.batch_size = 2


class Tunable(Classifier):
    """A classifier with the attributes that the finders change."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.lr, self.batch_size = 0.1, 2
        self.raises = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def training_step(self, batch, batch_idx):
        CALLS.append(batch_idx)  # SAMCallback restores attributes of the module
        if self.raises and len(CALLS) == 6:
            raise OSError("the second pass of a trial")
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([batch(i) for i in range(BATCHES)], batch_size=None)


CALLS = []


def trainer_with(*callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), **{"max_epochs": EPOCHS, **quiet, **options}
    )


def train(module, *callbacks, **options):
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(module)
    return trainer


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    CALLS.clear()
    monkeypatch.chdir(tmp_path)  # the finders write checkpoints to the working directory


def smoothed_losses(rates, k, rho=RHO):
    """Return the losses of SAM at these learning rates, smoothed as the finder does."""
    module = Tunable()
    optimizer = steppe.SAM(module.configure_optimizers(), rho=rho, model=module)
    average, smoothed = 0.0, []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for sam_pass in optimizer.passes():
            with sam_pass:
                for i in range(k):
                    x, y = batch((step * k + i) % BATCHES)
                    loss = F.cross_entropy(module.model(x), y)
                    (loss / k).backward()
            if sam_pass.is_first:
                average = 0.98 * average + 0.02 * loss.item() / k  # as Lightning has it
        optimizer.step()
        smoothed.append(average / (1 - 0.98 ** (step + 2)))
    return smoothed


@pytest.mark.parametrize("k", [1, 5])
def test_tuner_measures_the_losses_of_sam(k):
    module, trainer = Tunable(), trainer_with(SAMCallback(rho=RHO), accumulate_grad_batches=k, max_epochs=TRIALS)
    options = {"num_training": TRIALS, "min_lr": 1e-2, "max_lr": 1.0, "early_stop_threshold": None}
    found = pl.tuner.Tuner(trainer).lr_find(module, **options).results
    assert len(found["lr"]) == TRIALS
    assert found["loss"] == pytest.approx(smoothed_losses(found["lr"], k), rel=1e-5)
    assert found["loss"] != pytest.approx(smoothed_losses(found["lr"], k, rho=0.0), rel=1e-3)


def test_batch_size_finder_runs_both_passes():
    pl.tuner.Tuner(trainer_with(SAMCallback(rho=RHO))).scale_batch_size(Tunable(), steps_per_trial=2, max_trials=2)
    assert len(CALLS) == 2 * 2 * 2, "two passes of two steps in two trials"


@pytest.mark.parametrize("finder", [LrFinder, BatchFinder])
@pytest.mark.parametrize("k", [1, 2])
def test_trials_leave_no_trace_in_the_training(finder, k):
    module, twin = Tunable(), Tunable()
    trainer = train(module, SAMCallback(rho=RHO), finder(), accumulate_grad_batches=k)
    optimizer = steppe.SAM(twin.configure_optimizers(), rho=RHO, model=twin)
    by_hand(twin.model, optimizer, k=k, epochs=EPOCHS)
    assert model_bits(module) == model_bits(twin)
    assert state_bits(trainer.optimizers[0])[0] == state_bits(optimizer)[0]


def test_finder_in_a_later_epoch_takes_steps_of_sam():
    class Later(LrFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                before = len(CALLS)
                super().on_fit_start(trainer, module)
                self.calls = len(CALLS) - before

    finder = Later()
    train(Tunable(), SAMCallback(rho=RHO), finder)
    assert finder.calls == 2 * len(finder.optimal_lr.results["lr"]) > 0


def test_fit_after_an_error_in_a_trial_equals_the_loop_by_hand():
    module, twin = Tunable(), Tunable()
    module.raises = True
    callback = SAMCallback(rho=RHO)
    finder = LrFinder()
    with pytest.raises(OSError, match="the second pass of a trial"):
        train(module, finder, callback)
    assert model_bits(module) == model_bits(twin)
    module.raises = False
    train(module, callback, accumulate_grad_batches=2)
    by_hand(twin.model, steppe.SAM(twin.configure_optimizers(), rho=RHO, model=twin), k=2, epochs=EPOCHS)
    assert model_bits(module) == model_bits(twin)
