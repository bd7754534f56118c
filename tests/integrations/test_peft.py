"""Adapters of PEFT under SAM: two passes by hand in float64, frozen weights, dropout, merging, saving, resuming."""

import copy

import pytest
import torch
from torch import Tensor

import steppe
from support import bits, by_closure, by_passes, each_in_turn, model_bits

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from accelerate import Accelerator
from accelerate_state import fresh_accelerate_state  # noqa: F401
from tiny_peft import IGNORED_WARNINGS, KINDS, adapted, closeness, quantized, sentences, trained
from tiny_transformer import adamw, by_hand, micro_batches, tokens, trainer

from steppe.integrations.accelerate import passes, windows
from steppe.integrations.peft import merged_sam
from steppe.integrations.transformers import SAMTrainer, SAMTrainerMixin

pytestmark = IGNORED_WARNINGS
RHO = 0.1


def two_passes_by_hand(model, base, batches, *, rho=RHO):
    """SAM in the paper's notation on the trained parameters, without code of the package."""
    w = trained(model)
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        g = torch.autograd.grad(model(**batch).loss, w)
        length = torch.cat([part.flatten() for part in g]).norm()
        at_w = [p.detach().clone() for p in w]
        with torch.no_grad():
            for p, part in zip(w, g, strict=True):
                p += rho * part / length
        torch.manual_seed(step)
        g_s = torch.autograd.grad(model(**batch).loss, w)
        with torch.no_grad():
            for p, before, part in zip(w, at_w, g_s, strict=True):
                p.copy_(before)
                p.grad = part
        base.step()


def base_of(model):
    return torch.optim.AdamW(trained(model), lr=0.01)


def train(model, optimizer, batches, take_step):
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        take_step(optimizer, lambda batch=batch: model(**batch).loss)


