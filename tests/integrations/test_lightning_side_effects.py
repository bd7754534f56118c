"""SAMCallback counts a step once in logs, metrics and hooks, logs its metrics, and restores after exceptions."""

import collections
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning_reference import BATCHES, IGNORED_WARNINGS, METHODS, Classifier, by_hand, fit, pl

import steppe
from steppe.integrations.lightning import SAMCallback
from support import BASES, batch, bits, model_bits, net

pytestmark = IGNORED_WARNINGS

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


class KeepsState(Classifier):
    """A module that keeps state of every kind outside its buffers."""

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
def test_logs_metrics_hooks_and_attributes_count_one_pass(lr, k):
    """With lr = 0, SAM must leave exactly what plain training leaves."""
    runs = []
    for callbacks in ([SAMCallback(rho=0.5)], []) if lr == 0 else ([SAMCallback(rho=0.5)],):
        module, counting = KeepsState(), Counting()
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


def test_backward_hook_of_the_module_acts_in_every_pass():
    module, twin = KeepsState(), net()
    fit(module, SAMCallback(rho=0.5), max_epochs=1)
    optimizer = steppe.SAM(BASES["momentum"](twin.parameters()), rho=0.5, model=twin)
    for p in twin.layers[7].parameters():
        p.register_hook(lambda g: g * 0.5)
    by_hand(twin, optimizer, epochs=1)
    assert model_bits(module.model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", ["sam", "msam", "looksam"])
def test_log_sharpness_logs_perturbed_loss_and_sharpness(method, k):
    class RecordsLogs(Classifier):
        logs = ()

        def log(self, name, value, **options):
            assert isinstance(value, torch.Tensor)
            self.now[name] = value.item()
            super().log(name, value, **options)

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            self.now = {}
            self.logs = [*self.logs, self.now]

    module, twin = RecordsLogs(), net()
    fit(module, SAMCallback(METHODS[method], log_sharpness=True), max_epochs=1, accumulate_grad_batches=k)
    optimizer, expected, losses = METHODS[method](BASES["momentum"](twin.parameters()), model=twin), [], {}

    def loss(output, y):
        value, is_perturbed = F.cross_entropy(output, y), optimizer.current_pass.is_perturbed
        losses[is_perturbed] = losses.get(is_perturbed, 0) + value.item() / k
        return value

    def after():
        expected.append({"perturbed_loss": losses[True]} if True in losses else {})
        if losses.keys() == {False, True}:
            expected[-1]["sharpness"] = losses[True] - losses[False]
        losses.clear()

    by_hand(twin, optimizer, k=k, epochs=1, loss=loss, after=after)
    ends = [i for i in range(BATCHES) if (i + 1) % k == 0 or i + 1 == BATCHES]
    assert sum(bool(entry) for entry in module.logs) == sum(bool(entry) for entry in expected)
    assert [module.logs[i] for i in ends] == [pytest.approx(e, rel=1e-5, abs=1e-6) for e in expected]


# Exceptions.


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_exception_in_the_second_pass_restores_the_weights(error, k, monkeypatch):
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
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning would turn Ctrl-C off for the process
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(module, callback, counting, accumulate_grad_batches=k)
    assert bits(module.parameters()) == module.before
    assert "log" not in vars(module)
    assert "training_step" not in vars(module.trainer.strategy)
    assert counting in module.trainer.callbacks
    fit(Classifier(), callback, max_epochs=1)  # the callback can be used again


def in_a_dict(i):
    x, y = batch(i)
    return {"inputs": [x], "y": y}


def loader_of_dicts():
    return torch.utils.data.DataLoader([in_a_dict(i) for i in range(BATCHES)], batch_size=None)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", ["sam", "twice", "msam"])
def test_training_step_may_change_the_dicts_and_lists_of_its_batch(method, k):
    class Changing(Classifier):
        def training_step(self, batch, batch_idx):
            y = batch.pop("y")
            batch["inputs"][0] = batch["inputs"][0] * 0.5
            return F.cross_entropy(self.model(batch["inputs"][0]), y)

    module, twin = Changing(), net()
    fit(module, SAMCallback(METHODS[method]), data=loader_of_dicts(), max_epochs=1, accumulate_grad_batches=k)
    optimizer = METHODS[method](BASES["momentum"](twin.parameters()), model=twin)
    by_hand(twin, optimizer, k=k, epochs=1, data=lambda i: (batch(i)[0] * 0.5, batch(i)[1]))
    assert model_bits(module.model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
def test_training_step_that_changes_its_batch_in_place_warns(k):
    class Changing(Classifier):
        def training_step(self, batch, batch_idx):
            batch["inputs"][0].mul_(self.factor)
            return F.cross_entropy(self.model(batch["inputs"][0]), batch["y"])

    module = Changing()
    module.factor = 0.5
    with pytest.warns(UserWarning, match=r"training_step changes a tensor in place \(batch\['inputs'\]\[0\]\)"):
        fit(module, SAMCallback(), data=loader_of_dicts(), max_epochs=1, accumulate_grad_batches=k)
    module.factor = 1.0  # each pass leaves the same batch
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training_step")
        fit(module, SAMCallback(), data=loader_of_dicts(), max_epochs=1, accumulate_grad_batches=k)


def test_training_step_that_returns_none_skips_the_batch():
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


def test_c36_callback_reports_what_its_optimizer_did(caplog):
    callback = SAMCallback(rho=1e-5)
    with caplog.at_level("INFO"):
        fit(Classifier(), callback, max_epochs=1)
    (report,) = callback.reports()
    assert report.perturbed_steps == report.steps == BATCHES
    assert report.length_in_rho == pytest.approx(1.0, rel=0.05)
    assert report.loss is not None
    assert any("too small" in hint for hint in report.hints)
    assert "SAMCallback: rho may be too small" in caplog.text
