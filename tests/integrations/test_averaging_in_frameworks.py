"""Averaged weights in Accelerate, Fabric, skorch, ignite and Keras: the hook on the optimizer is enough."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe.averaging import EMA, SWA
from support import batch, bits, net


def mean_of(seen):
    return [torch.stack(values).mean(0) for values in zip(*seen, strict=True)]


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def close(averaged, seen):
    assert int(averaged.n_averaged) == len(seen)
    torch.testing.assert_close(weights(averaged.module), mean_of(seen))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_averages_steps_not_micro_batches(precision):
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate_state import reset_accelerate_state

    from steppe.integrations.accelerate import passes

    reset_accelerate_state()
    model = net()
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model, prepared = accelerator.prepare(model, optimizer)
    averaged = SWA(model, prepared)
    seen = []
    for step in range(3):
        for sam_pass in passes(accelerator, prepared, 2):
            with sam_pass:
                for part in range(2):
                    x, y = batch(2 * step + part)
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(x), y))
        prepared.step()
        seen.append(weights(model))
    reset_accelerate_state()
    close(averaged, seen)
    averaged.eval()
    model.eval()
    x, _ = batch(9)
    with torch.no_grad(), averaged.applied():
        torch.testing.assert_close(averaged(x), model(x))
    assert not torch.equal(averaged(x), model(x))


@pytest.mark.parametrize("form", ["passes", "closure"])
def test_fabric_averages_from_the_optimizer_before_and_after_setup(form):
    fabric_package = pytest.importorskip("lightning.fabric")
    model = net()
    sam = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    before = SWA(model, sam)
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, sam)
    after = SWA(model, optimizer)
    seen = []
    for step in range(3):
        x, y = batch(step)
        if form == "passes":
            for sam_pass in optimizer.passes():
                with sam_pass:
                    fabric.backward(F.cross_entropy(wrapped(x), y))
            optimizer.step()
        else:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(wrapped(x), y)
                fabric.backward(loss)
                return loss

            optimizer.step(closure)
        seen.append(weights(model))
    close(before, seen)
    close(after, seen)


def test_skorch_averages_by_a_callback():
    pytest.importorskip("skorch")
    import skorch
    from example_files import load_example

    class Averaging(skorch.callbacks.Callback):
        def on_train_begin(self, net, **kwargs):
            self.averaged_ = SWA(net.module_, net.optimizer_)
            self.seen_ = []

        def on_batch_end(self, net, training, **kwargs):
            if training:
                self.seen_.append(weights(net.module_))

    averaging = Averaging()
    net = load_example("skorch_net.py").net(callbacks=[averaging], train_split=None, max_epochs=2, batch_size=16)
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).numpy()
    net.fit(x, x[:, :10].argmax(1))
    averaging = dict(net.callbacks_)["Averaging"]
    close(averaging.averaged_, averaging.seen_)
    assert len(averaging.seen_) == 6


def test_ignite_averages_the_steps_of_an_update_function():
    ignite = pytest.importorskip("ignite.engine")
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    averaged, seen = SWA(model, optimizer), []

    def update(engine, x):
        for sam_pass in optimizer.passes():
            with sam_pass:
                model(x).square().mean().backward()
        optimizer.step()
        seen.append(weights(model))

    ignite.Engine(update).run(torch.randn(3, 4, 2), max_epochs=2)
    close(averaged, seen)
    assert len(seen) == 6


def test_keras_averages_the_steps_of_sam_by_its_own_option():
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    from steppe.integrations.keras import SharpnessAware

    class Net(SharpnessAware, keras.Sequential):
        rho = 0.5

    class Record(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append([v.value.detach().clone() for v in self.model.trainable_variables])

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation")
        keras.utils.set_random_seed(0)
        model = Net([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), loss="mse")
        expected, record = [v.value.detach().clone() for v in model.trainable_variables], Record()
        x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
        model.fit(x, x.sum(1, keepdim=True), batch_size=4, verbose=0, shuffle=False, callbacks=[record])
    for number, now in enumerate(record.seen):  # Keras begins with the weights after the first step
        expected = now if number == 0 else [(a + w) / 2 for a, w in zip(expected, now, strict=True)]
    average = [v.value.detach() for v in model.optimizer._model_variables_moving_average]
    torch.testing.assert_close(average, expected)


def test_schedule_free_base_and_ema_are_both_possible():
    schedulefree = pytest.importorskip("schedulefree")
    model = net()
    base = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    base.train()
    optimizer = steppe.SAM(base, rho=0.1, model=model)
    averaged = EMA(model, optimizer)
    for step in range(2):
        x, y = batch(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert int(averaged.n_averaged) == 2
    assert bits(averaged.module.parameters()) != bits(model.parameters())
