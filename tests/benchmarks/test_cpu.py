"""benchmarks/cpu: every configuration computes as described, and the tables show the measurements."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from cpu import configurations, parallel_runs, table
from cpu.configurations import Configuration, Sizes, training_step
from results import Result

TINY = Sizes(batch=8, width=2, widths=(3,), images=20, chunks=(10, 20), rounds=2, repeat=1)


@pytest.fixture
def convolutions():
    """(threads, dtype, channels-last, gradients, images) of the convolutions that were computed."""
    found = []

    def record(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
            found.append((torch.get_num_threads(), output.dtype, last, torch.is_grad_enabled(), len(output)))

    hook = nn.modules.module.register_module_forward_hook(record)
    threads = torch.get_num_threads()
    yield found
    hook.remove()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("configuration", list(configurations.configurations(2)), ids=str)
def test_step_computes_in_its_configuration(configuration, convolutions):
    training_step(configuration, 8, 16)()
    assert {how[:3] for how in convolutions} == {
        (configuration.threads, torch.bfloat16 if configuration.bf16 else torch.float32, configuration.channels_last)
    }
    assert {how[3:] for how in convolutions} == {(True, 8)}


def test_evaluation_has_no_gradients_and_splits_all_images_into_chunks(convolutions):
    configurations.evaluation(Configuration(1), 20, 8, 2)()
    assert {how[3] for how in convolutions} == {False}
    stem = convolutions[:: len(convolutions) // 3]
    assert [how[4] for how in stem] == [8, 8, 4]


def test_all_combinations_are_measured_and_the_reference_is_the_first():
    found = list(configurations.configurations(2, compiled=True))
    assert len(set(found)) == 16
    assert found[0] == Configuration(2)
    assert {each.threads for each in configurations.configurations(1)} == {1}
    assert {each.threads for each in configurations.configurations(8)} == {1, 2, 8}
    assert [Configuration(2, channels_last=True).safe(width) for width in (8, 16)] == [False, True]
    assert Configuration(1, channels_last=True).safe(8)


@pytest.mark.slow
def test_table_has_a_row_for_every_measurement(monkeypatch):
    monkeypatch.setattr(configurations, "seconds", lambda step: step() or 1.0)
    data = {
        **{"cores": 1, "batch": 8, "width": 2, "images": 20},
        "steps": configurations.measure_steps(TINY, 1, compiled=False),
        "evaluations": configurations.measure_evaluations(TINY, 1),
        "parallel_runs": parallel_runs.measure_parallel_runs(Sizes(batch=8, width=2, rounds=1, repeat=1), 1),
    }
    assert len(data["steps"]) == len(data["evaluations"]) == 2 * 4
    assert data["steps"][0]["ratio"] == 1.0
    text = table.render(Result("cpu", "a CPU", False, "2026-11-23", "python it", "2.13.0", {}, data))
    lines = text.splitlines()
    for line, after in pairwise(lines):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")
    assert sum(line.startswith("| 1 thread, bfloat16, channels-last |") for line in lines) == 2
    assert lines[-1].startswith("a CPU, torch 2.13.0")


def test_steps_of_all_processes_count(monkeypatch):
    """Two processes that take as many steps as one in the same time are twice as fast."""

    class FakeProcesses:
        def __init__(self, number, configuration, sizes):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def train(self, steps):
            assert steps == 10

    monkeypatch.setattr(parallel_runs, "TrainingProcesses", FakeProcesses)
    monkeypatch.setattr(
        parallel_runs, "in_turns", lambda functions, rounds: {name: [2.0] * rounds for name in functions}
    )
    rows = parallel_runs.measure_parallel_runs(Sizes(width=16, rounds=3, repeat=1), 2)
    assert [(row["processes"], row["threads"], row["bf16"]) for row in rows] == [
        (1, 2, False), (1, 1, False), (2, 1, False), (1, 2, True), (1, 1, True), (2, 1, True),
    ]  # fmt: skip
    assert [1 / row["ratio"] for row in rows] == [1, 1, 2, 1, 1, 2]
    assert [row["seconds"] for row in rows] == [0.2, 0.2, 0.1, 0.2, 0.2, 0.1]
