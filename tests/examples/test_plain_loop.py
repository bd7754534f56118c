"""examples/plain_loop.py against SAM by hand in float32."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")

from example_files import load_example
from sam_by_hand import assert_close, relative_distance, sam_by_hand

STEPS = 12


def by_hand(plain, rho: float, *, micro_batches: int = 3, clip: float = 1.0):
    """Train as the example does, in float32."""
    torch.manual_seed(0)
    (x, y), _ = plain.digits("cpu")
    hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(base, max_lr=0.3, total_steps=STEPS)
    order = torch.randint(len(x), (STEPS, micro_batches, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for batch in order:

        def backward(batch=batch):
            parts = []
            for i in batch:
                parts.append(F.cross_entropy(model(x[i]), y[i]) / micro_batches)
                parts[-1].backward()
            return torch.stack(parts).sum()

        losses.append(sam_by_hand(model, base, rho, backward, clip))
        scheduler.step()
    return model, torch.stack(losses)


@pytest.fixture(scope="module")
def plain():
    return load_example("plain_loop.py")


@pytest.fixture(scope="module")
def reference(plain):
    return by_hand(plain, 0.05)


def test_fp32_with_accumulation_clipping_and_schedule_equals_sam_by_hand(plain, reference):
    model, losses, _ = plain.train("fp32", steps=STEPS)
    assert_close(model, reference[0], rtol=2e-6)
    torch.testing.assert_close(losses, reference[1], rtol=1e-6, atol=1e-7)
    assert relative_distance(model, by_hand(plain, 0.0)[0]) > 0.01, "SAM must make a difference in this test"
    assert relative_distance(model, by_hand(plain, 0.05, clip=1e9)[0]) > 0.01, "so must clipping"


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("bf16", 5e-3), ("fp16", 1.5e-3 if torch.__version__.startswith("2.6.") else 1e-3)],  # torch 2.6 has 1.4e-3
)
def test_half_precision_is_closer_to_float32_than_training_without_sam(plain, reference, precision, tolerance):
    model, losses, _ = plain.train(precision, steps=STEPS)
    assert 0 < relative_distance(model, reference[0]) < tolerance
    assert relative_distance(model, by_hand(plain, 0.0)[0]) > 3 * tolerance
    torch.testing.assert_close(losses, reference[1], rtol=10 * tolerance, atol=10 * tolerance)


def test_fp16_overflow_skips_the_step_and_the_schedule(plain, monkeypatch):
    """The first scale is too large, so nothing but the scale changes."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=2.0**24, **kwargs))
    rates = []
    schedule = torch.optim.lr_scheduler.OneCycleLR.step
    monkeypatch.setattr(
        torch.optim.lr_scheduler.OneCycleLR, "step", lambda self, *args: (rates.append(1), schedule(self, *args))[1]
    )
    first, _, _ = plain.train("fp16", steps=1)
    assert len(rates) == 1, "the constructor's call only"
    torch.manual_seed(0)
    hidden = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Dropout(0.1)
    fresh = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 10))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), fresh.parameters(), strict=True))
    assert first[1].num_batches_tracked == 3, "one pass over three micro-batches"
