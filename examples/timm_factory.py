"""Steppe in timm: its factory makes the base optimizer, with timm's schedule, clipping and layer decay."""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad

import steppe


def digits():
    """Return the 1,797 images of 8 x 8 as 24 x 24: 1,440 to train on, the rest to test on."""
    x, y = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), scale_factor=3)
    return x[:1440], torch.tensor(y[:1440]), x[1440:], torch.tensor(y[1440:])


def train(model, x, y, opt="adamw", lr=2e-3, epochs=3, clip=1.0, amp=False):
    """Train as timm's train.py does, with passes() around forward and backward."""
    base = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=0.05, layer_decay=0.8)
    optimizer = steppe.SAM(base, rho=0.05, model=model)
    batches = list(zip(x.split(48), y.split(48), strict=True))
    plan = {"num_epochs": epochs, "warmup_epochs": 1, "warmup_lr": 1e-4, "min_lr": 1e-5}
    scheduler, _ = create_scheduler_v2(optimizer, **plan, step_on_epochs=False, updates_per_epoch=len(batches))
    scaler = torch.amp.GradScaler(x.device.type, enabled=amp)  # instead of timm's NativeScaler
    updates = 0
    for _ in range(epochs):
        for images, labels in batches:
            for sam_pass in optimizer.passes():
                with sam_pass:
                    with torch.autocast(x.device.type, torch.float16, enabled=amp):
                        loss = F.cross_entropy(model(images), labels)
                    scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            dispatch_clip_grad(model.parameters(), clip, mode="norm")  # the update gradient
            scaler.step(optimizer)
            scaler.update()
            updates += 1
            scheduler.step_update(updates)
    return optimizer


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is tiny
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = train(model, x, y)
    rates = [group["lr"] for group in optimizer.param_groups]
    accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean()
    print(f"{len(rates)} groups by layer and decay, learning rates {min(rates):.1e} to {max(rates):.1e} at the end")
    print(f"test accuracy of a {type(model).__name__} trained with SAM around AdamW: {accuracy:.1%}")
