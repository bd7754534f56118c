"""A plain loop with Accelerate and SAM: accumulation, clipping and a scheduler, on handwritten digits.

pip install '.[transformers]' scikit-learn
On two processes: ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import steppe
from steppe.integrations.accelerate import passes, windows

set_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:1280], y[:1280]), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(x[1280:], y[1280:]), batch_size=128)

model = torch.nn.Sequential(
    torch.nn.Linear(64, 128),
    torch.nn.BatchNorm1d(128),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.2),
    torch.nn.Linear(128, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = steppe.SAM(optimizer, rho=0.05, model=model)  # first line: around any optimizer, before prepare()
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, loader, test, scheduler = accelerator.prepare(model, optimizer, loader, test, scheduler)

steps = made = 0
for _ in range(10):
    model.train()
    for batches in windows(accelerator, loader):  # second line: all micro-batches of a step
        for sam_pass in passes(accelerator, optimizer, len(batches)):  # third line: run them in each pass
            with sam_pass:
                for images, labels in batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(images), labels))
            made += 1
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        steps += 1

model.eval()
right = total = 0
with torch.no_grad():
    for images, labels in test:
        predicted, labels = accelerator.gather_for_metrics((model(images).argmax(-1), labels))
        right, total = right + int((predicted == labels).sum()), total + len(labels)
accelerator.print(f"{steps} steps, {made / steps:.2f} passes each")
accelerator.print(f"test accuracy {right / total:.2%} on {total} digits")
accelerator.end_training()
