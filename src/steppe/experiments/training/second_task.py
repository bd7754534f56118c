"""Forgetting in a comparison: train a copy of a run's network on a second task with the base, and measure the first."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from steppe.experiments.config.recipe import Run
from steppe.experiments.robustness.forgetting import train_on
from steppe.experiments.robustness.isolation import restored_generators, seed_generators_with_device
from steppe.experiments.storage.records import AFTER, FORGOTTEN, ON_SECOND
from steppe.experiments.tasks.batches import Batch, Epochs
from steppe.experiments.tasks.samples import Samples
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.evaluation import evaluate
from steppe.experiments.training.forward import in_float32
from steppe.experiments.training.optimizers import build_base
from steppe.experiments.world import World


def measure_forgetting(
    run: Run,
    task: Task,
    network: nn.Module,
    test: Samples,
    before: Mapping[str, float],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    raise_if_stopped: Callable[[], None],
) -> dict[str, float]:
    """Train a copy of a network on the task's second one, and measure both on test data, as fields of a record.

    The copy is trained by the base optimizer alone, whatever the method of the run, with a constant learning rate,
    `then_lr` or that of the first task. Both tasks are measured by the metrics of the first. The network and the global
    generators are unchanged. `steppe.experiments.robustness.forgetting` does this to any classifier.

    Args:
        run: The run that the network was trained in.
        task: Its task, which has a second one.
        network: The trained network.
        test: Test data of the first task.
        before: The measures of the network, by their names in records.
        device: The device of the network. Each of several processes trains a copy by itself, with the same result.
        autocast: Function that returns a context for each forward pass.
        raise_if_stopped: Called before each batch.
    """
    second, world = task.then, World(device)
    assert second is not None
    train, new = (second.samples(name, run.seed).to(device) for name in ("train", "test"))
    size = run.recipe.training.batch_size or task.usual_batch_size(train)
    with restored_generators(device):
        seed_generators_with_device(run.seed, device)
        copy = task.new_model().to(device)
        copy.load_state_dict(network.state_dict())
        base, _ = build_base(run, task, copy)
        if (lr := run.recipe.forgetting.then_lr) is not None:
            for group in base.param_groups:
                group["lr"] = lr

        def batches() -> Iterator[Batch]:
            epochs = Epochs(train, size, run.seed, world)
            for epoch in range(run.recipe.forgetting.then_epochs):
                for batch in epochs.batches(epoch):
                    raise_if_stopped()
                    yield batch

        def mean_loss(batch: Batch) -> Tensor:
            with autocast():
                outputs, targets = second.outputs(copy, batch.data)
            return second.mean_loss(in_float32(outputs), targets)

        train_on(copy, base, batches(), mean_loss)
        seed_generators_with_device(run.seed, device)  # of a model or metric that draws
        chunk = task.evaluation_batch_size or test.batch_size or size
        alike = replace(second, metrics=task.metrics)
        after = evaluate(task, copy, test, chunk, world, autocast, raise_if_stopped)
        found = evaluate(alike, copy, new, new.batch_size or chunk, world, autocast, raise_if_stopped)
    deciding = task.info.deciding
    measures = {f"test_{metric.name}{AFTER}": after[metric.name] for metric in task.info.measured}
    lost = deciding.advantage(before[f"test_{deciding.name}"], after[deciding.name])
    return measures | {
        f"test_{deciding.name}{FORGOTTEN}": lost,
        f"test_{deciding.name}{ON_SECOND}": found[deciding.name],
    }
