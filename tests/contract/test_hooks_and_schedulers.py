"""Contract C4: optimizer hooks fire and learning-rate schedulers work."""

import warnings

import pytest
import torch

from steppe import SAM
from support import BASES, DRIVES, every_drive, net, train


@every_drive
def test_c4_step_hooks_fire_once_on_wrapper_and_base(drive):
    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), model=model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("sam pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("sam post"))
    optimizer.base.register_step_pre_hook(lambda *_: calls.append("base pre"))
    optimizer.base.register_step_post_hook(lambda *_: calls.append("base post"))
    train(model, optimizer, DRIVES[drive], 1)
    assert calls == ["sam pre", "base pre", "base post", "sam post"]


@pytest.mark.parametrize("on", ["wrapper", "base"])
@every_drive
def test_c4_schedulers_on_wrapper_or_base_step_without_a_warning(drive, on):
    model = net()
    optimizer = SAM(BASES["momentum"](model.parameters()), model=model)
    target = optimizer if on == "wrapper" else optimizer.base
    scheduler = torch.optim.lr_scheduler.OneCycleLR(target, max_lr=0.5, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = []
        for step in range(6):
            train(model, optimizer, DRIVES[drive], 1, start=step)
            scheduler.step()
            rates.append(optimizer.base.param_groups[0]["lr"])
    assert len(set(rates)) == 6
    assert max(rates) == pytest.approx(0.5, rel=0.1)
