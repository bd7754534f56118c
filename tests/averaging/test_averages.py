"""What the averages are, by every way to drive a step."""

import pytest
import torch
import torch.nn.functional as F
from named_methods import WRAPPERS, build
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from averaged_training import sam, sgd, steps, weights
from steppe.averaging import EMA, SWA, LastPart, from_name
from steppe.methods.bsam import BSAM
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.sampa import SAMPa
from steppe.methods.sassha import SASSHA
from steppe.methods.wsam import DecoupledWSAM
from support import DRIVES, batch, bits, by_closure, net, parameter, plain

# What is averaged.


@pytest.mark.parametrize("drive", [*DRIVES, "plain"])
def test_average_of_each_drive_has_the_bits_of_torchs_updated_by_hand_after_each_step(drive):
    run = {**DRIVES, "plain": plain}[drive]
    model = net()
    optimizer = sgd(model) if drive == "plain" else sam(model)
    ema = EMA(model, optimizer, 0.9, warmup=False)
    swa = SWA(model, optimizer)
    by_hand = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mean_by_hand = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    for _ in steps(model, optimizer, run, range(4)):
        by_hand.update_parameters(model)
        mean_by_hand.update_parameters(model)
    assert bits(ema.module.parameters()) == bits(by_hand.module.parameters()) != bits(model.parameters())
    assert bits(swa.module.parameters()) == bits(mean_by_hand.module.parameters())
    assert int(ema.n_averaged) == int(by_hand.n_averaged) == 4


