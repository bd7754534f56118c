"""Steppe in Keras 3 on PyTorch: compile(), fit(), callbacks, metrics and save() with SAM's passes in fit()."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import torch
from sklearn.datasets import load_digits

import steppe
from steppe.integrations.keras import SharpnessAware


class SAMNet(SharpnessAware, keras.Sequential):
    """A Sequential that trains with SAM around the optimizer that it is compiled with."""

    method = steppe.SAM  # or another one: steppe.variants.asam
    rho = 0.05


def compiled(cls):
    """Return a small network with BatchNorm and dropout, compiled with Adam."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((64,)),
        keras.layers.Dense(32),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(10),
    ]
    model = cls(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def main():
    """Compare Adam and SAM at equal compute: SAM makes two passes a step, so it gets half the epochs."""
    torch.set_num_threads(1)  # the model is tiny
    x, y = load_digits(return_X_y=True)
    for name, cls, epochs in ("Adam", keras.Sequential, 10), ("SAM around Adam", SAMNet, 5):
        model = compiled(cls)
        log = model.fit(x / 16, y, epochs=epochs, validation_split=0.2, verbose=0).history
        steps = int(model.optimizer.iterations.value)
        print(f"{name}: {steps} steps, loss {log['loss'][-1]:.3f}, test accuracy {log['val_accuracy'][-1]:.1%}")


if __name__ == "__main__":
    main()
