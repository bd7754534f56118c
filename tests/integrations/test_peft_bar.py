"""BAR on the factors of LoRA: float64 references of both forms, other adapters and bases, resuming, what raises."""

import copy
import functools
import math

import pytest
import torch

import steppe
from support import by_closure, by_passes, model_bits

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from accelerate import Accelerator
from accelerate_state import fresh_accelerate_state  # noqa: F401
from tiny_peft import IGNORED_WARNINGS, adapted, closeness, factors_of, quantized, sentences, trained
from tiny_transformer import adamw, by_hand, trainer

from steppe.integrations.accelerate import passes
from steppe.integrations.peft import bar

pytestmark = IGNORED_WARNINGS
ALPHA, LR, TOTAL = 5.0, 0.01, 8


def base_of(model, lr=LR):
    """AdamW with decoupled weight decay, and twice the learning rate for B (LoRA+)."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_B = [p for name, p in own.items() if "_B." in name]
    others = [p for name, p in own.items() if "_B." not in name]
    return torch.optim.AdamW([{"params": others}, {"params": of_B, "lr": 2 * lr}], lr=lr, weight_decay=0.1)


def bar_by_hand(model, base, batches, *, alpha, compare, total_steps=None):
    """Algorithms 2 (nBAR) and 3 (oBAR) of arXiv 2410.14802, with x = A and y = B."""
    signs = []
    for t, batch in enumerate(batches):
        torch.manual_seed(t)
        base.zero_grad()
        model(**batch).loss.backward()
        alpha_t = alpha * (1 + math.cos(math.pi * min(t / total_steps, 1))) / 2 if total_steps else alpha
        with torch.no_grad():
            for x, y in factors_of(model):
                if compare == "gradients":
                    x_grows = bool(x.grad.square().sum() >= y.grad.square().sum())
                else:
                    x_grows = not x.square().sum() >= y.square().sum()
                signs.append(x_grows)
                s = 1 if x_grows else -1
                x *= 1 + s * alpha_t * base.param_groups[0]["lr"]
                y *= 1 - s * alpha_t * base.param_groups[1]["lr"]
        base.step()
    return signs


def train(model, optimizer, batches, take_step=by_passes):
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        take_step(optimizer, lambda batch=batch: model(**batch).loss)


MODELS = {
    "LoRA": {},
    "embeddings": {"target_modules": ["wpe", "c_attn"]},
    "other trained parameters": {"modules_to_save": ["ln_f"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("take_step", [by_passes, by_closure])
@pytest.mark.parametrize("total_steps", [None, TOTAL])
@pytest.mark.parametrize("compare", ["gradients", "weights"])
def test_bar_equals_its_reference(compare, total_steps, take_step):
    model = adapted()
    start, twin, plain = (copy.deepcopy(model) for _ in range(3))
    batches, rule = sentences(10), {"compare": compare, "total_steps": total_steps}
    train(model, bar(base_of(model), alpha=ALPHA, **rule, model=model), batches, take_step)
    signs = bar_by_hand(twin, base_of(twin), batches, alpha=ALPHA, **rule)
    bar_by_hand(plain, base_of(plain), batches, alpha=0.0, **rule)
    assert closeness(model, twin, start) < 1e-9
    assert closeness(model, plain, start) > 1e-2, "the regularizer must make a difference in this test"
    assert compare == "weights" or len(set(signs)) == 2, "both branches of the algorithm must be in this test"


@pytest.mark.parametrize("kind", MODELS)
def test_bar_on_other_adapters_equals_its_reference(kind):
    model = adapted(**MODELS[kind])
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    train(model, bar(base_of(model), alpha=ALPHA, model=model), sentences(4))
    bar_by_hand(twin, base_of(twin), sentences(4), alpha=ALPHA, compare="gradients")
    assert closeness(model, twin, start) < 1e-9


def test_bar_on_a_quantized_base_equals_its_reference(tmp_path):
    start, model, twin, plain = (quantized(tmp_path) for _ in range(4))
    train(model, bar(base_of(model), alpha=ALPHA, model=model), sentences(4))
    bar_by_hand(twin, base_of(twin), sentences(4), alpha=ALPHA, compare="gradients")
    bar_by_hand(plain, base_of(plain), sentences(4), alpha=0.0, compare="gradients")
    assert closeness(model, twin, start) < 1e-3
    assert closeness(model, plain, start) > 1e-2, "the regularizer must make a difference in this test"


@torch.no_grad()
def balances(model) -> list[float]:
    return [float(A.square().sum() - B.square().sum()) for A, B in factors_of(model)]


def test_without_loss_the_lengths_of_both_factors_come_together():
    model = adapted()
    before = balances(model)
    optimizer = bar(torch.optim.SGD(trained(model), lr=0.01), alpha=1.0, compare="weights", model=model)
    for _ in range(20):
        by_passes(optimizer, lambda: sum(p.sum() * 0 for p in trained(model)))
    assert all(abs(now) < 0.9 * abs(old) for now, old in zip(balances(model), before, strict=True))


def test_sign_is_that_of_the_change_of_the_balance_by_sam():
    """Theorem 2 of the paper: without momentum and weight decay, a step of SAM moves the balance in this direction."""
    rho, lr = 1e-3, 1e-6
    for seed in range(3):
        model = adapted(seed=seed, dropout=0.0)
        moved = {}
        for name in ("sgd", "sam", "bar"):
            twin, (batch,) = copy.deepcopy(model), sentences(1)
            base = torch.optim.SGD(trained(twin), lr=lr)
            optimizers = {
                "sgd": lambda base=base, twin=twin: steppe.SAM(base, rho=0.0, model=twin),
                "sam": lambda base=base, twin=twin: steppe.SAM(base, rho=rho, model=twin),
                "bar": lambda base=base, twin=twin: bar(base, alpha=1.0, model=twin),
            }
            optimizer = optimizers[name]()
            by_passes(optimizer, lambda twin=twin, batch=batch: twin(**batch).loss)
            moved[name] = balances(twin)
        gained = [(s - p, b - p) for s, b, p in zip(moved["sam"], moved["bar"], moved["sgd"], strict=True)]
        assert all(sam * own > 0 for sam, own in gained)


def test_trainer_takes_the_steps_of_a_plain_loop_and_resumes_with_the_same_bits(tmp_path):
    method = functools.partial(bar, alpha=ALPHA, total_steps=10)
    model, twin, resumed, plain = (adapted(dtype=torch.float32) for _ in range(4))
    settings = {"method": method, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, model, **settings, log_sharpness=True).train()
    by_hand(twin, method(adamw(twin), model=twin), k=2)
    by_hand(plain, method(adamw(plain), alpha=0.0, model=plain), k=2)
    trainer(tmp_path, resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert model_bits(model) == model_bits(twin) == model_bits(resumed)
    assert model_bits(model) != model_bits(plain)


def test_accelerate_takes_the_steps_of_a_plain_loop():
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, bar(base_of(model), alpha=ALPHA, model=model))
    for step, batch in enumerate(sentences(3)):
        torch.manual_seed(step)
        for sam_pass in passes(accelerator, optimizer):
            with sam_pass:
                accelerator.backward(prepared(**batch).loss)
        optimizer.step()
    train(twin, bar(base_of(twin), alpha=ALPHA, model=twin), sentences(3))
    assert model_bits(model) == model_bits(twin)


def test_copy_goes_on_with_the_same_bits():
    model, batches = adapted(), sentences(4)
    optimizer = bar(base_of(model), alpha=ALPHA, compare="weights", total_steps=TOTAL, model=model)
    train(model, optimizer, batches[:2])
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model, optimizer, batches[2:])
    train(model2, optimizer2, batches[2:])
    assert model_bits(model) == model_bits(model2)


def test_skipped_step_and_exception_of_the_base_leave_the_factors():
    model, (batch,) = adapted(), sentences(1)
    optimizer = bar(base_of(model), alpha=ALPHA, model=model)
    before = model_bits(model)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        by_passes(optimizer, lambda: model(**batch).loss * float("nan"))
    assert model_bits(model) == before
    optimizer.base.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        by_passes(optimizer, lambda: model(**batch).loss)
    assert model_bits(model) == before


def test_report_has_no_hint_that_nothing_is_perturbed():
    model, batches = adapted(), sentences(2)
    optimizer = bar(base_of(model), model=model)
    train(model, optimizer, batches)
    report = optimizer.report()
    assert (report.steps, report.perturbed_steps, report.hints) == (2, 0, ())


def test_frozen_factors_and_layers_without_a_gradient_are_left_alone():
    model, (batch,) = adapted(), sentences(1)
    (A, B), (_, other) = factors_of(model)
    A.requires_grad_(False)
    before = A.detach().clone()
    base = torch.optim.SGD([p for p in trained(model) if p is not B], lr=0.0)
    optimizer = bar(base, alpha=ALPHA, model=model)
    kept = other.detach().clone()
    by_passes(optimizer, lambda: model(**batch).loss)
    assert torch.equal(A, before)
    assert torch.equal(other, kept), "the learning rate is 0, and so is its product with alpha"


def test_factors_in_bfloat16_that_a_step_cannot_change_warn():
    model, (batch,) = adapted(dtype=torch.bfloat16), sentences(1)
    optimizer = bar(base_of(model, lr=1e-4), alpha=0.5, model=model)
    with pytest.warns(UserWarning, match="below the last bit of torch.bfloat16.*keep the adapters in float32"):
        by_passes(optimizer, lambda: model(**batch).loss)


def test_factors_in_bfloat16_grow_and_shrink():
    """With alpha lr = 0.003, 1 + alpha lr is 1 in bfloat16, while many products are not the factor itself."""
    model, (batch,) = adapted(dtype=torch.bfloat16), sentences(1)
    factors = [p for pair in factors_of(model) for p in pair]
    before = [p.detach().clone() for p in factors]
    by_passes(bar(base_of(model, lr=0.0), alpha=1.0, model=model), lambda: model(**batch).loss)
    assert all(torch.equal(p, old) for p, old in zip(factors, before, strict=True))
    optimizer = bar(base_of(model, lr=0.006), alpha=0.5, model=model)
    for p in factors:
        p.register_hook(torch.zeros_like)  # the base alone would leave the factors as they are
    by_passes(optimizer, lambda: model(**batch).loss)
    changed = [(p.detach().abs() - old.abs()).float() for p, old in zip(factors, before, strict=True)]
    assert any((c > 0).any() for c in changed)
    assert any((c < 0).any() for c in changed)


def shared(model):
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    return model


def test_options_that_do_not_fit_raise():
    model, (batch,) = adapted(), sentences(1)
    with pytest.raises(ValueError, match="model= is missing.*the model of PEFT"):
        bar(base_of(model))
    with pytest.raises(ValueError, match="no layer with a trained LoRA adapter.*get_peft_model"):
        bar(torch.optim.SGD((other := torch.nn.Linear(1, 1)).parameters(), lr=0.1), model=other)
    with pytest.raises(ValueError, match="alpha must be finite and not negative, got -1"):
        bar(base_of(model), alpha=-1, model=model)
    with pytest.raises(ValueError, match=r"compare must be 'gradients' .nBAR. or 'weights'.*got 'both'"):
        bar(base_of(model), compare="both", model=model)
    with pytest.raises(ValueError, match="total_steps must be 1 or more"):
        bar(base_of(model), total_steps=0, model=model)
    with pytest.raises(TypeError, match="no radius: leave rho= out, and give alpha="):
        bar(base_of(model), rho=0.05, model=model)
    with pytest.raises(TypeError, match="has a perturbation"):
        bar(base_of(model), perturbation=steppe.L2(), model=model)
    with pytest.raises(ValueError, match="share a factor"):
        bar(base_of(other := shared(adapted())), model=other)
    optimizer = bar(torch.optim.SGD(trained(model), lr=1.0), alpha=1.0, model=model)
    before = model_bits(model)
    with pytest.raises(ValueError, match="alpha lr = 1, so that 1 - alpha lr is not positive"):
        by_passes(optimizer, lambda: model(**batch).loss)
    assert model_bits(model) == before
    with pytest.raises(RuntimeError, match=r"first_step\(\) with BAR: there is one pass"):
        bar(base_of(model), model=model).first_step()


def test_paper_to_cite():
    model = adapted()
    assert "2410.14802" in steppe.citation(bar(base_of(model), model=model))
