"""SharpnessAware in Keras 3 on torch against SAM by hand around torch's optimizers, on the same Keras model."""

import copy
import functools
import os

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

from recipes import recipe  # noqa: E402

import steppe  # noqa: E402
from steppe.integrations.keras import SharpnessAware, Stateful  # noqa: E402

# NumPy 2 asks for a copy keyword that Keras 3.15 does not take.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EPOCHS, BATCH = 3, 8


@keras.saving.register_keras_serializable("steppe-tests")
class Net(SharpnessAware, keras.Model):
    method = staticmethod(functools.partial(steppe.SAM, rho=0.1))

    def make_sam(self, base, model):
        return self.method(base, model=model)


def layers():
    """What a second pass can spoil: averages, and masks from a seed of Keras."""
    return [
        keras.layers.Dense(16, use_bias=False),
        keras.layers.BatchNormalization(momentum=0.9),
        keras.layers.ReLU(),
        keras.layers.Dropout(0.2, seed=7),
        keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(1e-2)),
    ]


def functional(cls, *, dropout=0.0):
    keras.utils.set_random_seed(0)
    first = last = keras.Input((6,))
    for layer in (*layers(), keras.layers.Dropout(dropout)):
        last = layer(last)
    return cls(first, last)


def compiled(cls=Net, optimizer=None, **kwargs):
    model = functional(cls, **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.9), loss, metrics=["accuracy"])
    return model


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 6)).astype("float32")
    return x, x[:, :3].argmax(1)


def fit(model, epochs=EPOCHS, **kwargs):
    keras.utils.set_random_seed(1)
    return model.fit(*data(), epochs=epochs, batch_size=BATCH, shuffle=False, verbose=0, **kwargs).history


def by_hand(model, base, *, rho=0.1, epochs=EPOCHS, clip=None, rates=None):
    """SAM written out on a Keras model's tensors, with a torch optimizer; return loss and accuracy of each epoch."""
    x, y = map(torch.tensor, data())
    state = [v.value for v in model.non_trainable_variables]
    weights = [v.value for v in model.trainable_variables]
    log = []
    keras.utils.set_random_seed(1)

    def backward(rows):
        output = model(x[rows], training=True)
        loss = torch.nn.functional.cross_entropy(output, y[rows]) + sum(model.losses)
        base.zero_grad()
        loss.backward()
        return loss.detach(), (output.argmax(1) == y[rows]).float().mean()

    for epoch in range(epochs):
        for group in base.param_groups if rates else ():
            group["lr"] = rates[epoch]
        seen = []
        for start in range(0, len(x), BATCH):
            rows = slice(start, start + BATCH)
            generator, before = torch.get_rng_state(), [t.clone() for t in state]
            seen.append(torch.stack(backward(rows)))
            left, after = torch.get_rng_state(), [t.clone() for t in state]
            with torch.no_grad():
                at_w = [w.clone() for w in weights]
                norm = torch.stack([w.grad.square().sum() for w in weights]).sum().sqrt()
                [w.add_(w.grad, alpha=rho / norm.item()) for w in weights]
                [t.copy_(b) for t, b in zip(state, before, strict=True)]
                torch.set_rng_state(generator)
            backward(rows)
            with torch.no_grad():
                [w.copy_(v) for w, v in zip(weights, at_w, strict=True)]
                [t.copy_(a) for t, a in zip(state, after, strict=True)]
                torch.set_rng_state(left)
            if clip:
                torch.nn.utils.clip_grad_norm_(weights, clip)
            base.step()
        log.append(torch.stack(seen).mean(0).tolist())
    return log


def tensors(model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in model.variables]


