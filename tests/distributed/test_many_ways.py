"""Each way to use several devices, in each precision, with accumulation, clipping, schedules, and a way back."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import steppe
from layouts import LAYOUTS, SEE_ALL, mine, network, plain, samples, weights
from ranks import together
from support import bits
from test_checkpoints_of_many import zero_redundancy

WAYS = [*LAYOUTS, "ddp per rank", "zero"]
MIXED = ["partly", "tensor parallel"]  # sharded and plain parameters, which torch's own scaler and clipping refuse


def made(way, *, dtype=torch.float64, seed=0, **options):
    layout = LAYOUTS[{"ddp per rank": "ddp", "zero": "ddp"}.get(way, way)] if way else plain
    model = layout(network(seed).to(dtype))
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    base = (zero_redundancy if way == "zero" else sgd)(list(model.parameters()))
    combination = steppe.PenalizedNorm(alpha=0.7)
    return model, steppe.SAM(
        base, rho=0.1, model=model, combination=combination, per_rank=way == "ddp per rank", **options
    )


def batches(way, step, dtype=torch.float64):
    x, y = samples(step)
    x, y = (x, y) if way is None or way in SEE_ALL else mine(x, y)
    return x.to(dtype), y


def walked(optimizer, loss):
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss()


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-12, "atol": 1e-12}))


# Precision.


def with_a_scaler(way, scales):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scales)
    model, optimizer = made(way, dtype=torch.float32, scaler=scaler)
    for step in range(5):
        x, y = batches(way, step, torch.float32)
        walked(optimizer, lambda x=x, y=y: scaler.scale(F.cross_entropy(model(x), y)).backward())
        scaler.step(optimizer)
        scaler.update()
    return bits(weights(model)), scaler.get_scale()


@pytest.mark.parametrize("way", [way for way in WAYS if way not in MIXED])
def test_a_changing_loss_scale_changes_no_bit(way):
    for (found, scale), (expected, _) in zip(
        together()(with_a_scaler, way, True), together()(with_a_scaler, way, False), strict=True
    ):
        assert found == expected
        assert scale == 2.0**12


def overflows(way):
    """One rank's loss is infinite, in the second of three steps, at w + e."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    model, optimizer = made(way, dtype=torch.float32, scaler=scaler)
    for step in range(3):
        x, y = batches(way, step, torch.float32)
        before = bits(weights(model))
        for sam_pass in optimizer.passes():
            with sam_pass:
                bad = step == 1 and sam_pass.is_perturbed and dist.get_rank() == dist.get_world_size() - 1
                scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (bits(weights(model)) == before) == (step == 1)
    return scaler.get_scale(), bits(weights(model))


@pytest.mark.parametrize("way", ["ddp", "ddp per rank", "fsdp2", "zero"])
def test_an_overflow_on_one_rank_halves_the_scale_on_all(way):
    (scale, found), (other, same) = together()(overflows, way)
    assert scale == other == 2.0**9
    assert found == same


def in_bfloat16(way):
    model, optimizer = made(way, dtype=torch.float32)

    def loss(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = F.cross_entropy(model(x), y)
        value.backward()

    for step in range(4):
        walked(optimizer, functools.partial(loss, *batches(way, step, torch.float32)))
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "ddp per rank"])
def test_autocast_equals_one_process(way):
    expected = in_bfloat16(None)
    moved = max((a - b).detach().abs().max() for a, b in zip(expected, network().float().parameters(), strict=True))
    for found in together()(in_bfloat16, way):
        close(found, expected, rtol=0, atol=0.05 * float(moved))


# Accumulation, clipping, schedules.


def a_loop(way, parts):
    model, optimizer = made(way)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    lengths = []
    for step in range(4):
        x, y = batches(way, step)

        def loss(x=x, y=y):
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(a), b) / parts).backward()

        walked(optimizer, loss)
        if way not in MIXED:
            lengths.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)))
        optimizer.step()
        schedule.step()
    assert all(length > 0.2 for length in lengths)
    return weights(model)


def without_clipping():
    """The loop above, as a mixture has to go it, in one process."""
    model, optimizer = made(None)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=6)
    for step in range(4):
        x, y = batches(None, step)
        walked(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y).backward())
        optimizer.step()
        schedule.step()
    return weights(model)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "ddp per rank"])
def test_accumulation_clipping_and_a_schedule_equal_one_process(way, parts):
    expected = without_clipping() if way in MIXED else a_loop(None, 1)
    for found in together()(a_loop, way, parts):
        close(found, expected)


def test_accumulation_with_a_perturbation_a_rank():
    """All micro-batches of a rank climb together, however many there are."""
    one, two = (together()(a_loop, "ddp per rank", parts) for parts in (1, 2))
    for found, expected in zip(two, one, strict=True):
        close(found, expected)
    assert max((a - b).abs().max() for a, b in zip(one[0], a_loop(None, 1), strict=True)) > 1e-6


def torch_refuses(way):
    messages = []
    for steps in (lambda model, scaler, optimizer: scaler.step(optimizer), _clipped):
        scaler = torch.amp.GradScaler("cpu")
        model, optimizer = made(way, dtype=torch.float32, scaler=scaler)
        x, y = batches(way, 0, torch.float32)
        walked(optimizer, lambda x=x, y=y, model=model, s=scaler: s.scale(F.cross_entropy(model(x), y)).backward())
        with pytest.raises(RuntimeError) as error:
            steps(model, scaler, optimizer)
        messages.append(str(error.value))
    return messages


def _clipped(model, scaler, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)


@pytest.mark.parametrize("way", MIXED)
def test_mixtures_are_refused_by_torch_s_own_scaler_and_clipping(way):
    for messages in together()(torch_refuses, way):
        assert all("mixed torch.Tensor and DTensor" in message for message in messages)


# The way back.


def resumed(way):
    def run(model, optimizer, steps):
        for step in steps:
            x, y = batches(way, step)
            walked(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y).backward())
            optimizer.step()

    model, optimizer = made(way)
    run(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, range(3, 6))
    other, its_optimizer = made(way, seed=7)
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    run(other, its_optimizer, range(3, 6))
    return bits(weights(other)) == bits(weights(model))


def test_a_perturbation_a_rank_goes_on_to_the_bit():
    assert together()(resumed, "ddp per rank") == [True, True]
