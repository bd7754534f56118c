"""SAMCallback on two processes: the replicas stay equal, and equal one process on the whole batch."""

import os

import pytest
import torch
import torch.nn.functional as F
from lightning_reference import BATCHES, IGNORED_WARNINGS, fit, loader, pl
from torch import nn

import steppe
from steppe.integrations.lightning import SAMCallback
from support import batch, bits

pytestmark = [
    *IGNORED_WARNINGS,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked: importing everything again is slow"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks.*"),
]


class HalfOfEachBatch(pl.LightningModule):
    """Trains each rank on its half of a batch."""

    def __init__(self, folder=None, *, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.folder, self.automatic_optimization = folder, not manual

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def loss(self, batch, rank):
        x, y = (t.chunk(2)[rank] for t in batch)
        return F.cross_entropy(self.model(x), y)

    def training_step(self, batch, batch_idx):
        if self.automatic_optimization:
            return self.loss(batch, self.global_rank)
        opt = self.optimizers()
        for sam_pass in opt.passes():
            with sam_pass:
                self.manual_backward(self.loss(batch, self.global_rank))
        opt.step()

    def on_train_end(self):
        torch.save(list(self.parameters()), self.folder / f"{self.global_rank}.pt")


@pytest.mark.parametrize(
    ("manual", "per_rank", "k"),
    [(False, False, 1), (False, False, 2), (False, True, 1), (False, True, 2), (True, False, 1), (True, True, 1)],
)
def test_two_lightning_processes_equal_one(manual, per_rank, k, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    data = loader(dtype=torch.float64)
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "precision": "64-true"}
    fit(
        HalfOfEachBatch(tmp_path, manual=manual),
        SAMCallback(rho=0.5, per_rank=per_rank),
        data=data,
        max_epochs=1,
        accumulate_grad_batches=k,
        **options,
    )
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert bits(one) == bits(other)
    twin = HalfOfEachBatch()
    optimizer = steppe.SAM(twin.configure_optimizers(), rho=0.5, model=twin)
    for start in range(0, BATCHES, k):
        window = [batch(i, dtype=torch.float64) for i in range(start, min(start + k, BATCHES))]
        optimizer.zero_grad()
        for ranks in [(0,), (1,)] if per_rank else [(0, 1)]:
            for sam_pass in optimizer.passes(accumulate=True):
                with sam_pass:
                    for micro in window:
                        (sum(twin.loss(micro, rank) for rank in ranks) / 2 / k).backward()
        optimizer.step()
    for p, q in zip(one, twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
