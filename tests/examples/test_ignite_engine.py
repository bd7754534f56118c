"""examples/ignite_engine.py against SAM by hand: metrics, schedules of rho, checkpoints, loss scaling."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("ignite")
pytest.importorskip("sklearn")

from example_files import load_example
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from sam_by_hand import assert_close, relative_distance, sam_by_hand

import steppe
from support import model_bits

EPOCHS = 2


@pytest.fixture(scope="module")
def ignite_engine():
    return load_example("ignite_engine.py")


@pytest.fixture(scope="module")
def batches():
    g = torch.Generator().manual_seed(1)
    return [(x, x[:, :10].argmax(1)) for x in torch.randn(5, 16, 64, generator=g)]


def radius(step: int, steps: int) -> float:
    """Return what PiecewiseLinear sets: 0 to 0.05 in the first epoch, then up to 0.2 at the end."""
    end = EPOCHS * steps
    return 0.05 * step / steps if step < steps else 0.05 + 0.15 * (step - steps) / (end - steps)


def by_hand(ignite_engine, batches, *, radius=radius):
    model = ignite_engine.build()[1]["model"]
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step, (x, y) in enumerate(batches * EPOCHS):

        def backward(x=x, y=y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(sam_by_hand(model, base, radius(step, len(batches)), backward, clip=1.0))
    return model, torch.stack(losses)


def test_weights_and_metrics_equal_sam_by_hand(ignite_engine, batches):
    trainer, saved = ignite_engine.build(EPOCHS, len(batches))
    trainer.run(batches, max_epochs=EPOCHS)
    reference, losses = by_hand(ignite_engine, batches)
    assert_close(saved["model"], reference, rtol=5e-6)
    assert trainer.state.metrics["loss"] == pytest.approx(float(losses[-len(batches) :].mean()), rel=1e-5)
    assert relative_distance(saved["model"], by_hand(ignite_engine, batches, radius=lambda *_: 0.0)[0]) > 0.01


def test_iteration_is_one_step_of_two_passes(ignite_engine, batches):
    trainer, saved = ignite_engine.build(EPOCHS, len(batches))
    forwards = []
    saved["model"].register_forward_hook(lambda *_: forwards.append(1))
    counted = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: counted.append(len(engine.state.output["y"])))
    trainer.run(batches, max_epochs=1)
    assert counted == [16] * len(batches)
    assert len(forwards) == 2 * len(batches)
    assert saved["model"][1].num_batches_tracked == len(batches)


def test_resuming_from_a_checkpoint_gives_the_same_bits(ignite_engine, batches, tmp_path):
    trainer, saved = ignite_engine.build(EPOCHS, len(batches))
    checkpoint = Checkpoint(saved, DiskSaver(str(tmp_path), require_empty=False), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    trainer.run(batches, max_epochs=EPOCHS)

    resumed, parts = ignite_engine.build(EPOCHS, len(batches))
    Checkpoint.load_objects(parts, torch.load(tmp_path / f"checkpoint_{len(batches)}.pt", weights_only=True))
    resumed.run(batches, max_epochs=EPOCHS)
    assert resumed.state.iteration == EPOCHS * len(batches)
    assert model_bits(parts["model"]) == model_bits(saved["model"])
    assert parts["optimizer"].param_groups[0]["sam_rho"] == saved["optimizer"].param_groups[0]["sam_rho"]


def test_loss_scale_does_not_change_the_weights(ignite_engine, batches):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        trainer, saved = ignite_engine.build(EPOCHS, len(batches), scaler)
        trainer.run(batches, max_epochs=EPOCHS)
        results.append(saved["model"])
    assert_close(*results, rtol=2e-6)


def test_infinite_loss_skips_the_step_and_halves_the_scale(ignite_engine, batches):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer, saved = ignite_engine.build(EPOCHS, len(batches), scaler)
    before = [p.detach().clone() for p in saved["model"].parameters()]
    x, y = batches[0]
    trainer.run([(x * torch.inf, y)], max_epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(saved["model"].parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**9


def test_supervised_trainer_of_ignite_warns_of_plain_steps():
    """Its update function runs one backward and a bare step()."""
    model = torch.nn.Linear(4, 2)
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    with pytest.warns(UserWarning, match="without sharpness-aware minimization") as warned:
        trainer.run([(torch.ones(2, 4), torch.tensor([0, 1]))] * 3, max_epochs=1)
    assert len(warned) == 1
