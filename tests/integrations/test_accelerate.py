"""Plain loops with Accelerate: passes, accumulation, precision, resuming, and errors."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import steppe
from support import batch, bits, model_bits, net

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from accelerate_state import fresh_accelerate_state, reset_accelerate_state  # noqa: F401

from steppe.integrations.accelerate import check_supported, passes, unwrap_optimizer, windows

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def data(n: int = 20, size: int = 4):
    x, y = batch(0, n=n)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=size)


def prepared(accelerator, *, method=steppe.SAM, rho=0.5, size=4, seed=0):
    """Return model, optimizer, loader and scheduler, prepared."""
    model = net(seed)
    optimizer = method(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho, model=model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return accelerator.prepare(model, optimizer, data(size=size), scheduler)


class HalfPrecision(Accelerator):
    """Autocast and a loss scaler, as with mixed_precision="fp16" on a GPU; Accelerate makes neither on a CPU."""

    def __init__(self, **options):
        super().__init__(cpu=True, mixed_precision="fp16", **options)
        self.native_amp, self.scaler = True, overflowing_scaler()


def overflowing_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3, backoff_factor=0.125)


def run(accelerator, model, optimizer, loader, scheduler, *, epochs=2, clip=1.0, start=0):
    """Train by the loop of the documentation."""
    model.train()
    step = start
    for _ in range(epochs):
        for batches in windows(accelerator, loader):
            torch.manual_seed(step)
            for sam_pass in passes(accelerator, optimizer, len(batches)):
                with sam_pass:
                    for x, y in batches:
                        with accelerator.accumulate(model):
                            accelerator.backward(F.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            step += 1


def by_hand(*, k=1, method=steppe.SAM, rho=0.5, epochs=2, clip=1.0, amp=None, scaler=None):
    """Train by the same loop without Accelerate."""
    model = net()
    optimizer = method(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=rho, model=model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    micro = list(data())
    optimizer.scaler = scaler
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    skipped = 0
    for step, window in enumerate([micro[i : i + k] for i in range(0, len(micro), k)] * epochs):
        torch.manual_seed(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                for x, y in window:
                    with torch.autocast("cpu", amp) if amp else contextlib.nullcontext():
                        out = model(x).float()
                    scaler.scale(F.cross_entropy(out, y) / k).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
        else:
            scheduler.step()
    return model, optimizer, skipped


def test_loop_without_accumulation_equals_plain_loop():
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepared(accelerator)
    sam = unwrap_optimizer(optimizer)
    model.train()
    for step, (x, y) in enumerate(loader):
        torch.manual_seed(step)
        for sam_pass in sam.passes():
            with sam_pass:
                accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    twin, other, _ = by_hand(epochs=1)
    assert model_bits(model) == model_bits(twin)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


def test_step_with_closure_of_the_prepared_optimizer_equals_plain_loop():
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, scheduler = prepared(accelerator)
    for step, (x, y) in enumerate(loader):
        torch.manual_seed(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))

        optimizer.step(closure)
        scheduler.step()
    assert model_bits(model) == model_bits(by_hand(epochs=1, clip=float("inf"))[0])


METHODS = {"sam": steppe.SAM, "one pass": steppe.variants.msam, "cadence": steppe.variants.looksam}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_passes_over_all_micro_batches_equal_plain_loop(k, method):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    model, optimizer, loader, scheduler = prepared(accelerator, method=METHODS[method])
    run(accelerator, model, optimizer, loader, scheduler)
    twin, other, _ = by_hand(k=k, method=METHODS[method])
    assert model_bits(model) == model_bits(twin), "5 micro-batches: the last window is not full"
    assert model_bits(model) != model_bits(by_hand(k=k, rho=0.0)[0])
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("k", [1, 2])
def test_bf16_equals_plain_loop(k):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=k)
    model, *rest = prepared(accelerator)
    run(accelerator, model, *rest)
    assert model_bits(model) == model_bits(by_hand(k=k, amp=torch.bfloat16)[0])


@pytest.mark.parametrize(("k", "method"), [(1, steppe.SAM), (2, steppe.SAM), (2, steppe.variants.vasso)])
def test_fp16_skips_overflows_and_clips_unscaled_gradients(k, method):
    accelerator = HalfPrecision(gradient_accumulation_steps=k)
    model, optimizer, loader, scheduler = prepared(accelerator, method=method)
    skipped = []
    model.register_forward_pre_hook(lambda *_: skipped.append(accelerator.optimizer_step_was_skipped))
    run(accelerator, model, optimizer, loader, scheduler)
    scaler = overflowing_scaler()
    twin, other, expected = by_hand(k=k, method=method, amp=torch.float16, scaler=scaler)
    assert 0 < expected < 4
    assert any(skipped)
    assert not skipped[-1]
    assert accelerator.scaler.get_scale() == scaler.get_scale()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"], (
        "the scheduler does not step where the optimizer did not"
    )
    assert model_bits(model) == model_bits(twin)


def test_perturbation_for_each_micro_batch_equals_plain_loop():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = prepared(accelerator)
    step = 0
    for _ in range(2):
        for x, y in loader:
            torch.manual_seed(step)
            step += 1
            with accelerator.accumulate(model):
                for sam_pass in passes(accelerator, optimizer, accumulate=True):
                    with sam_pass:
                        accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    twin = net()
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    sam = steppe.SAM(base, rho=0.5, model=twin)
    micro = list(data()) * 2
    for step, (x, y) in enumerate(micro):
        torch.manual_seed(step)
        for sam_pass in sam.passes(accumulate=True):
            with sam_pass:
                (F.cross_entropy(twin(x), y) / 2).backward()
        if step in (1, 3, 4, 6, 8, 9):
            base.param_groups[0]["lr"] = 0.1 * 0.9 ** (1, 3, 4, 6, 8, 9).index(step)
            sam.step()
            sam.zero_grad()
    assert model_bits(model) == model_bits(twin)


def test_load_state_resumes_with_the_same_bits(tmp_path):
    def start(seed):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        memory = steppe.VarianceSuppressed()
        return accelerator, prepared(
            accelerator,
            seed=seed,
            method=lambda base, rho, model: steppe.SAM(
                base,
                rho,
                perturbation=memory,
                combination=steppe.GradientReuse(),
                cadence=steppe.Periodic(2),
                model=model,
            ),
        )

    accelerator, parts = start(0)
    run(accelerator, *parts, epochs=1)
    accelerator.save_state(str(tmp_path))
    run(accelerator, *parts, epochs=1, start=3)
    whole, end = model_bits(parts[0]), parts[1].state_dict()
    reset_accelerate_state()
    accelerator, again = start(1)
    accelerator.load_state(str(tmp_path))
    run(accelerator, *again, epochs=1, start=3)
    assert model_bits(again[0]) == whole
    state = again[1].state_dict()
    assert state["param_groups"] == end["param_groups"]
    assert state["param_groups"][0]["sam_step"] == 6
    for index, values in end["state"].items():
        assert bits(torch.as_tensor(v) for v in values.values()) == bits(
            torch.as_tensor(state["state"][index][k]) for k in values
        )


def test_exception_between_two_micro_batches_restores_weights_and_accumulation():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = prepared(accelerator)
    before = model_bits(model)
    first = next(windows(accelerator, loader))
    with pytest.raises(ZeroDivisionError):
        for sam_pass in passes(accelerator, optimizer, 2):
            with sam_pass:
                for x, y in first:
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(x), y))
                        if sam_pass.is_perturbed:
                            1 / 0  # noqa: B018
    assert {k: v for k, v in model_bits(model).items() if "running" not in k and "num_" not in k} == {
        k: v for k, v in before.items() if "running" not in k and "num_" not in k
    }
    model.load_state_dict(net().state_dict())
    run(accelerator, model, optimizer, loader, scheduler)
    assert model_bits(model) == model_bits(by_hand(k=2)[0])


# Errors.


def test_passes_inside_accumulate_raise():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, _ = prepared(accelerator)
    x, y = next(iter(loader))
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match="all but the last would be lost"):
        for sam_pass in passes(accelerator, optimizer):
            with sam_pass:
                accelerator.backward(F.cross_entropy(model(x), y))


def test_passes_of_the_optimizer_inside_accumulate_raise():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, _ = prepared(accelerator)
    sam = unwrap_optimizer(optimizer)
    x, y = next(iter(loader))
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match=r"accelerator\.accumulate\(\)"):
        for sam_pass in sam.passes():
            with sam_pass:
                accelerator.backward(F.cross_entropy(model(x), y))


def test_plain_loop_after_one_that_ended_in_the_middle_of_an_accumulation_runs():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _, loader, _ = prepared(accelerator)
    with accelerator.accumulate(model):
        x, y = next(iter(loader))
        accelerator.backward(F.cross_entropy(model(x), y))
    assert not accelerator.sync_gradients
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    steppe.SAM(torch.optim.SGD([w], lr=1.0), rho=0.5).step(lambda: w.square().sum() / 2)
    torch.testing.assert_close(w.detach(), torch.tensor([-0.3, -0.4]))
    model, optimizer, loader, _ = prepared(accelerator)
    accelerator.sync_gradients = False
    assert next(passes(accelerator, optimizer, 2)).is_first


def test_wrong_number_of_micro_batches_raises():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, _ = prepared(accelerator)
    batches = next(windows(accelerator, loader))
    with pytest.raises(RuntimeError, match=r"for 1 micro-batches.* ran 2"):
        for sam_pass in passes(accelerator, optimizer):
            with sam_pass:
                for x, y in batches:
                    with accelerator.accumulate(model):
                        accelerator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="micro_batches is 3, and a step has 1 to gradient_accumulation_steps=2"):
        next(passes(accelerator, optimizer, 3))


def test_step_with_closure_under_a_loss_scaler_raises():
    accelerator = HalfPrecision()
    model, optimizer, loader, _ = prepared(accelerator)
    x, y = next(iter(loader))
    accelerator.backward(F.cross_entropy(model(x), y) * 1e-4)  # small enough for the scaler to call step()
    with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer, closure\)"):
        optimizer.step(lambda: None)


def test_step_without_passes_warns():
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, _ = prepared(accelerator)
    x, y = next(iter(loader))
    accelerator.backward(F.cross_entropy(model(x), y))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert ["without sharpness-aware minimization" in str(w.message) for w in caught] == [True]


def test_optimizer_other_than_sam_raises():
    accelerator = Accelerator(cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="got SGD: it makes no second pass. Wrap it before accelerator.prepare"):
        next(passes(accelerator, optimizer))


ENGINES = {
    "DEEPSPEED": "SAM would be silently off",
    "FSDP": "a norm of its own",
    "MEGATRON_LM": "SAM would be silently off",
    "XLA": "perturb along its own",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_unsupported_engines_raise(engine):
    fake = SimpleNamespace(distributed_type=DistributedType[engine], parallelism_config=None)
    with pytest.raises(RuntimeError, match=f"steppe.SAM under {engine}: .*{ENGINES[engine]}.*DistributedDataParallel"):
        check_supported(fake)


@pytest.mark.parametrize("plan", ["tensor", "context", "sequence"])
def test_parallelism_inside_one_model_raises(plan):
    config = SimpleNamespace(**{f"{plan[0]}p_enabled": True})
    fake = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU, parallelism_config=config)
    with pytest.raises(RuntimeError, match=f"steppe.SAM under {plan} parallelism"):
        check_supported(fake)


def test_unsynchronized_perturbations_for_each_micro_batch_raise(monkeypatch):
    plugin = GradientAccumulationPlugin(num_steps=2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    _, optimizer, *_ = prepared(accelerator)
    monkeypatch.setattr(Accelerator, "use_distributed", True)
    with pytest.raises(RuntimeError, match=r"replicas drift apart.*sync_each_batch=True"):
        next(passes(accelerator, optimizer, accumulate=True))
