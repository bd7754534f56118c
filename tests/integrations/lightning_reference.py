"""Lightning runs of a small classifier, and the plain loop that they must equal."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import steppe
from support import BASES, batch, bits, net

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Lightning at its own import
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision  # noqa: F401

# Warnings of Lightning about a small problem: no workers, no steps between two logs, a loader that is no DataLoader.
IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step` but have no `val_dataloader`.*"),
]
BATCHES = 5


class Classifier(pl.LightningModule):
    """A classifier that seeds batch i with 100 + i, so that a loop by hand can draw the same dropout masks."""

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
    """Return the exact state of the optimizer: momentum, memory of the rules, step counter."""
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
    """Train by the plain loop that a fit must equal, with ``k`` micro-batches a step."""
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
    "looksam": partial(steppe.variants.looksam, rho=0.5, interval=2),
    "aesam": partial(steppe.variants.aesam, rho=0.5, total_steps=10),
    "msam": partial(steppe.variants.msam, rho=0.5),
    "rwp": partial(steppe.variants.rwp, rho=0.05),
    "mixed_rwp": partial(steppe.variants.mixed_rwp, rho=0.05),
    "lookbehind": partial(steppe.variants.lookbehind_sam, rho=0.5),
    "sampa": partial(steppe.variants.sampa, rho=0.5),
}


def autocast(dtype, function):
    """Run the function under autocast if there is a dtype."""

    def autocasted(*args):
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            return function(*args)

    return autocasted


class ResumableLoader:
    """A loader that resumes in the middle of an epoch."""

    def __init__(self):
        self.index = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        while self.index < BATCHES:
            self.index += 1
            yield batch(self.index - 1)
        self.index = 0

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]
