"""The examples train what a loop by hand trains; and the other package that Lightning comes in."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_lightning import model_bits, pl, pytestmark  # noqa: F401

import steppe

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_automatic_example():
    example = runpy.run_path(str(EXAMPLES / "lightning_automatic.py"))
    module, log = example["train"](example["SAMCallback"](rho=0.05, log=True), epochs=1)
    pl.seed_everything(0, verbose=False)
    x, y = (torch.tensor(a) for a in example["load_digits"](return_X_y=True))
    data = torch.utils.data.TensorDataset(x.float() / 16, y)
    training, _ = torch.utils.data.random_split(data, [1437, 360])
    loader = torch.utils.data.DataLoader(training, batch_size=32, shuffle=True, drop_last=True)
    twin = example["Digits"](steps=22)
    config = twin.configure_optimizers()
    optimizer = steppe.SAM(config["optimizer"], rho=0.05, model=twin)
    batches = list(loader)
    for micro_batches in zip(batches[::2], batches[1::2], strict=True):
        losses = []
        for sam_pass in optimizer.passes():
            with sam_pass:
                losses.append(0.0)
                for x, y in micro_batches:
                    loss = F.cross_entropy(twin.model(x), y) / 2
                    loss.backward()
                    losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        config["lr_scheduler"]["scheduler"].step()
    assert model_bits(module) == model_bits(twin)
    assert abs(log["sam/sharpness"].item() - (losses[1] - losses[0])) < 1e-6
    assert 0.5 < log["accuracy"] < 1


def test_the_manual_example():
    example = runpy.run_path(str(EXAMPLES / "lightning_manual.py"))
    trainer, module = example["train"](steps=9)
    pl.seed_everything(0, verbose=False)
    twin, batches = example["Gan"](), torch.randn(9, 64, 1)
    generator, critic = twin.configure_optimizers()
    critic = steppe.SAM(critic, rho=0.02, model=twin)
    iter(torch.utils.data.DataLoader(batches))  # which draws a seed
    for noise in batches:
        real, fake = 4 + 0.5 * torch.randn_like(noise), twin.generator(noise).detach()
        for sam_pass in critic.passes():
            with sam_pass:
                (F.softplus(-twin.judge(real)) + F.softplus(twin.judge(fake))).mean().backward()
        critic.step()
        generator.zero_grad()
        F.softplus(-twin.judge(twin.generator(noise))).mean().backward()
        generator.step()
    assert trainer.global_step == 18
    assert model_bits(module) == model_bits(twin)


OTHER_PACKAGE = """
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl
from pytorch_lightning.demos.boring_classes import BoringModel
import torch, steppe
from steppe.integrations.lightning import SAMCallback

assert issubclass(SAMCallback, pl.Callback) and "lightning.pytorch" not in sys.modules
torch.manual_seed(0)
module, twin = BoringModel(), BoringModel()
twin.load_state_dict(module.state_dict())
data = torch.randn(4, 2, 32)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SAMCallback(rho=0.5)], **quiet)
trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
optimizer = steppe.SAM(torch.optim.SGD(twin.parameters(), lr=0.1), rho=0.5, model=twin)
for x in data:
    for walk in optimizer.passes():
        with walk:
            twin.loss(twin(x)).backward()
    optimizer.step()
assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
"""


@pytest.mark.slow
def test_the_other_package():
    done = subprocess.run([sys.executable, "-c", OTHER_PACKAGE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
