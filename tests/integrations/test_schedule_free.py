"""Frameworks switch a schedule-free base between training and evaluation through SAM (C31)."""

import pytest
import torch

import steppe
from support import batch, bits, net

pytest.importorskip("transformers")
schedulefree = pytest.importorskip("schedulefree")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from tiny_transformer import IGNORED_WARNINGS, gpt, tokens, trainer  # noqa: E402

pytestmark = IGNORED_WARNINGS


def test_c31_trainer_evaluates_and_saves_the_averaged_weights(tmp_path):
    model = gpt()
    trained = trainer(tmp_path, model, rho=0.1, optim="schedule_free_adamw", learning_rate=1e-2)
    trained.train()
    base = trained.optimizer.optimizer.base
    assert isinstance(base, schedulefree.AdamWScheduleFree)
    trained.optimizer.train()
    at_y = [p.detach().clone() for p in model.parameters()]
    trained.evaluate(eval_dataset=tokens())
    assert not base.param_groups[0]["train_mode"]
    assert bits(at_y) != bits(model.parameters())


def test_c31_accelerate_switches_the_base():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    model = net()
    base = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    base.train()
    model, optimizer = Accelerator(cpu=True).prepare(model, steppe.SAM(base, rho=0.1, model=model))
    for step in range(3):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    before = bits(model.parameters())
    optimizer.eval()
    assert bits(model.parameters()) != before
    assert not base.param_groups[0]["train_mode"]
