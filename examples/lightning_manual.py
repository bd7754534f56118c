"""Steppe in Lightning's manual optimization: a generator and its critic, the critic with SAM."""

import logging
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from steppe.integrations.lightning import SAMCallback


class Gan(pl.LightningModule):
    """A generator that learns a normal distribution of mean 4 and standard deviation 0.5, and its critic."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = torch.nn.Linear(1, 1)
        self.critic = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def judge(self, x):
        """Return the critic's logits of the samples being real."""
        return self.critic(torch.cat([x, x**2], dim=1) / 4)

    def training_step(self, noise, batch_idx):
        """Take one step of the critic and one of the generator."""
        generator, critic = self.optimizers()
        real, fake = 4 + 0.5 * torch.randn_like(noise), self.generator(noise).detach()
        for sam_pass in critic.passes():  # two passes: at w, and at w + e
            with sam_pass:
                self.manual_backward((F.softplus(-self.judge(real)) + F.softplus(self.judge(fake))).mean())
        critic.step()
        generator.zero_grad()  # its optimizer is not wrapped
        self.manual_backward(F.softplus(-self.judge(self.generator(noise))).mean())
        generator.step()

    def configure_optimizers(self):
        """Return an optimizer for each network."""
        return [torch.optim.Adam(p.parameters(), lr=0.01, betas=(0.5, 0.9)) for p in (self.generator, self.critic)]


def train(steps=800):
    """Train; return the trainer and the module."""
    pl.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SAMCallback(rho=0.02, optimizers=[1])], **quiet)
    trainer.fit(module := Gan(), DataLoader(torch.randn(steps, 64, 1), batch_size=None))
    return trainer, module


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "(?s).*many workers|.*LeafSpec")  # Lightning on a small problem
    torch.set_num_threads(1)  # the model is tiny
    trainer, module = train()
    x = module.generator(torch.randn(10_000, 1)).detach()
    print(f"{trainer.global_step} steps of both networks; the generator draws {x.mean():.2f} +- {x.std():.2f}")
