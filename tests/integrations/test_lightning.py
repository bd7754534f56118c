"""SAMCallback against the same loop written by hand: weights, buffers and optimizer state, bit for bit."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning_reference import (
    BATCHES,
    IGNORED_WARNINGS,
    METHODS,
    Classifier,
    MixedPrecision,
    ResumableLoader,
    autocast,
    by_hand,
    fit,
    loader,
    state_bits,
)
from torch import nn

import steppe
from steppe.integrations.lightning import SAMCallback
from support import BASES, batch, bits, model_bits, net

pytestmark = IGNORED_WARNINGS

ONE_BATCH = ("sam", "gsam", "looksam", "msam", "sampa")


@pytest.mark.parametrize(
    ("method", "k"), [*((method, 2) for method in METHODS), *((method, 1) for method in ONE_BATCH)]
)
def test_fit_equals_loop_by_hand(method, k):
    module, twin = Classifier(), net()
    trainer = fit(module, SAMCallback(METHODS[method]), accumulate_grad_batches=k, max_epochs=1)
    optimizer = METHODS[method](BASES["momentum"](twin.parameters()), model=twin)
    by_hand(twin, optimizer, k=k, epochs=1)
    assert model_bits(module.model) == model_bits(twin)
    assert trainer.global_step == -(-BATCHES // k)
    assert state_bits(trainer.optimizers[0]) == state_bits(optimizer)


def test_spectral_norm_state_is_replayed_for_each_micro_batch():
    """Spectral norm reads in training what it wrote, so micro-batch 1 must run again from the same state."""

    class Spectral(Classifier):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.spectral_norm(self.model.layers[0])

    module, twin = Spectral(), Spectral()
    fit(module, SAMCallback(rho=0.5), accumulate_grad_batches=2)
    by_hand(twin.model, steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin), k=2)
    assert model_bits(module) == model_bits(twin)


# Precision.


REDUCED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def test_scale_dependent_rule_sees_unscaled_gradients():
    module, twin = Classifier(dropout=0.0), net(dropout=0.0)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    fit(module, SAMCallback(steppe.variants.fisher_sam, rho=0.5), plugins=[MixedPrecision("16-mixed", "cpu", ours)])
    base = BASES["momentum"](twin.parameters())
    optimizer = steppe.variants.fisher_sam(base, rho=0.5, model=twin, scaler=theirs)

    def step():
        theirs.step(optimizer)
        theirs.update()

    forward, loss = (autocast(torch.float16, function) for function in (twin, F.cross_entropy))
    by_hand(forward, optimizer, loss=loss, scale=theirs.scale, after=lambda: theirs.unscale_(optimizer), step=step)
    assert ours.get_scale() == theirs.get_scale() > 2.0**10
    assert model_bits(module.model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_fit_in_each_precision_equals_loop_by_hand(precision, k):
    module, twin = Classifier(dropout=0.0), net(dropout=0.0)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    callback, data = SAMCallback(rho=0.5), loader(dtype=dtype)
    optimizer = steppe.SAM(BASES["momentum"](twin.to(dtype).parameters()), rho=0.5, model=twin)
    forward, loss = (autocast(REDUCED.get(precision), function) for function in (twin, F.cross_entropy))
    options = {"accumulate_grad_batches": k}
    hand = {}
    if precision == "16-mixed":
        ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", ours)]

        def step():
            theirs.step(optimizer)
            theirs.update()

        hand = {"scale": theirs.scale, "after": lambda: theirs.unscale_(optimizer), "step": step}
    else:
        options["precision"] = precision
    fit(module, callback, data=data, max_epochs=1, **options)
    by_hand(forward, optimizer, k=k, epochs=1, loss=loss, data=partial(batch, dtype=dtype), **hand)
    assert next(module.parameters()).dtype == dtype
    assert model_bits(module.model) == model_bits(twin)


class Overflowing(Classifier):
    """Overflows at the second batch in one of the passes."""

    def __init__(self, in_pass):
        super().__init__(dropout=0.0)
        self.in_pass, self.before = in_pass, []

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.before = bits(self.parameters())

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        here = (batch_idx, int(self.optimizers().current_pass.is_perturbed))
        return loss * float("inf") if here == (1, self.in_pass) else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert (bits(self.parameters()) == self.before) == (batch_idx == 1)


@pytest.mark.parametrize("in_pass", [0, 1])
def test_overflow_in_either_pass_skips_the_step_and_halves_the_scale(in_pass):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = fit(Overflowing(in_pass), SAMCallback(rho=0.5), plugins=plugins, max_epochs=1)
    assert scaler.get_scale() == 2.0**9
    assert trainer.global_step == BATCHES


# Clipping, and the hooks that see the gradient.


class RecordsGradients(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.gradients = []

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(bits(p.grad for p in self.parameters()))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_once_on_the_update_gradient(algorithm, precision):
    module, twin, gradients, value = RecordsGradients(), net(), [], {"norm": 0.5, "value": 0.02}[algorithm]
    optimizer = steppe.variants.gsam(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))]
    clip = getattr(nn.utils, f"clip_grad_{algorithm}_")

    def after():
        gradients.append(bits(p.grad for p in twin.parameters()))
        clip(twin.parameters(), value)

    mixed = precision == "16-mixed"
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    fit(module, SAMCallback(steppe.variants.gsam, rho=0.5), **options, **({"plugins": plugins} if mixed else {}))
    forward, loss = (autocast(REDUCED.get(precision), function) for function in (twin, F.cross_entropy))
    by_hand(forward, optimizer, k=2, after=after, loss=loss)
    assert module.gradients == gradients
    assert model_bits(module.model) == model_bits(twin)


def test_configure_gradient_clipping_of_the_module_acts_once():
    class ScalesGradients(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            assert isinstance(optimizer, steppe.SAM)
            for p in self.parameters():
                p.grad.mul_(0.5)

    module, twin = ScalesGradients(), net()
    fit(module, SAMCallback(rho=0.5))
    optimizer = steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    by_hand(twin, optimizer, after=lambda: [p.grad.mul_(0.5) for p in twin.parameters()])
    assert model_bits(module.model) == model_bits(twin)


# Schedulers. A warning of torch about their order would fail the test.

SCHEDULERS = {
    "step": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.7), "interval": "step"},
    "epoch": lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.7), "interval": "epoch"},
    "cycle": lambda o: {"scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=7), "interval": "step"},
    "plateau": lambda o: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1e9),
        "monitor": "loss",
    },
}


@pytest.mark.parametrize(("name", "on"), [*((name, "base") for name in SCHEDULERS), ("cycle", "sam")])
def test_schedulers_step_as_in_loop_by_hand(name, on):
    rates = []

    class Scheduled(Classifier):
        def configure_optimizers(self):
            base = super().configure_optimizers()
            if on == "sam":
                base = steppe.SAM(base, rho=0.5, model=self)
            return {"optimizer": base, "lr_scheduler": SCHEDULERS[name](base)}

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_epoch=True, batch_size=len(batch[1]))
            return loss

        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module, twin, by_hands = Scheduled(), net(), []
    fit(module, SAMCallback(rho=0.5) if on == "base" else SAMCallback(), max_epochs=3, accumulate_grad_batches=3)
    base = BASES["momentum"](twin.parameters())
    config = SCHEDULERS[name](base)
    scheduler, every = config["scheduler"], 1 if config.get("interval") == "step" else 2

    def step():
        by_hands.append(base.param_groups[0]["lr"])
        optimizer.step()
        if len(by_hands) % every == 0 and len(by_hands) < 6:
            scheduler.step(*([1.0] if name == "plateau" else []))

    optimizer = steppe.SAM(base, rho=0.5, model=twin)
    by_hand(twin, optimizer, k=3, epochs=3, step=step)
    assert rates == by_hands
    assert len(set(rates)) > 2
    assert model_bits(module.model) == model_bits(twin)


# Construction of the optimizer.


def test_ready_made_sam_is_not_wrapped_again():
    class MakesSam(Classifier):
        def configure_optimizers(self):
            return steppe.variants.asam(super().configure_optimizers(), rho=0.5, model=self)

    module, twin = MakesSam(), net()
    trainer = fit(module, SAMCallback(), accumulate_grad_batches=2)
    by_hand(twin, METHODS["asam"](BASES["momentum"](twin.parameters()), model=twin), k=2)
    assert type(trainer.optimizers[0].base) is torch.optim.SGD
    assert model_bits(module.model) == model_bits(twin)
    with pytest.raises(ValueError, match="returned a SAM, so SAM, rho=0.1 of SAMCallback would have no effect"):
        fit(MakesSam(), SAMCallback(rho=0.1))


def test_ready_made_sam_without_model_gets_the_module():
    class MakesSam(Classifier):
        def configure_optimizers(self):
            return steppe.SAM(super().configure_optimizers(), rho=0.5)

    module, twin = MakesSam(), net()
    trainer = fit(module, SAMCallback(), accumulate_grad_batches=2)
    by_hand(twin, steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin), k=2)
    assert trainer.optimizers[0].model is module
    assert model_bits(module.model) == model_bits(twin)


def test_current_pass_of_the_callback_is_that_of_the_optimizer():
    perturbed = []

    class RecordsPasses(Classifier):
        def training_step(self, batch, batch_idx):
            assert callback.current_pass is self.optimizers().current_pass
            perturbed.append(callback.current_pass.is_perturbed)
            return super().training_step(batch, batch_idx)

    callback = SAMCallback(rho=0.5)
    fit(RecordsPasses(), callback, max_epochs=1)
    assert perturbed == [False, True] * BATCHES
    assert callback.current_pass is None


def test_second_fit_evaluation_and_fast_dev_run_work_as_in_plain_lightning():
    module, twin = Classifier(), net()
    module.validation_step = module.test_step = module.predict_step = module.training_step
    callback = SAMCallback(rho=0.5)
    trainer = fit(module, callback, fast_dev_run=True)
    assert "training_step" not in vars(trainer.strategy)
    before = model_bits(module)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(module, loader())
    assert model_bits(module) == before
    fit(module, callback, max_epochs=1)
    for n in (1, BATCHES):
        by_hand(twin, steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin), epochs=1, n=n)
    assert model_bits(module.model) == model_bits(twin)


# Checkpoints.


@pytest.mark.parametrize("method", ["vasso", "looksam", "sampa"])
def test_resuming_in_mid_epoch_gives_the_same_bits(method, tmp_path):
    def run(steps, **options):
        module = Classifier()
        trainer = fit(
            module, SAMCallback(METHODS[method]), data=ResumableLoader(), max_steps=steps, max_epochs=9, **options
        )
        return module, trainer

    whole, at_once = run(8)
    _, trainer = run(3)  # in the middle of the first epoch
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed, trainer = run(8, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 8
    assert model_bits(resumed) == model_bits(whole)
    assert state_bits(trainer.optimizers[0]) == state_bits(at_once.optimizers[0])


def test_checkpoint_of_the_plain_optimizer_loads(tmp_path):
    module, twin = Classifier(), net()
    trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    module = Classifier()
    trainer = fit(module, SAMCallback(rho=0.5), ckpt_path=tmp_path / "x.ckpt")
    base = BASES["momentum"](twin.parameters())
    for i in range(BATCHES):
        torch.manual_seed(100 + i)
        base.zero_grad()
        x, y = batch(i)
        F.cross_entropy(twin(x), y).backward()
        base.step()
    by_hand(twin, steppe.SAM(base, rho=0.5, model=twin), epochs=1)
    assert model_bits(module.model) == model_bits(twin)
