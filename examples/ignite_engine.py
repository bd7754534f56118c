"""Steppe in PyTorch-Ignite: an update function with passes(), metrics counted once, a schedule of rho, checkpoints."""

import tempfile

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, PiecewiseLinear
from ignite.metrics import Accuracy, Average
from sklearn.datasets import load_digits

import steppe


def build(epochs=6, steps=45, scaler=None):
    """Return a trainer, whose output is that of the pass at w, and the objects to save in a checkpoint."""
    torch.manual_seed(0)
    hidden = torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU()
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(32, 10))
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)

    def update(engine, batch):
        model.train()
        x, y = batch
        for sam_pass in optimizer.passes():
            with sam_pass:
                predictions = model(x)
                loss = F.cross_entropy(predictions, y)
                scaler.scale(loss).backward()
                if sam_pass.is_first:  # metrics count each sample once
                    output = {"y_pred": predictions.detach(), "y": y, "loss": loss.detach()}
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return output

    trainer = Engine(update)
    Average(lambda out: out["loss"]).attach(trainer, "loss")
    Accuracy(lambda out: (out["y_pred"], out["y"])).attach(trainer, "accuracy")
    rho = PiecewiseLinear(optimizer, "sam_rho", [(0, 0.0), (steps, 0.05), (epochs * steps, 0.2)])
    trainer.add_event_handler(Events.ITERATION_STARTED, rho)
    return trainer, {"model": model, "optimizer": optimizer, "trainer": trainer, "rho": rho, "scaler": scaler}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is tiny
    x, y = load_digits(return_X_y=True)
    batches = list(zip(torch.tensor(x / 16, dtype=torch.float32).split(40), torch.tensor(y).split(40), strict=True))
    trainer, saved = build()
    checkpoint = Checkpoint(saved, DiskSaver(tempfile.mkdtemp()))  # to load: Checkpoint.load_objects(saved, file)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    metrics = trainer.run(batches, max_epochs=6).metrics
    print(f"epoch 6: loss at w {metrics['loss']:.3f}, train accuracy {metrics['accuracy']:.1%}")
    rho = saved["optimizer"].param_groups[0]["sam_rho"]
    print(f"rho at the end {rho:.3f}, saved {checkpoint.last_checkpoint.name}")
