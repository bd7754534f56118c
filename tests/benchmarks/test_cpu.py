"""benchmarks/cpu: each choice is computed as it says, all on the same problem; the tables show what was measured."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from cpu import choices, processes, table  # noqa: E402
from cpu.choices import Choice, Sizes, step  # noqa: E402
from results import Result  # noqa: E402

TINY = Sizes(batch=8, width=2, widths=(3,), images=20, chunks=(10, 20), rounds=2, repeat=1)


@pytest.fixture
def seen():
    """(threads, dtype, channels-last, gradients, images) of what convolutions have computed."""
    found = []

    def look(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            last = output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous()
            found.append((torch.get_num_threads(), output.dtype, last, torch.is_grad_enabled(), len(output)))

    hook = nn.modules.module.register_module_forward_hook(look)
    before = torch.get_num_threads()
    yield found
    hook.remove()
    torch.set_num_threads(before)


@pytest.mark.parametrize("choice", list(choices.choices(2)), ids=str)
def test_a_step_is_computed_as_it_says(choice, seen):
    step(choice, 8, 16)()
    assert {how[:3] for how in seen} == {
        (choice.threads, torch.bfloat16 if choice.bf16 else torch.float32, choice.channels_last)
    }
    assert {how[3:] for how in seen} == {(True, 8)}


def test_an_evaluation_has_no_gradients_and_all_images_in_chunks(seen):
    take = choices.evaluation(Choice(1), 20, 8, 2)
    take()
    assert {how[3] for how in seen} == {False}
    stem = seen[:: len(seen) // 3]
    assert [how[4] for how in stem] == [8, 8, 4]


def test_all_combinations_are_there_and_the_first_is_the_one_that_others_are_beside():
    found = list(choices.choices(2, compiled=True))
    assert len(set(found)) == 16
    assert found[0] == Choice(2)
    assert {choice.threads for choice in choices.choices(1)} == {1}
    assert {choice.threads for choice in choices.choices(8)} == {1, 2, 8}
    assert [Choice(2, channels_last=True).safe(width) for width in (8, 16)] == [False, True]
    assert Choice(1, channels_last=True).safe(8)


@pytest.mark.slow
def test_everything_is_measured_and_shown(monkeypatch):
    monkeypatch.setattr(choices, "seconds", lambda take: take() or 1.0)
    data = {
        **{"cores": 1, "batch": 8, "width": 2, "images": 20},
        "steps": choices.steps(TINY, 1, compiled=False),
        "evaluations": choices.evaluations(TINY, 1),
        "at_once": processes.at_once(Sizes(batch=8, width=2, rounds=1, repeat=1), 1),
    }
    assert len(data["steps"]) == len(data["evaluations"]) == 2 * 4
    assert data["steps"][0]["ratio"] == 1.0
    shown = table.render(Result("cpu", "a CPU", False, "2026-11-23", "python it", "2.13.0", {}, data))
    lines = shown.splitlines()
    for line, after in pairwise(lines):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")
    assert sum(line.startswith("| 1 thread, bfloat16, channels-last |") for line in lines) == 2
    assert lines[-1].startswith("a CPU, torch 2.13.0")


def test_steps_of_all_processes_are_counted(monkeypatch):
    """Two processes that make as many steps as one in the same time are twice as fast."""

    class Made:
        def __init__(self, number, choice, sizes):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def train(self, steps):
            assert steps == 10

    monkeypatch.setattr(processes, "Team", Made)
    monkeypatch.setattr(processes, "in_turns", lambda made, rounds: {name: [2.0] * rounds for name in made})
    rows = processes.at_once(Sizes(width=16, rounds=3, repeat=1), 2)
    assert [(row["processes"], row["threads"], row["bf16"]) for row in rows] == [
        (1, 2, False), (1, 1, False), (2, 1, False), (1, 2, True), (1, 1, True), (2, 1, True),
    ]  # fmt: skip
    assert [1 / row["ratio"] for row in rows] == [1, 1, 2, 1, 1, 2]
    assert [row["seconds"] for row in rows] == [0.2, 0.2, 0.1, 0.2, 0.2, 0.1]
