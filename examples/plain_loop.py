"""A plain PyTorch loop with mixed precision, gradient accumulation, clipping and a learning-rate schedule."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import steppe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def digits(device):
    """Return 1,797 images of 8 x 8: the first 1,440 to train on, the rest to test on."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32, device=device), torch.tensor(y, device=device)
    return (x[:1440], y[:1440]), (x[1440:], y[1440:])


def train(precision, rho=0.05, steps=100, micro_batches=3, clip=1.0):
    """Train a small network; return it, the losses at w, and the data to test it on."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (x, y), test = digits(device)
    hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10)).to(device)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho, model=model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    order = torch.randint(len(x), (steps, micro_batches, 32), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for batch in order:
        at_w = torch.zeros((), device=device)
        for sam_pass in optimizer.passes():  # each pass runs over all micro-batches
            with sam_pass:
                for i in batch:
                    with torch.autocast(device, DTYPES[precision], enabled=precision != "fp32"):
                        loss = F.cross_entropy(model(x[i]), y[i]) / micro_batches
                    scaler.scale(loss).backward()
                    if sam_pass.is_first:  # the loss at w
                        at_w += loss.detach()
        scaler.unscale_(optimizer)  # .grad is now the unscaled update gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= scale:  # the scaler did not skip the step
            scheduler.step()
        losses.append(at_w)
    return model, torch.stack(losses).cpu(), test


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is tiny
    for precision in DTYPES:
        model, losses, (x, y) = train(precision)
        model.eval()
        accuracy = (model(x).argmax(1) == y).float().mean()
        print(f"{precision}: loss {losses[0]:.3f} -> {losses[-10:].mean():.3f}, test accuracy {accuracy:.1%}")
