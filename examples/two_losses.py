"""Perturb on another loss than the update's: BiSAM; DISAM for domains; Focal-SAM and ImbSAM for rare classes."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import steppe


def digits(seed=0):
    """Return images of digits, of which the larger are rare; those of domain 1 are inverted. And data to test on."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x, generator = x.float() / 16, torch.Generator().manual_seed(seed)
    kept = torch.rand(1440, generator=generator) < torch.linspace(1, 0.05, 10)[y[:1440]]
    domain = torch.randint(2, (1440,), generator=generator)
    x[:1440] = torch.where(domain[:, None] == 1, 1 - x[:1440], x[:1440])
    return (x[:1440][kept], y[:1440][kept], domain[kept]), (x[1440:], y[1440:])


def loss(logits, y, domain):
    """The loss of the update; all functions get the same arguments."""
    return F.cross_entropy(logits, y)


def disam(logits, y, domain, weight=0.1):
    """The loss of DISAM for the perturbation, which weakens the gradient of domains with a larger loss than others."""
    domains = torch.stack([F.cross_entropy(logits[domain == d], y[domain == d]) for d in domain.unique()])
    return F.cross_entropy(logits, y) - weight * domains.var(correction=0)


def weighted(weight_of_class):
    """Focal-SAM and ImbSAM: the mean of c_y l, with a weight c_y for each class."""
    return lambda logits, y, domain: (weight_of_class[y] * F.cross_entropy(logits, y, reduction="none")).mean()


def train(method, rho=0.1, steps=200):
    """Train a small network; return it with the test data."""
    torch.manual_seed(0)
    (x, y, domain), test = digits()
    share = y.bincount(minlength=10) / len(y)
    c = {"Focal-SAM": 0.8 * (1 - share) ** 3, "ImbSAM": (share < 0.1).float()}.get(method)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho, model=model)
    others = {"BiSAM": lambda logits, y, domain: steppe.closures.bisam_loss(logits, y), "DISAM": disam}
    criterion = steppe.closures.perturb_on(optimizer, others.get(method, loss), loss)
    if c is not None:
        criterion = steppe.closures.perturb_on(optimizer, weighted(c), weighted(c), loss_at_w=weighted(1 - c))
    for _ in range(steps):
        i = torch.randint(len(x), (64,))
        optimizer.step(lambda i=i: criterion(model(x[i]), y[i], domain[i]))
    return model, test


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is tiny
    for method in ("SAM", "BiSAM", "DISAM", "Focal-SAM", "ImbSAM"):
        model, (x, y) = train(method)
        print(f"{method}: test accuracy {(model(x).argmax(1) == y).float().mean():.1%}")
