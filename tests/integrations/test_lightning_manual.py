"""SAMCallback in manual optimization: closures, explicit passes, several optimizers."""

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
    state_bits,
)
from torch import nn

import steppe
from steppe.integrations.lightning import SAMCallback
from support import BASES, batch, model_bits, net

pytestmark = IGNORED_WARNINGS


class Manual(Classifier):
    def __init__(self, form, **options):
        super().__init__(**options)
        self.form, self.automatic_optimization = form, False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        assert isinstance(opt, steppe.SAM)

        def closure():
            opt.zero_grad()
            loss = super(Manual, self).training_step(batch, batch_idx)
            self.log("loss", loss, on_epoch=True, on_step=False, batch_size=1)
            self.manual_backward(loss)
            return loss

        if self.form == "closure":
            loss = opt.step(closure)
        else:
            for sam_pass in opt.passes():
                with sam_pass:
                    value = closure()
                    loss = value if sam_pass.is_first else loss
            assert opt.step() is None
        return loss


@pytest.mark.parametrize("form", ["closure", "passes"])
@pytest.mark.parametrize("method", ["gsam", "msam", "twice", "sampa"])
def test_manual_optimization_equals_loop_by_hand(method, form):
    module, twin = Manual(form), net()
    trainer = fit(module, SAMCallback(METHODS[method]), max_epochs=1)
    optimizer, losses = METHODS[method](BASES["momentum"](twin.parameters()), model=twin), []

    def loss(output, y):
        value = F.cross_entropy(output, y)
        if optimizer.current_pass.is_first:
            losses.append(value.detach())
        return value

    by_hand(twin, optimizer, epochs=1, loss=loss)
    assert model_bits(module.model) == model_bits(twin)
    assert trainer.global_step == BATCHES
    assert torch.equal(trainer.callback_metrics["loss"], sum(losses) / BATCHES), "the first pass alone is logged"


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_manual_run_resumed_in_mid_epoch_gives_the_same_bits(form, tmp_path):
    def run(steps, **options):
        module = Manual(form)
        callback = SAMCallback(METHODS["looksam"])
        return module, fit(module, callback, data=ResumableLoader(), max_steps=steps, max_epochs=9, **options)

    whole, at_once = run(8)
    _, trainer = run(3)  # in the middle of the first epoch
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed, trainer = run(8, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 8
    assert model_bits(resumed) == model_bits(whole)
    assert state_bits(trainer.optimizers[0]) == state_bits(at_once.optimizers[0])


@pytest.mark.parametrize("form", ["closure", "passes"])
def test_manual_optimization_with_loss_scaler_equals_loop_by_hand(form):
    module, twin = Manual(form, dropout=0.0), net(dropout=0.0)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    fit(module, SAMCallback(rho=0.5), plugins=[MixedPrecision("16-mixed", "cpu", ours)], max_epochs=1)
    optimizer = steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)

    def step():
        theirs.step(optimizer)
        theirs.update()

    forward, loss = (autocast(torch.float16, function) for function in (twin, F.cross_entropy))
    after = lambda: theirs.unscale_(optimizer)  # noqa: E731
    by_hand(forward, optimizer, epochs=1, loss=loss, scale=theirs.scale, after=after, step=step)
    assert model_bits(module.model) == model_bits(twin)


class Gan(Classifier):
    """A generator and a critic with an optimizer each."""

    def __init__(self, sam=(0, 1)):
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization, self.sam = False, sam
        self.g = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.d = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return [torch.optim.SGD(self.g.parameters(), lr=0.1), torch.optim.Adam(self.d.parameters(), lr=0.01)]

    def losses(self, batch):
        x = batch[0][:, 0, 0, :4]
        fake = self.g(x.flip(0))
        return lambda: self.d(fake).mean(), lambda: F.softplus(self.d(x)).mean() - self.d(fake.detach()).mean()

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for player, opt in enumerate(optimizers):
            if player in self.sam:
                with opt.toggle_model():
                    for sam_pass in opt.passes():
                        with sam_pass:
                            self.manual_backward(self.losses(batch)[player]())
                    opt.step()
            else:
                opt.zero_grad()
                self.manual_backward(self.losses(batch)[player]())
                opt.step()


@pytest.mark.parametrize(
    ("callbacks", "radii"),
    [
        ([SAMCallback(rho=0.3)], (0.3, 0.3)),
        ([SAMCallback(rho=0.3, optimizers=[1])], (None, 0.3)),
        (
            [SAMCallback(rho=0.1, optimizers=[0]), SAMCallback(steppe.variants.asam, rho=0.3, optimizers=[1])],
            (0.1, 0.3),
        ),
    ],
    ids=["both", "one", "each its own"],
)
def test_two_optimizers_equal_loop_by_hand(callbacks, radii):
    wrapped = [player for player in (0, 1) if radii[player] is not None]
    module, twin = Gan(wrapped), Gan()
    trainer = fit(module, *callbacks, max_epochs=1)
    assert [isinstance(o, steppe.SAM) for o in trainer.optimizers] == [r is not None for r in radii]
    optimizers = twin.configure_optimizers()
    for player in wrapped:
        make = steppe.variants.asam if len(callbacks) == 2 and player == 1 else steppe.SAM
        optimizers[player] = make(optimizers[player], rho=radii[player], model=twin)
    for i in range(BATCHES):
        for player, optimizer in enumerate(optimizers):
            others = (twin.d, twin.g)[player]
            others.requires_grad_(False)
            if player in wrapped:
                for sam_pass in optimizer.passes():
                    with sam_pass:
                        twin.losses(batch(i))[player]().backward()
            else:
                optimizer.zero_grad()
                others.requires_grad_(True)
                twin.losses(batch(i))[player]().backward()
            others.requires_grad_(True)
            optimizer.step()
    assert model_bits(module) == model_bits(twin)
    assert trainer.global_step == 2 * BATCHES


# Mistakes that would turn SAM off or mix gradients.


class PlainStep(Classifier):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        opt.step()


def test_plain_step_raises():
    with pytest.raises(RuntimeError, match=r"plain step of SGD, without.*opt.passes\(\).*SAMCallback\(optimizers="):
        fit(PlainStep(), SAMCallback(rho=0.5))


def test_gradients_accumulated_before_the_closure_raise():
    class Accumulating(PlainStep):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            opt.step(lambda: self.manual_backward(Classifier.training_step(self, batch, batch_idx)))

    with pytest.raises(RuntimeError, match="added to gradients that were accumulated before"):
        fit(Accumulating(), SAMCallback(rho=0.5))


def test_first_step_raises():
    class Classic(PlainStep):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            self.manual_backward(Classifier.training_step(self, batch, batch_idx))
            opt.first_step()

    with pytest.raises(RuntimeError, match="bypasses Lightning's step counter and loss scaling"):
        fit(Classic(), SAMCallback(rho=0.5))


def test_step_skipped_by_the_scaler_is_not_taken_later():
    class Forgetting(PlainStep):
        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            if batch_idx == 0:
                for sam_pass in opt.passes():
                    with sam_pass:
                        self.manual_backward(Classifier.training_step(self, batch, batch_idx) * float("inf"))
            opt.step()

    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises(RuntimeError, match="without a closure and without passes before it"):
        fit(Forgetting(), SAMCallback(rho=0.5), plugins=plugins)
