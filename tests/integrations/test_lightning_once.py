"""What a step must not do twice (logs, metrics, hooks), what it logs, what is refused, what an exception leaves."""

import collections

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from test_lightning import (
    BATCHES,
    METHODS,
    Classifier,
    MixedPrecision,
    SAMCallback,
    by_hand,
    fit,
    pl,
    pytestmark,  # noqa: F401
)

import steppe
from support import BASES, batch, bits, model_bits, net

COUNTED = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Counting(pl.Callback):
    def __init__(self):
        self.counts = collections.Counter()
        for hook in COUNTED:
            setattr(self, hook, lambda *args, hook=hook: self.counts.update([hook]))


class Busy(Classifier):
    """A training step with every kind of state that people keep."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.both = torchmetrics.MetricCollection(
            [torchmetrics.classification.MulticlassPrecision(3), torchmetrics.classification.MulticlassRecall(3)]
        )
        self.kept = torchmetrics.CatMetric()
        self.outputs, self.by_name, self.calls = [], {"losses": collections.deque()}, 0
        self.moved = torch.zeros(3)
        self.zeroed = 0

    def on_before_zero_grad(self, optimizer):
        self.zeroed += 1

    def on_after_backward(self):
        for p in self.model.layers[7].parameters():
            p.grad.mul_(0.5)  # a hook of the module is a part of its gradient: it acts in every pass

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.model(x)
        loss = F.cross_entropy(output, y)
        self.accuracy(output, y)
        self.both.update(output, y)
        self.kept.update(loss.detach())
        self.outputs.append(loss.detach())
        self.by_name["losses"].append(loss.detach())
        self.by_name[f"batch {batch_idx}"] = self.calls
        self.calls += 1
        self.moved += loss.detach()
        self.log("loss", loss, on_epoch=True, prog_bar=True, batch_size=len(y))
        self.log("accuracy", self.accuracy, on_epoch=True, on_step=False)
        self.log_dict(self.both, on_epoch=True, on_step=False)
        return {"loss": loss, "output": output.detach()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert torch.equal(outputs["loss"] * self.trainer.accumulate_grad_batches, self.outputs[-1])

    def on_train_epoch_end(self):
        self.results = self.kept.compute()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_nothing_is_counted_twice(lr, k):
    """With lr = 0 all that SAM leaves is what plain training leaves."""
    runs = []
    for callbacks in ([SAMCallback(rho=0.5)], []) if lr == 0 else ([SAMCallback(rho=0.5)],):
        module, counting = Busy(), Counting()
        module.base = lambda params: torch.optim.SGD(params, lr=lr)
        trainer = fit(module, *callbacks, counting, max_epochs=1, accumulate_grad_batches=k)
        values = {name: value.tolist() for name, value in trainer.callback_metrics.items()}
        state = {
            "counts": counting.counts,
            "steps": trainer.global_step,
            "values": values,
            "bar": sorted(trainer.progress_bar_metrics),
            "results": bits([module.results]),
            "plain": [module.calls, module.zeroed, list(module.by_name)],
            "lists": [bits(module.outputs), bits(module.by_name["losses"])],
            "tensor": bits([module.moved]),
        }
        runs.append({**state, "model": model_bits(module.model)})
    assert runs[0]["plain"][0] == BATCHES
    assert runs[0]["steps"] == runs[0]["counts"]["on_before_zero_grad"] == -(-BATCHES // k)
    assert runs[0]["counts"]["on_after_backward"] == BATCHES
    assert all(run == runs[0] for run in runs)


def test_a_module_s_own_backward_hook_acts_in_every_pass():
    module, twin = Busy(), net()
    fit(module, SAMCallback(rho=0.5), max_epochs=1)
    optimizer = steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    for p in twin.layers[7].parameters():
        p.register_hook(lambda g: g * 0.5)
    by_hand(twin, optimizer, epochs=1)
    assert model_bits(module.model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", ["sam", "msam", "looksam"])
def test_the_log_says_what_the_climb_found(method, k):
    class Reading(Classifier):
        read = ()

        def log(self, name, value, **options):
            assert isinstance(value, torch.Tensor)
            self.now[name] = value.item()
            super().log(name, value, **options)

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.now = {}
            self.read = [*self.read, self.now]

    module, twin = Reading(), net()
    fit(module, SAMCallback(METHODS[method], log=True), max_epochs=1, accumulate_grad_batches=k)
    optimizer, expected, losses = METHODS[method](BASES["momentum"](twin.parameters()), model=twin), [], {}

    def loss(output, y):
        value, ascent_steps = F.cross_entropy(output, y), optimizer.current_pass.is_perturbed
        losses[ascent_steps] = losses.get(ascent_steps, 0) + value.item() / k
        return value

    def after():
        expected.append({"sam/perturbed_loss": losses[True]} if True in losses else {})
        if losses.keys() == {False, True}:
            expected[-1]["sam/sharpness"] = losses[True] - losses[False]
        losses.clear()

    by_hand(twin, optimizer, k=k, epochs=1, loss=loss, after=after)
    ends = [i for i in range(BATCHES) if (i + 1) % k == 0 or i + 1 == BATCHES]
    assert sum(bool(said) for said in module.read) == sum(bool(said) for said in expected)
    assert [module.read[i] for i in ends] == [pytest.approx(e, rel=1e-5, abs=1e-6) for e in expected]


# Exceptions.


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_the_second_pass_leaves_w(error, k, monkeypatch):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx >= 2 and (sam_pass := self.optimizers().current_pass) is not None and sam_pass.is_perturbed:
                assert bits(self.parameters()) != self.before
                raise error
            return loss

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.before = bits(self.parameters())

    module, callback, counting = Failing(), SAMCallback(rho=0.5), Counting()
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning makes the process deaf to Ctrl-C
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(module, callback, counting, accumulate_grad_batches=k)
    assert bits(module.parameters()) == module.before
    assert "log" not in vars(module)
    assert "training_step" not in vars(module.trainer.strategy)
    assert counting in module.trainer.callbacks
    fit(Classifier(), callback, max_epochs=1)  # the callback can be used again


def test_a_training_step_that_returns_none_skips_the_batch():
    class Skipping(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module, twin = Skipping("sgd"), net()
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(module, SAMCallback(rho=0.5), max_epochs=1)
    optimizer = steppe.SAM(BASES["sgd"](twin.parameters()), rho=0.5, model=twin)
    for i in (0, 2, 3, 4):
        for sam_pass in optimizer.passes():
            with sam_pass:
                torch.manual_seed(100 + i)
                F.cross_entropy(twin(batch(i)[0]), batch(i)[1]).backward()
        optimizer.step()
    assert model_bits(module.model) == model_bits(twin)


# Refusals.


def refused(match, module=None, error=RuntimeError, callback=None, **options):
    with pytest.raises(error, match=match):
        fit(module or Classifier(), callback or SAMCallback(rho=0.5), **options)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_what_is_refused_says_why():
    class Iterating(Classifier):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    class OwnStep(pl.plugins.Precision):
        def optimizer_step(self, optimizer, model, closure, **kwargs):
            return optimizer.step(closure)

    class Lbfgs(Classifier):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class OnCards(pl.Trainer):
        strategy, precision_plugin = pl.strategies.FSDPStrategy(), pl.plugins.Precision()

    with pytest.raises(RuntimeError, match="FSDPStrategy: it shards weights.*strategy='ddp'"):
        SAMCallback().setup(OnCards.__new__(OnCards), Classifier(), "fit")
    with pytest.raises(RuntimeError, match="took lightning.pytorch, which was there first: import the one"):
        SAMCallback().setup(object(), Classifier(), "fit")
    refused("the batch that it takes out is gone", Iterating())
    refused("OwnStep: its optimizer_step is its own", plugins=[OwnStep()])
    refused("LBFGS cannot be the base", Lbfgs(), TypeError)
    refused("count from 0 to 0", error=ValueError, callback=SAMCallback(optimizers=[1]))
    manual = Classifier()
    manual.automatic_optimization = False
    refused("in manual optimization.*walk.is_perturbed", manual, callback=SAMCallback(log=True))
    refused(
        "argument 'model'.*which protects running statistics",
        error=TypeError,
        callback=SAMCallback(lambda base: steppe.SAM(base)),
    )
    refused("returned a SGD", error=TypeError, callback=SAMCallback(lambda base, model: base))
    with pytest.raises(TypeError, match=r"SAMCallback\(rho=0.05\)"):
        SAMCallback(0.05)


# Without the callback.


class Naive(Classifier):
    """A SAM from configure_optimizers, and no callback."""

    def configure_optimizers(self):
        return steppe.SAM(super().configure_optimizers(), rho=0.5, model=self)


def test_without_the_callback_a_loss_scaler_is_heard():
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    with pytest.raises((RuntimeError, UserWarning), match="neither passes behind it nor a closure"):
        fit(Naive(), plugins=plugins)


def test_without_the_callback_an_accumulation_is_refused():
    with pytest.raises(RuntimeError, match="accumulated before step"):
        fit(Naive(), accumulate_grad_batches=2)


def test_without_the_callback_explicit_passes_are_refused():
    class Passes(Naive):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            for sam_pass in opt.passes():
                with sam_pass:
                    self.manual_backward(super().training_step(batch, batch_idx))
            opt.step()

    with pytest.raises(RuntimeError):
        fit(Passes())
