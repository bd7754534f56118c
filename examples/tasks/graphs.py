"""Graphs: a network of message passing counts the triangles of random graphs; a batch is an object of the user's own.

steppe compare graphs:task --methods base sam --epochs 10 --seeds 3
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from steppe.experiments import Metric, Task

NODES = 12


@dataclass
class Graphs:
    """A batch of graphs."""

    edges: Tensor  # (n, nodes, nodes): 1 where two nodes are joined
    triangles: Tensor  # (n,)

    def to(self, device):
        """Return the batch on a device; called before the model gets it."""
        return Graphs(self.edges.to(device), self.triangles.to(device))

    def __len__(self):
        return len(self.edges)


def random_graphs(number, seed):
    """Draw graphs; each has a density of its own."""
    g = torch.Generator().manual_seed(seed)
    density = 0.1 + 0.4 * torch.rand(number, 1, 1, generator=g)
    upper = (torch.rand(number, NODES, NODES, generator=g) < density).float().triu(1)
    edges = upper + upper.transpose(1, 2)
    triangles = torch.einsum("nij,njk,nki->n", edges, edges, edges) / 6
    return [(edges[i], triangles[i] / 10) for i in range(number)]


def collate(graphs):
    """Make a batch of a list of graphs."""
    edges, triangles = zip(*graphs, strict=True)
    return Graphs(torch.stack(edges), torch.stack(triangles))


class MessagePassing(nn.Module):
    """Three rounds of messages between neighbors, from random-looking features of the nodes, and a sum over them."""

    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Parameter(torch.randn(NODES, width))
        self.rounds = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, edges):
        """Return a number for each graph."""
        x = self.first.expand(len(edges), -1, -1)
        for linear in self.rounds:
            x = F.relu(linear(torch.cat([x, edges @ x / NODES], dim=2)))
        return self.head(x.sum(1) / NODES).squeeze(1)


def predict(model, batch):
    """Return the outputs and the targets of a batch."""
    return model(batch.edges), batch.triangles


def task() -> Task:
    """Return the task."""
    train, test = random_graphs(600, seed=0), random_graphs(300, seed=1)
    return Task(
        name="graphs",
        model=MessagePassing,
        train=DataLoader(train, batch_size=50, shuffle=True, collate_fn=collate),
        test=DataLoader(test, batch_size=100, collate_fn=collate),
        predict=predict,
        loss=F.smooth_l1_loss,
        metrics={
            "error": Metric(lambda outputs, targets: 10 * (outputs - targets).abs().mean(), False, unit="triangles")
        },
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=3e-3),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=2),
    )
