"""examples/lightning_automatic.py and examples/lightning_manual.py against loops by hand."""

import torch
import torch.nn.functional as F
from example_files import load_example
from lightning_reference import IGNORED_WARNINGS, pl

import steppe
from support import model_bits

pytestmark = IGNORED_WARNINGS


def test_automatic_example_equals_loop_by_hand():
    example = load_example("lightning_automatic.py")
    module, log = example.train(example.SAMCallback(rho=0.05, log_sharpness=True), epochs=1)
    pl.seed_everything(0, verbose=False)
    x, y = (torch.tensor(a) for a in example.load_digits(return_X_y=True))
    data = torch.utils.data.TensorDataset(x.float() / 16, y)
    training, _ = torch.utils.data.random_split(data, [1437, 360])
    loader = torch.utils.data.DataLoader(training, batch_size=32, shuffle=True, drop_last=True)
    twin = example.Digits(steps=22)
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
    assert abs(log["sharpness"].item() - (losses[1] - losses[0])) < 1e-6
    assert 0.5 < log["accuracy"] < 1


def test_manual_example_equals_loop_by_hand():
    example = load_example("lightning_manual.py")
    trainer, module = example.train(steps=9)
    pl.seed_everything(0, verbose=False)
    twin, batches = example.Gan(), torch.randn(9, 64, 1)
    generator, critic = twin.configure_optimizers()
    critic = steppe.SAM(critic, rho=0.02, model=twin)
    iter(torch.utils.data.DataLoader(batches))  # draws a seed, as the loader of fit does
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