@pytest.mark.parametrize("take_step", [by_passes, by_closure])
@pytest.mark.parametrize("kind", KINDS)
def test_sam_on_adapters_equals_two_passes_by_hand(kind, take_step):
    start, model = adapted(kind), adapted(kind)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    batches = sentences(6)
    train(model, steppe.SAM(base_of(model), rho=RHO, model=model), batches, take_step)
    two_passes_by_hand(twin, base_of(twin), batches)
    two_passes_by_hand(plain, base_of(plain), batches, rho=0.0)
    assert closeness(model, twin, start) < 1e-9
    assert closeness(model, plain, start) > 1e-3, "SAM must make a difference in this test"


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_never_move(kind):
    model = adapted(kind)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = bits(frozen.values())
    optimizer = steppe.SAM(base_of(model), rho=RHO, model=model)
    for step, batch in enumerate(sentences(3)):
        torch.manual_seed(step)
        for sam_pass in optimizer.passes():
            with sam_pass:
                model(**batch).loss.backward()
                assert bits(frozen.values()) == before
        optimizer.step()
        assert all(p.grad is None for p in frozen.values())
    assert len(frozen) > 10
    assert bits(frozen.values()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_the_adapter_draws_the_same_in_both_passes(kind):
    model = adapted(kind)
    masks: list[Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
            module.register_forward_hook(lambda m, x, y: masks.append(y == 0))
    optimizer, drawn = steppe.SAM(base_of(model), rho=RHO, model=model), []
    for batch in sentences(2):
        for sam_pass in optimizer.passes():
            masks.clear()
            with sam_pass:
                model(**batch).loss.backward()
            drawn.append(bits(masks))
        optimizer.step()
    first, second, later, _ = drawn
    assert first == second != later
    assert len(first) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_reloaded_models_are_at_w(tmp_path, kind):
    model, (batch,) = adapted(kind), sentences(1)
    before = [p.detach().clone() for p in trained(model)]
    optimizer = steppe.SAM(base_of(model), rho=10.0, model=model)
    for sam_pass in optimizer.passes():
        with sam_pass:
            model(**batch).loss.backward()
            moved = bits(trained(model)) != bits(before)
    assert moved, "the last pass is at w + e"
    model.save_pretrained(tmp_path)
    assert bits(trained(model)) == bits(before)

    model.eval()
    at_w = model(**batch).logits
    reloaded = peft.PeftModel.from_pretrained(adapted(kind).unload(), tmp_path, is_trainable=True).double().eval()
    assert closeness(reloaded, model) == 0
    merged = copy.deepcopy(model).merge_and_unload().eval()
    torch.testing.assert_close(reloaded(**batch).logits, at_w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged(**batch).logits, at_w, rtol=1e-10, atol=1e-10)


class Mixed(SAMTrainerMixin, transformers.Trainer):
    """A Trainer of the user's own."""


@pytest.mark.parametrize(
    ("kind", "of"),
    each_in_turn(KINDS, [SAMTrainer, Mixed]),
)
def test_trainer_on_adapters_equals_plain_loop(tmp_path, kind, of):
    model, twin, plain = (adapted(kind, dtype=torch.float32) for _ in range(3))
    trainer(tmp_path, model, of=of, rho=RHO, gradient_accumulation_steps=2).train()
    by_hand(twin, steppe.SAM(adamw(twin), rho=RHO, model=twin), k=2)
    by_hand(plain, steppe.SAM(adamw(plain), rho=0.0, model=plain), k=2)
    assert model_bits(model) == model_bits(twin)
    assert model_bits(model) != model_bits(plain), "SAM must make a difference in this test"


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_on_adapters_resumes_with_the_same_bits(tmp_path, kind):
    settings = {"rho": RHO, "save_strategy": "steps", "save_steps": 4}
    model, resumed = adapted(kind, dtype=torch.float32), adapted(kind, dtype=torch.float32)
    trainer(tmp_path, model, **settings).train()
    saved = peft.PeftModel.from_pretrained(adapted(kind).unload(), tmp_path / "checkpoint-8", is_trainable=True)
    assert len(trained(saved)) == len(trained(model))
    trainer(tmp_path, resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert model_bits(resumed) == model_bits(model)
    assert model_bits(model) != model_bits(adapted(kind, dtype=torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_on_adapters_equals_plain_loop(kind):
    model, twin = adapted(kind, dtype=torch.float32), adapted(kind, dtype=torch.float32)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = micro_batches(tokens(8))
    prepared, optimizer = accelerator.prepare(model, steppe.SAM(base_of(model), rho=RHO, model=model))
    sam, step = steppe.SAM(base_of(twin), rho=RHO, model=twin), 0
    prepared.train()
    for window in windows(accelerator, accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=None))):
        torch.manual_seed(step)
        for sam_pass in passes(accelerator, optimizer, len(window)):
            with sam_pass:
                for batch in window:
                    with accelerator.accumulate(prepared):
                        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        torch.manual_seed(step)
        for sam_pass in sam.passes():
            with sam_pass:
                for batch in window:
                    (twin(**batch).loss / 2).backward()
        sam.step()
        step += 1
    assert step == 2
    assert model_bits(model) == model_bits(twin)


def test_sam_on_adapters_of_a_quantized_base_equals_two_passes_by_hand(tmp_path):
    start, model, twin, plain = (quantized(tmp_path) for _ in range(4))
    batches = sentences(4)
    train(model, steppe.SAM(base_of(model), rho=RHO, model=model), batches, by_passes)
    two_passes_by_hand(twin, base_of(twin), batches)
    two_passes_by_hand(plain, base_of(plain), batches, rho=0.0)
    assert closeness(model, twin, start) < 1e-3
    assert closeness(model, plain, start) > 1e-2, "SAM must make a difference in this test"
    with pytest.raises(ValueError, match="q_proj is a Linear4bit.*steppe.SAM"):
        merged_sam(base_of(model), RHO, model=model)
