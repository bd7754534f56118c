"""SharpnessAware in Keras 3 on torch against SAM by hand around torch's optimizers, on the same Keras model."""

import copy
import functools
import os

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import steppe  # noqa: E402
from steppe.integrations.keras import SharpnessAware, VariablesAsBuffers  # noqa: E402

# Keras 3.15 does not take the copy keyword of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EPOCHS, BATCH = 3, 8


@keras.saving.register_keras_serializable("steppe-tests")
class Net(SharpnessAware, keras.Model):
    rho = 0.1


def layers():
    """Return layers whose averages and dropout seeds a second pass could change."""
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
    """Train a Keras model's tensors by SAM written out; return loss and accuracy of each epoch."""
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
def test_fit_equals_sam_by_hand(base):
    """Compare weights, moving averages, seeds, and the history of loss and accuracy."""
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


def test_rho_zero_gives_the_bits_of_plain_keras():
    """The model has BatchNorm, dropout by Keras' seeds and by torch's generator, a regularizer and metrics."""

    class RhoZero(Net):
        rho = 0.0

    model, plain = (compiled(cls, dropout=0.3) for cls in (RhoZero, keras.Model))
    ours, theirs = fit(model, validation_data=data()), fit(plain, validation_data=data())
    assert_equal(model, plain)
    assert ours == theirs


def test_variables_of_the_model_are_protected_by_a_plain_model_argument_too():
    """Keras keeps averages and seeds in parameters without gradients."""

    class WithPlainModel(Net):
        @staticmethod
        def method(base, model, rho):
            return steppe.SAM(base, rho=0.0, model=model.model)

    model, plain = compiled(WithPlainModel), compiled(keras.Model)
    fit(model, epochs=1)
    fit(plain, epochs=1)
    for ours, theirs in zip(model.non_trainable_variables, plain.non_trainable_variables, strict=True):
        assert torch.equal(ours.value, theirs.value), ours.path


@pytest.mark.parametrize("form", ["sequential", "subclassed"])
def test_sequential_and_subclassed_models_equal_the_functional_one(form):
    class Sequential(SharpnessAware, keras.Sequential):
        rho = Net.rho

    class Subclassed(SharpnessAware, keras.Model):  # a functional Net makes Net itself functional
        rho = Net.rho

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


def test_clipping_and_schedules_act_on_the_update_gradient():
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


def test_accumulation_perturbs_for_each_batch():
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


class WithMemory(Net):
    """A method with a memory and a cadence, which model.save does not keep."""

    method = functools.partial(steppe.variants.looksam, interval=2)


keras.saving.register_keras_serializable("steppe-tests")(WithMemory)


@pytest.mark.parametrize("cls", [Net, WithMemory])
def test_loaded_model_resumes_with_the_same_bits(cls, tmp_path):
    model = compiled(cls)
    fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    state, seed = copy.deepcopy(model.sam.state_dict()), model.layers[4].seed_generator.state.value.clone()
    fit(model, epochs=1)
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.layers[4].seed_generator.state.assign(seed)  # Keras does not save it
    if cls is WithMemory:
        again.make_train_function()
        again.sam.load_state_dict(state)
    fit(again, epochs=1)
    assert_equal(again, model)


def test_mixed_bfloat16_is_close_to_float32():
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


def test_overflow_skips_the_step_and_warns():
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
def test_unsupported_compile_options_raise(changes, message):
    model = functional(Net)
    if changes.get("optimizer") == "scaled":
        changes = {"optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))}
    model.compile(loss="mse", **{"optimizer": "sgd", **changes})
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)


def test_unfreezing_a_layer_without_compile_raises():
    model = compiled()
    model.layers[1].trainable = False
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    model.layers[1].trainable = True
    with pytest.raises(RuntimeError, match="call compile\\(\\) again"):
        model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)


def test_variables_as_buffers_hold_all_that_a_pass_changes():
    model = compiled()
    fit(model, epochs=1)
    names = {v.path.split("/")[-1] for v in model.non_trainable_variables}
    assert names >= {"moving_mean", "moving_variance", "seed_generator_state"}
    assert len(list(VariablesAsBuffers(model).buffers())) == len(
        {id(v) for v in model.non_trainable_variables + model.metrics_variables}
    )


def test_log_sharpness_logs_means_of_the_epoch():
    class Logs(Net):
        log_sharpness = True

    recorded = []

    class Records(Net):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.current_pass is not None:  # None while Keras builds the model
                recorded.append((self.current_pass.is_perturbed, loss.item()))
            return loss

    model, reference = compiled(Logs), compiled(Records)
    history = fit(model, validation_data=data())
    fit(reference)
    assert model.current_pass is None
    assert_equal(model, reference)
    per_epoch = 2 * 3  # two passes of three batches
    for epoch in range(EPOCHS):
        losses = recorded[per_epoch * epoch : per_epoch * (epoch + 1)]
        loss, perturbed = (np.mean([value for p, value in losses if p is wanted]) for wanted in (False, True))
        assert history["loss"][epoch] == pytest.approx(loss, rel=1e-5)
        assert history["perturbed_loss"][epoch] == pytest.approx(perturbed, rel=1e-5)
        assert history["sharpness"][epoch] == pytest.approx(perturbed - loss, rel=1e-3)
    assert min(history["sharpness"]) > 0
    assert "val_sharpness" not in history


def test_methods_that_are_not_functions_or_return_no_sam_raise():
    class NotCallable(Net):
        method = 0.05

    class PlainBase(Net):
        @staticmethod
        def method(base, model, rho):
            return base

    for cls, message in (
        (NotCallable, "method must be a function"),
        (PlainBase, "returned KerasOptimizer, and PlainBase"),
    ):
        with pytest.raises(TypeError, match=message):
            fit(compiled(cls))
