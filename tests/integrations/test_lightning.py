"""SAMCallback against the same loop written by hand: weights, buffers and optimizer state, bit for bit."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from support import BASES, batch, bits, model_bits, net

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

from steppe.integrations.lightning import SAMCallback

pytestmark = [
    # Lightning on this small problem: no workers, no steps between two logs, a loader that is no DataLoader, ...
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step` but have no `val_dataloader`.*"),
]
BATCHES = 5


class Classifier(pl.LightningModule):
    """Batch i is seen with seed 100 + i, so that a loop by hand can draw the same dropout masks."""

    def __init__(self, base="momentum", **options):
        super().__init__()
        self.model, self.base, self.options = net(**options), BASES[base], options

    def configure_optimizers(self):
        return self.base(self.parameters())

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 + batch_idx)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)


def state_bits(optimizer):
    """Momentum, rule memory, step counter."""
    state, groups = optimizer.state_dict()["state"], optimizer.state_dict()["param_groups"]
    flat = {(i, name): v for i, entries in state.items() for name, v in entries.items()}
    return {k: bits([v]) if isinstance(v, torch.Tensor) else v for k, v in flat.items()}, groups


def loader(n=BATCHES, dtype=torch.float32):
    return torch.utils.data.DataLoader([batch(i, dtype=dtype) for i in range(n)], batch_size=None)


def fit(module, *callbacks, data=None, ckpt_path=None, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 2, "devices": 1, **quiet, **options}
    )
    trainer.fit(module, data or loader(), ckpt_path=ckpt_path)
    return trainer


def by_hand(
    model,
    optimizer,
    *,
    k=1,
    epochs=2,
    n=BATCHES,
    after=lambda: None,
    step=None,
    loss=F.cross_entropy,
    data=batch,
    scale=None,
):
    """What a fit is to equal."""
    for _ in range(epochs):
        for start in range(0, n, k):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    for i in range(start, min(start + k, n)):
                        torch.manual_seed(100 + i)
                        x, y = data(i)
                        value = loss(model(x), y) / k
                        (value if scale is None else scale(value)).backward()
            after()
            (step or optimizer.step)()


METHODS = {
    "sam": partial(steppe.SAM, rho=0.5),
    "asam": partial(steppe.variants.asam, rho=0.5),
    "gsam": partial(steppe.variants.gsam, rho=0.5),
    "vasso": partial(steppe.variants.vasso, rho=0.5),
    "twice": partial(steppe.SAM, rho=0.5, perturbation=steppe.AscentSteps(steppe.L2(), 2)),
    "looksam": partial(steppe.variants.looksam, rho=0.5, k=2),
    "aesam": partial(steppe.variants.aesam, rho=0.5, steps=10),
    "msam": partial(steppe.variants.msam, rho=0.5),
    "rwp": partial(steppe.variants.rwp, rho=0.05),
    "mixed_rwp": partial(steppe.variants.mixed_rwp, rho=0.05),
    "lookbehind": partial(steppe.variants.lookbehind_sam, rho=0.5),
    "sampa": partial(steppe.variants.sampa, rho=0.5),
}


ONE_BATCH = ("sam", "gsam", "looksam", "msam", "sampa")


@pytest.mark.parametrize(
    ("method", "k"), [*((method, 2) for method in METHODS), *((method, 1) for method in ONE_BATCH)]
)
def test_a_fit_equals_a_loop_by_hand(method, k):
    module, twin = Classifier(), net()
    trainer = fit(module, SAMCallback(METHODS[method]), accumulate_grad_batches=k, max_epochs=1)
    optimizer = METHODS[method](BASES["momentum"](twin.parameters()), model=twin)
    by_hand(twin, optimizer, k=k, epochs=1)
    assert model_bits(module.model) == model_bits(twin)
    assert trainer.global_step == -(-BATCHES // k)
    assert state_bits(trainer.optimizers[0]) == state_bits(optimizer)


def test_a_cumulative_state_of_the_model_is_replayed_for_each_micro_batch():
    """Spectral norm reads in training what it writes: micro-batch 1 must be seen again as it was seen."""

    class Spectral(Classifier):
        def __init__(self):
            super().__init__()
            nn.utils.parametrizations.spectral_norm(self.model.layers[0])

    module, twin = Spectral(), Spectral()
    fit(module, SAMCallback(rho=0.5), accumulate_grad_batches=2)
    by_hand(twin.model, steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin), k=2)
    assert model_bits(module) == model_bits(twin)


# Precision.


def under(dtype, function):
    """The function, under autocast where there is a dtype for it."""

    def reduced(*args):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            return function(*args)

    return reduced


REDUCED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def test_a_rule_that_depends_on_the_size_of_the_gradient_sees_it_without_the_scale():
    module, twin = Classifier(dropout=0.0), net(dropout=0.0)
    ours, theirs = (torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2))
    fit(module, SAMCallback(steppe.variants.fisher_sam, rho=0.5), plugins=[MixedPrecision("16-mixed", "cpu", ours)])
    base = BASES["momentum"](twin.parameters())
    optimizer = steppe.variants.fisher_sam(base, rho=0.5, model=twin, scaler=theirs)

    def step():
        theirs.step(optimizer)
        theirs.update()

    forward, loss = (under(torch.float16, function) for function in (twin, F.cross_entropy))
    by_hand(forward, optimizer, loss=loss, scale=theirs.scale, after=lambda: theirs.unscale_(optimizer), step=step)
    assert ours.get_scale() == theirs.get_scale() > 2.0**10
    assert model_bits(module.model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_precision(precision, k):
    module, twin = Classifier(dropout=0.0), net(dropout=0.0)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    callback, data = SAMCallback(rho=0.5), loader(dtype=dtype)
    optimizer = steppe.SAM(BASES["momentum"](twin.to(dtype).parameters()), rho=0.5, model=twin)
    forward, loss = (under(REDUCED.get(precision), function) for function in (twin, F.cross_entropy))
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
    """The second batch overflows in one of the passes."""

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
def test_an_overflow_in_either_pass_skips_the_step_and_halves_the_scale(in_pass):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = fit(Overflowing(in_pass), SAMCallback(rho=0.5), plugins=plugins, max_epochs=1)
    assert scaler.get_scale() == 2.0**9
    assert trainer.global_step == BATCHES


# Clipping, and the hooks that see the gradient.


class Watching(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(bits(p.grad for p in self.parameters()))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_once_on_the_gradient_that_goes_down(algorithm, precision):
    module, twin, seen, value = Watching(), net(), [], {"norm": 0.5, "value": 0.02}[algorithm]
    optimizer = steppe.variants.gsam(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))]
    clip = getattr(nn.utils, f"clip_grad_{algorithm}_")

    def after():
        seen.append(bits(p.grad for p in twin.parameters()))
        clip(twin.parameters(), value)

    mixed = precision == "16-mixed"
    options = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    fit(module, SAMCallback(steppe.variants.gsam, rho=0.5), **options, **({"plugins": plugins} if mixed else {}))
    forward, loss = (under(REDUCED.get(precision), function) for function in (twin, F.cross_entropy))
    by_hand(forward, optimizer, k=2, after=after, loss=loss)
    assert module.seen == seen
    assert model_bits(module.model) == model_bits(twin)


def test_configure_gradient_clipping_of_the_module_is_used():
    class Scaled(Classifier):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            assert isinstance(optimizer, steppe.SAM)
            for p in self.parameters():
                p.grad.mul_(0.5)

    module, twin = Scaled(), net()
    fit(module, SAMCallback(rho=0.5))
    optimizer = steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    by_hand(twin, optimizer, after=lambda: [p.grad.mul_(0.5) for p in twin.parameters()])
    assert model_bits(module.model) == model_bits(twin)


# Schedulers; any warning fails the test.

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
def test_schedulers(name, on):
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


# Who makes the optimizer.


def test_a_sam_of_the_module_is_not_wrapped_twice():
    class Own(Classifier):
        def configure_optimizers(self):
            return steppe.variants.asam(super().configure_optimizers(), rho=0.5, model=self)

    module, twin = Own(), net()
    trainer = fit(module, SAMCallback(), accumulate_grad_batches=2)
    by_hand(twin, METHODS["asam"](BASES["momentum"](twin.parameters()), model=twin), k=2)
    assert type(trainer.optimizers[0].base) is torch.optim.SGD
    assert model_bits(module.model) == model_bits(twin)
    with pytest.raises(ValueError, match="returned a SAM, so SAM, rho=0.1 of SAMCallback would have no effect"):
        fit(Own(), SAMCallback(rho=0.1))


def test_a_second_fit_and_evaluation_and_a_fast_dev_run_are_plain_lightning():
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


class Resumable:
    """A loader that knows where it is."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        while self.at < BATCHES:
            self.at += 1
            yield batch(self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("method", ["vasso", "looksam", "sampa"])
def test_a_resumed_run_is_the_uninterrupted_run(method, tmp_path):
    def run(steps, **options):
        module = Classifier()
        trainer = fit(module, SAMCallback(METHODS[method]), data=Resumable(), max_steps=steps, max_epochs=9, **options)
        return module, trainer

    whole, at_once = run(8)
    _, trainer = run(3)  # in the middle of the first epoch
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed, trainer = run(8, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 8
    assert model_bits(resumed) == model_bits(whole)
    assert state_bits(trainer.optimizers[0]) == state_bits(at_once.optimizers[0])


def test_a_checkpoint_of_the_plain_optimizer_loads(tmp_path):
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
