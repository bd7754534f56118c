"""A small classification problem, and the divergence in the notation of the paper, for SAF and MESA."""

import torch
from torch import nn

LAMBDA, TAU, E, START, BETA = 0.3, 5.0, 2, 3, 0.9
N, BATCH = 12, 4


def model64(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, dtype=torch.float64, generator=g), torch.randint(4, (N,), generator=g)


def order(epoch):
    """The samples of each step of an epoch; sample 0 is missing in epoch 2, and sample 5 in epoch 4."""
    g = torch.Generator().manual_seed(100 + epoch)
    kept = [i for i in torch.randperm(N, generator=g).tolist() if (epoch, i) not in ((2, 0), (4, 5))]
    return [torch.tensor(kept[i : i + BATCH]) for i in range(0, len(kept), BATCH)]


def softmax(y):
    return (y / TAU).exp() / (y / TAU).exp().sum()


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def distance(model, other):
    return max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), other.parameters(), strict=True))
