"""examples/timm_factory.py, and timm's factory, schedules and loss scaler, against SAM by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("sklearn")

from example_files import load_example
from sam_by_hand import assert_close, relative_distance, sam_by_hand
from torchvision_stand_in import torchvision_stand_in

import steppe
from support import by_passes, model_bits

with torchvision_stand_in():
    pytest.importorskip("timm")
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import NativeScaler

# One of each kind that runs on a CPU: momentum, sign, layer-wise trust, factored, orthogonalized, decoupled.
FACTORY = ("sgd", "nesterovw", "adamw", "lamb", "lars", "lion", "madgrad", "adafactorbv", "muon", "adopt", "cadamw")


@pytest.fixture(scope="module")
def timm_factory():
    return load_example("timm_factory.py")


def batches(n: int = 2):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(48 * n, 1, 12, 12, generator=g).double()
    return x, torch.randint(10, (48 * n,), generator=g)


def resnet():
    """Return the network in float64: rounding in float32 grows beyond the tolerance on some CPUs."""
    torch.manual_seed(0)
    return create_model("test_resnet", in_chans=1, num_classes=10).double()


def by_hand(x, y, *, rho=0.05, epochs=3, clip=1.0):
    model = resnet()
    base = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=0.8)
    steps = len(x) // 48
    schedule = CosineLRScheduler(
        base, t_initial=epochs * steps, warmup_t=steps, warmup_lr_init=1e-4, lr_min=1e-5, t_in_epochs=False
    )
    for step in range(epochs * steps):
        rows = slice(48 * (step % steps), 48 * (step % steps + 1))

        def backward(rows=rows):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss

        sam_by_hand(model, base, rho, backward, clip)
        schedule.step_update(step + 1)
    return model, base


def test_layer_decay_schedule_and_clipping_equal_sam_by_hand(timm_factory):
    x, y = batches()
    model = resnet()
    optimizer = timm_factory.train(model, x, y, opt="sgd", lr=0.1)
    reference, base = by_hand(x, y)
    assert_close(model, reference, rtol=1e-5)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [group["lr"] for group in base.param_groups]
    assert len(set(rates)) > 3, "different learning rates by layer"
    assert relative_distance(model, by_hand(x, y, rho=0.0)[0]) > 1e-3
    assert relative_distance(model, by_hand(x, y, clip=1e9)[0]) > 1e-3


def small(opt: str, method=steppe.SAM, **kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    base = create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.01)
    return model, base, method(base, model=model, **kwargs)


def run(model, drive, steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 4, generator=g), torch.randint(2, (16,), generator=g)
        drive(lambda x=x, y=y: F.cross_entropy(model(x), y))


@pytest.mark.parametrize("opt", [*FACTORY, *(f"lookahead_{opt}" for opt in ("sgd", "adamw"))])
def test_factory_optimizer_as_base_equals_sam_by_hand_and_resumes_with_the_same_bits(opt):
    """With rho = 0 the bits are those of the plain optimizer."""
    model, _, optimizer = small(opt, rho=0.0)
    twin, base, _ = small(opt, rho=0.0)
    torch.manual_seed(1)
    run(model, lambda loss: by_passes(optimizer, loss), 7)

    def plain(loss):
        base.zero_grad()
        loss().backward()
        base.step()

    torch.manual_seed(1)
    run(twin, plain, 7)
    assert model_bits(model) == model_bits(twin)

    model, _, optimizer = small(opt, rho=0.1)
    twin, base, _ = small(opt, rho=0.1)
    run(model, lambda loss: by_passes(optimizer, loss), 1)

    def by_hand(loss):
        def backward():
            value = loss()
            value.backward()
            return value

        sam_by_hand(twin, base, 0.1, backward)

    run(twin, by_hand, 1)
    assert_close(model, twin, rtol=1e-5)

    run(model, lambda loss: by_passes(optimizer, loss), 6, start=1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    run(model, lambda loss: by_passes(optimizer, loss), 6, start=7)
    resumed, _, again = small(opt, rho=0.1)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    run(resumed, lambda loss: by_passes(again, loss), 6, start=7)
    assert model_bits(resumed) == model_bits(model)


def test_biases_get_no_weight_decay_and_the_same_rho():
    model, base, optimizer = small("adamw", rho=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert [group["sam_rho"] for group in base.param_groups] == [0.1, 0.1]
    assert sum(len(group["params"]) for group in base.param_groups) == len(list(model.parameters()))


def test_native_scaler_as_in_train_py_warns_of_plain_steps():
    """It runs one backward and scaler.step(optimizer); the gradient of the plain step is unscaled."""
    model, _, optimizer = small("sgd", rho=0.1)
    twin, base, _ = small("sgd", rho=0.1)
    scaler = NativeScaler(device="cpu")
    x, y = torch.ones(2, 4), torch.tensor([0, 1])

    def as_in_train_py():
        for _ in range(3):
            optimizer.zero_grad()
            scaler(F.cross_entropy(model(x), y), optimizer, clip_grad=1.0, parameters=model.parameters())

    with pytest.warns(UserWarning, match="without sharpness-aware minimization") as warned:
        as_in_train_py()
    assert len(warned) == 1
    for _ in range(3):
        base.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        base.step()
    assert_close(model, twin, rtol=1e-6)


def test_native_scaler_without_update_in_each_pass_equals_sam_by_hand():
    """After the passes, its inner scaler steps and updates."""
    model, _, optimizer = small("sgd", rho=0.1)
    twin, base, _ = small("sgd", rho=0.1)
    scaler = NativeScaler(device="cpu")
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                scaler(F.cross_entropy(model(x), y), optimizer, need_update=False)
        scaler._scaler.step(optimizer)
        scaler._scaler.update()

    def backward():
        loss = F.cross_entropy(twin(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        sam_by_hand(twin, base, 0.1, backward)
    assert_close(model, twin, rtol=1e-5)
