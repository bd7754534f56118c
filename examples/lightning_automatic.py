"""Steppe in Lightning: one callback, with Lightning's accumulation, clipping and learning-rate schedule."""

import logging
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

from steppe.integrations.lightning import SAMCallback


class Digits(pl.LightningModule):
    """An ordinary module, without any code for SAM."""

    def __init__(self, steps):
        super().__init__()
        hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
        self.model, self.steps = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10)), steps

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        """Log the accuracy."""
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        """Return SGD with momentum, and a one-cycle schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def train(*callbacks, epochs=5):
    """Train with these callbacks; return the module, and the logged metrics with the test accuracy."""
    pl.seed_everything(0, verbose=False)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    training, test = random_split(TensorDataset(x.float() / 16, y), [1437, 360])
    loader = DataLoader(training, batch_size=32, shuffle=True, drop_last=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    rest = {"accelerator": "cpu", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **quiet}
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **rest)
    trainer.fit(module := Digits(steps=epochs * len(loader) // 2), loader)
    log = trainer.callback_metrics
    return module, {**log, **trainer.test(module, DataLoader(test, batch_size=360), verbose=False)[0]}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "(?s).*many workers|.*LeafSpec")  # Lightning on a small problem
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the model is tiny
    print(f"SGD: test accuracy {train()[1]['accuracy']:.1%}")
    _, log = train(SAMCallback(rho=0.05, log_sharpness=True))
    print(f"SAM: test accuracy {log['accuracy']:.1%}, sharpness of the last batch {log['sharpness']:.4f}")
