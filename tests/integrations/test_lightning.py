"""SAMCallback against the same loop written by hand: weights, buffers and optimizer state, bit for bit."""

import contextlib
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
    torchmetrics = pytest.importorskip("torchmetrics")
    from lightning.pytorch.demos.boring_classes import BoringModel
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


def loader(n=BATCHES, dtype=torch.float32):
    return torch.utils.data.DataLoader([batch(i, dtype=dtype) for i in range(n)], batch_size=None)


def fit(module, *callbacks, data=None, ckpt_path=None, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=list(callbacks), **{"max_epochs": 2, **quiet, **options}
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
            for walk in optimizer.passes():
                with walk:
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
    "twice": partial(steppe.SAM, rho=0.5, perturbation=steppe.Steps(steppe.L2(), 2)),
    "looksam": partial(steppe.variants.looksam, rho=0.5, k=2),
    "aesam": partial(steppe.variants.aesam, rho=0.5, steps=10),
    "msam": partial(steppe.variants.msam, rho=0.5),
    "rwp": partial(steppe.variants.rwp, rho=0.05),
    "mixed_rwp": partial(steppe.variants.mixed_rwp, rho=0.05),
    "lookbehind": partial(steppe.variants.lookbehind_sam, rho=0.5),
    "sampa": partial(steppe.variants.sampa, rho=0.5),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_automatic_optimisation_equals_a_loop_by_hand(method, k):
    module, twin = Classifier(), net()
    trainer = fit(module, SAMCallback(METHODS[method]), accumulate_grad_batches=k)
    optimizer = METHODS[method](BASES["momentum"](twin.parameters()), model=twin)
    by_hand(twin, optimizer, k=k)
    assert model_bits(module.model) == model_bits(twin)
    assert trainer.global_step == 2 * -(-BATCHES // k)
    assert str(trainer.optimizers[0].state_dict()) == str(optimizer.state_dict())