@pytest.mark.parametrize(
    "name",
    [*WRAPPERS, "lookbehind of 2", "sampa", "decoupled wsam", "bsam", "sassha"],
    ids=lambda n: n.replace(" ", "-"),
)
def test_each_method_is_averaged_once_a_step_at_the_weights_between_steps(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made = {
        "lookbehind of 2": lambda: Lookbehind(sgd(model), 0.1, ascent_steps=2, model=model),
        "sampa": lambda: SAMPa(sgd(model), 0.1, model=model),
        "decoupled wsam": lambda: DecoupledWSAM(sgd(model), 0.1, gamma=0.8, model=model),
        "bsam": lambda: BSAM(model.parameters(), 0.05, n_data=500, rho=0.1, model=model),
        "sassha": lambda: SASSHA(model.parameters(), 0.05, interval=2, model=model),
    }
    optimizer = made[name]() if name in made else build(name, "momentum")(model)
    averaged = SWA(model, optimizer)
    seen, x = [], torch.linspace(-1, 1, 12).reshape(4, 3)
    for _ in range(4):
        by_closure(optimizer, lambda: (model(x) - x[:, :2]).square().mean())
        seen.append(weights(model))
    for mine, *theirs in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(mine.detach(), torch.stack(theirs).mean(0))
    assert int(averaged.n_averaged) == 4


def test_swa_averages_each_nth_step_after_its_start_and_follows_the_weights_before():
    w = parameter(0.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = SWA(model, optimizer, start=2, every=2)
    found = []
    for _ in range(8):  # w is -1, -2, ..., -8
        w.grad = torch.ones(1)
        optimizer.step()
        found.append(averaged.module[0].item())
    assert found == [-1, -2, -3, -4, -4, -5, -5, -6]


def test_last_part_is_the_mean_over_the_share_of_the_last_steps():
    w = parameter(0.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = LastPart(model, optimizer, total_steps=10, share=0.3)
    for _ in range(10):
        w.grad = torch.ones(1)
        optimizer.step()
    assert averaged.module[0].item() == -9.0  # of -8, -9, -10
    assert LastPart(model, optimizer, total_steps=2, share=0.01).start == 1  # at least the last step


def test_warmup_gives_the_first_weights_no_large_share():
    w = parameter(100.0)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    slow, warm = EMA(model, optimizer, warmup=False), EMA(model, optimizer)
    expected = 99.0
    for n in range(50):
        w.grad = torch.ones(1) if n == 0 else (w.detach() > 1).float() * w.detach() / 2
        optimizer.step()
        expected += (w.item() - expected) * (1 - (1 + n) / (10 + n)) if n else 0.0
    assert warm.module[0].item() == pytest.approx(expected, rel=1e-4)
    assert warm.module[0].item() < 3 < 90 < slow.module[0].item()


def test_accumulated_micro_batches_are_one_step():
    model = net()
    optimizer = sam(model)
    averaged = SWA(model, optimizer)
    for number in range(2):
        for sam_pass in optimizer.passes():
            with sam_pass:
                for part in range(3):
                    x, y = batch(3 * number + part)
                    F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for accumulate in (False, True):
        x, y = batch(7)
        for sam_pass in optimizer.passes(accumulate=accumulate):
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert int(averaged.n_averaged) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_average_of_weights_in_half_precision_is_in_float32(dtype):
    w = parameter(1.0, dtype=dtype)
    model = nn.ParameterList([w])
    optimizer = torch.optim.SGD([w], lr=1.0)
    averaged = EMA(model, optimizer, 0.999, warmup=False)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data.fill_(1.125)
    for _ in range(100):
        optimizer.step()
    assert averaged.module[0].dtype == torch.float32
    assert averaged.module[0].item() == pytest.approx(1.125 - 0.125 * 0.999**100, abs=1e-6)
    with averaged.applied():
        assert w.dtype == dtype
        assert w.item() == pytest.approx(averaged.module[0].item(), rel=1e-2)


def test_parameters_of_several_types_and_complex_ones_are_averaged():
    model = nn.ParameterDict(
        {"a": parameter(1.0, dtype=torch.float64), "b": parameter(1.0), "c": nn.Parameter(torch.tensor([1.0 + 2.0j]))}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averaged = SWA(model, optimizer)
    for _ in range(3):
        for p in model.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert {name: p.item() for name, p in averaged.module.items()} == {"a": -1.0, "b": -1.0, "c": -1.0 + 2.0j}
    assert averaged.module["a"].dtype == torch.float64


def test_tied_parameters_are_averaged_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    seen = []
    for _ in range(3):
        plain(optimizer, lambda: model(torch.ones(1, 2)).square().sum())
        seen.append(model[0].weight.detach().clone())
    assert averaged.module[0].weight is averaged.module[1].weight
    torch.testing.assert_close(averaged.module[0].weight.detach(), torch.stack(seen).mean(0))


# Buffers.


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls = self.calls + 1
        if self.calls == 2:
            self.register_buffer("late", torch.ones(3))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, -torch.inf]))
        return self.norm(x)


def test_running_statistics_are_averaged_and_all_other_buffers_copied():
    model = WithBuffers()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    means = []
    for number in range(3):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(number))
        plain(optimizer, lambda x=x: model(x).square().sum())
        means.append(model.norm.running_mean.clone())
    module = averaged.module
    torch.testing.assert_close(module.norm.running_mean, torch.stack(means).mean(0))
    assert module.mask.tolist() == [0.0, -torch.inf, -torch.inf]  # a mean of -inf would be NaN
    assert module.late.tolist() == [1.0, 1.0, 1.0]
    assert int(module.calls) == int(module.norm.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: EMA(m, decay=1.5), "decay must be between 0 and 1, got 1.5"),
        (lambda m: SWA(m, start=-1), "start must be 0 or more, got -1"),
        (lambda m: SWA(m, every=0), "every must be 1 or more, got 0"),
        (lambda m: SWA(m, every=0.5), "every must be a whole number"),
        (lambda m: LastPart(m, total_steps=0), "total_steps must be 1 or more, got 0"),
        (lambda m: LastPart(m, total_steps=10, share=0.0), "share must be more than 0 and at most 1, got 0.0"),
        (lambda m: from_name("polyak", m, total_steps=1), "there is no average 'polyak'"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(nn.Linear(2, 1))


def test_names_make_the_averages_with_their_options():
    model = nn.Linear(2, 1)
    ema = from_name("ema", model, total_steps=100, decay=0.9)
    swa = from_name("swa", model, total_steps=100, share=0.5)
    assert (type(ema), ema.decay) == (EMA, 0.9)
    assert (type(swa), swa.start) == (LastPart, 50)