def assert_close(model, reference, rtol=2e-5) -> None:
    for a, b, v in zip(tensors(model), tensors(reference), model.variables, strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(b).max() + 1e-7, f"{v.path}: off by {np.abs(a - b).max():.2e}"


def assert_equal(model, reference) -> None:
    for a, b, v in zip(tensors(model), tensors(reference), model.variables, strict=True):
        assert np.array_equal(a, b), f"{v.path}: off by {np.abs(a - b).max():.2e}"


def weights(model):
    return [v.value for v in model.trainable_variables]


BASES = {
    "sgd": (lambda: keras.optimizers.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adam": (lambda: keras.optimizers.Adam(0.01, epsilon=1e-7), lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-7)),
}


@pytest.mark.parametrize("base", BASES)
def test_fit_is_sam_by_hand(base):
    """Weights, moving averages, seeds, and the history of loss and accuracy at w."""
    of_keras, of_torch = BASES[base]
    model, reference = compiled(optimizer=of_keras()), compiled(keras.Model)
    history = fit(model)
    log = by_hand(reference, of_torch(weights(reference)))
    # Keras adds Adam's epsilon at another place, and its SGD's momentum holds the rate
    assert_close(model, reference, rtol=2e-5 if base == "sgd" else 1e-3)
    assert history["loss"] == pytest.approx([loss for loss, _ in log], rel=1e-4)
    assert history["accuracy"] == pytest.approx([right for _, right in log], abs=1e-6 if base == "sgd" else 0.05)
    assert int(model.optimizer.iterations.value) == EPOCHS * 3
    plain = compiled(keras.Model)
    by_hand(plain, of_torch(weights(plain)), rho=0.0)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(model, plain, rtol=1e-2)


def test_rho_zero_is_keras_bit_for_bit():
    """With BatchNorm, dropout by Keras' seeds and by torch's generator, a regularizer and metrics in the model."""

    class Zero(Net):
        method = staticmethod(functools.partial(steppe.SAM, rho=0.0))

    model, plain = (compiled(cls, dropout=0.3) for cls in (Zero, keras.Model))
    ours, theirs = fit(model, validation_data=data()), fit(plain, validation_data=data())
    assert_equal(model, plain)
    assert ours == theirs


def test_without_the_protection_the_second_pass_would_be_seen():
    """Keras keeps averages and seeds in parameters, which a plain model= does not protect."""

    class Unprotected(Net):
        def make_sam(self, base, model):
            return steppe.SAM(base, rho=0.0, model=model.model)

    model, plain = compiled(Unprotected), compiled(keras.Model)
    fit(model, epochs=1)
    fit(plain, epochs=1)
    for ours, theirs in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        assert not torch.equal(ours.value, theirs.value), ours.path


@pytest.mark.parametrize("form", ["sequential", "subclassed"])
def test_sequential_and_subclassed_models_are_the_functional_one(form):
    class Sequential(SharpnessAware, keras.Sequential):
        make_sam = Net.make_sam
        method = Net.method

    class Subclassed(SharpnessAware, keras.Model):  # a functional Net makes Net itself functional
        make_sam = Net.make_sam
        method = Net.method

        def __init__(self):
            super().__init__()
            self.all = layers()

        def call(self, x, training=None):
            for layer in self.all:
                x = layer(x, training=training) if layer._call_has_training_arg else layer(x)
            return x

    reference = compiled()
    fit(reference, epochs=1)
    keras.utils.set_random_seed(0)
    model = Sequential([keras.Input((6,)), *layers()]) if form == "sequential" else Subclassed()
    model(data()[0])
    model.set_weights(functional(Net).get_weights())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    fit(model, epochs=1)
    for a, b in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_clipping_and_schedules_of_keras_act_on_what_goes_down():
    rates = [0.1, 0.05, 0.025]
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, _: rates[epoch])
    model = compiled(optimizer=keras.optimizers.SGD(0.1, global_clipnorm=0.2))
    fit(model, callbacks=[schedule])
    reference = compiled(keras.Model)
    by_hand(reference, torch.optim.SGD(weights(reference), lr=0.1), clip=0.2, rates=rates)
    assert_close(model, reference)
    unclipped = compiled(keras.Model)
    by_hand(unclipped, torch.optim.SGD(weights(unclipped), lr=0.1), rates=rates)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(model, unclipped, rtol=1e-2)


def test_accumulation_of_keras_gives_each_batch_a_climb_of_its_own():
    """The mean of the gradients at w + e(B_i), and one step of the base for three batches."""
    model = compiled(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    fit(model, epochs=1)
    reference = compiled(keras.Model)
    held = torch.optim.SGD(weights(reference), lr=0.1)
    summed = [torch.zeros_like(w) for w in weights(reference)]

    class Adds(torch.optim.SGD):
        def step(self):
            for total, w in zip(summed, weights(reference), strict=True):
                total += w.grad / 3

    by_hand(reference, Adds(weights(reference), lr=0.1), epochs=1)
    for total, w in zip(summed, weights(reference), strict=True):
        w.grad = total
    held.step()
    assert_close(model, reference)


class Later(Net):
    """A memory and a cadence: what model.save does not know of."""

    method = staticmethod(functools.partial(steppe.variants.looksam, rho=0.1, k=2))


keras.saving.register_keras_serializable("steppe-tests")(Later)


@pytest.mark.parametrize("cls", [Net, Later])
def test_saved_and_loaded_it_goes_on_bit_for_bit(cls, tmp_path):
    model = compiled(cls)
    fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    state, seed = copy.deepcopy(model.sam.state_dict()), model.layers[4].seed_generator.state.value.clone()
    fit(model, epochs=1)
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.layers[4].seed_generator.state.assign(seed)  # Keras does not save it
    if cls is Later:
        again.make_train_function()
        again.sam.load_state_dict(state)
    fit(again, epochs=1)
    assert_equal(again, model)


def test_mixed_bfloat16_is_near_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled()
        fit(model)
    finally:
        keras.config.set_dtype_policy("float32")
    reference, plain = compiled(), compiled(keras.Model)
    fit(reference)
    fit(plain)

    def apart(a, b):
        return sum(float((p - q).detach().norm()) for p, q in zip(weights(a), weights(b), strict=True))

    assert 0 < apart(model, reference) < apart(model, plain) / 2


def test_a_batch_that_overflows_is_skipped_and_said():
    model = compiled()
    fit(model, epochs=1)
    before = [w.detach().clone() for w in weights(model)]
    x, y = data()
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        model.fit(x[:8] * np.inf, y[:8], verbose=0)
    assert all(torch.equal(w, b) for w, b in zip(weights(model), before, strict=True))
    assert model.sam.skipped_steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": None}, "compiled without an optimizer"),
        ({"jit_compile": True}, "jit_compile=True would compile the passes"),
        ({"optimizer": "scaled"}, "mixed_bfloat16"),
    ],
)
def test_refused(changes, message):
    model = functional(Net)
    if changes.get("optimizer") == "scaled":
        changes = {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))}
    model.compile(loss="mse", **{"optimizer": "sgd", **changes})
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)


def test_a_layer_unfrozen_without_compile_is_refused():
    model = compiled()
    model.layers[1].trainable = False
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    model.layers[1].trainable = True
    with pytest.raises(RuntimeError, match="call compile\\(\\) again"):
        model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)


def test_stateful_names_what_a_pass_changes():
    model = compiled()
    fit(model, epochs=1)
    names = {v.path.split("/")[-1] for v in model.non_trainable_variables}
    assert names >= {"moving_mean", "moving_variance", "seed_generator_state"}
    assert len(list(Stateful(model).buffers())) == len(
        {id(v) for v in model.non_trainable_variables + model.metrics_variables}
    )


def test_the_example_defines_what_it_says():
    example = recipe("keras_torch.py")
    model = example.compiled(example.SAMNet)
    x = np.random.default_rng(0).normal(size=(32, 64)).astype("float32")
    model.fit(x, np.arange(32) % 10, verbose=0)
    assert repr(model.sam.perturbation) == "L2()"
    assert model.sam.param_groups[0]["sam_rho"] == 0.05
