"""Two processes on gloo equal one: the raw loop with Accelerate, and the Hugging Face Trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import steppe

pytest.importorskip("transformers")

from tiny_transformer import IGNORED_WARNINGS, adamw, by_hand, gpt, tokens
from two_process_worker import mlp, sam, samples

pytestmark = pytest.mark.slow  # two processes import all of transformers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_process_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, folder]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ran = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_close(state, model):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-12)


def test_replicas_have_the_same_bits(ranks):
    for loop in ranks[0].keys() & {"for all", "for each", "trainer", "adapters"}:
        for name, value in ranks[0][loop].items():
            assert torch.equal(value, ranks[1][loop][name]), (loop, name)


def test_two_processes_with_accumulation_equal_one(ranks):
    model = mlp()
    optimizer = sam(model)
    micro = list(torch.utils.data.DataLoader(samples(), batch_size=4))  # two processes with two samples each
    for window in (micro[:2], micro[2:]) * 2:
        for sam_pass in optimizer.passes():
            with sam_pass:
                for x, y in window:
                    (F.cross_entropy(model(x), y) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert_close(ranks[0]["for all"], model)


def test_two_processes_with_a_perturbation_for_each_micro_batch_equal_one(ranks):
    model = mlp()
    optimizer = sam(model)
    for step, (x, y) in enumerate(torch.utils.data.DataLoader(samples(), batch_size=4)):
        for sam_pass in optimizer.passes(accumulate=True):
            with sam_pass:
                (F.cross_entropy(model(x), y) / 2).backward()
        if step in (1, 2):
            optimizer.step()
            optimizer.zero_grad()
    assert_close(ranks[0]["for each"], model)
    assert "replicas drift apart" in ranks[0]["error"]


def test_two_processes_of_the_trainer_equal_one(ranks):
    model = gpt(dropout=0.0).double()
    optimizer = steppe.SAM(adamw(model), rho=0.1, model=model)
    logs = by_hand(model, optimizer, k=2, clip=0.5, data=tokens(12), size=4)
    assert_close(ranks[0]["trainer"], model)
    for written, expected in zip(ranks[0]["logs"], logs, strict=False):
        assert written["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert written["grad_norm"] == pytest.approx(expected["norm"], rel=1e-6)
        assert written["perturbed_loss"] == pytest.approx(expected["perturbed_loss"], rel=1e-6)


@IGNORED_WARNINGS
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning")
def test_two_processes_of_the_trainer_on_merged_weights_equal_one(ranks):
    pytest.importorskip("peft")
    from tiny_peft import adapted

    from steppe.integrations.peft import merged_sam

    model, plain = adapted(dropout=0.0), adapted(dropout=0.0)
    by_hand(model, merged_sam(adamw(model), 0.1, model=model), k=2, clip=0.5, data=tokens(12), size=4)
    by_hand(plain, merged_sam(adamw(plain), 0.0, model=plain), k=2, clip=0.5, data=tokens(12), size=4)
    assert_close(ranks[0]["adapters"], model)
    with pytest.raises(AssertionError):
        assert_close(ranks[0]["adapters"], plain)
