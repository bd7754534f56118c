"""steppe.integrations.peft: SAM and noise on merged weights, against float64 references; W0 stays as it is."""

import copy
import functools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import steppe
from live_memory import LiveMemory
from support import bits, by_closure, by_passes, model_bits

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from accelerate import Accelerator
from accelerate_state import fresh_accelerate_state  # noqa: F401
from tiny_peft import (
    IGNORED_WARNINGS,
    adapted,
    adapted_weights,
    closeness,
    is_factor,
    noise_by_hand,
    sentences,
    trained,
)
from tiny_transformer import TOKENS, adamw, by_hand, trainer
from torch.multiprocessing.reductions import StorageWeakRef

from steppe.integrations.accelerate import passes
from steppe.integrations.peft import flat_lora, merged_sam
from steppe.methods._adapters import adapted_layers
from steppe.methods._merged_weights import perturbed_weight

pytestmark = IGNORED_WARNINGS
RHO = 0.5

MODELS = {
    "Conv1D": {},
    "Linear": {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True, "layers_to_transform": [1]},
    "Embedding": {"target_modules": ["wpe", "c_attn"]},
    "other trained parameters": {"modules_to_save": ["ln_f"]},
    "rank-stabilized": {"use_rslora": True, "r": 4},
}


def base_of(model):
    return torch.optim.AdamW(trained(model), lr=0.01)


def loss_at(model, batch, weights: dict[str, Tensor]) -> Tensor:
    return functional_call(model, weights, kwargs=batch).loss


def merged_sam_by_hand(model, base, batches, rho):
    """e = rho G / |G| over the merged weights and the trained parameters beside the adapters, one flat vector."""
    for step, batch in enumerate(batches):
        W0 = adapted_weights(model)
        others = {n: p for n, p in model.named_parameters() if p.requires_grad and not is_factor(n)}
        torch.manual_seed(step)
        at = {n: p.detach().clone().requires_grad_() for n, p in {**W0, **others}.items()}
        G = torch.autograd.grad(loss_at(model, batch, at), list(at.values()))
        length = torch.cat([part.flatten() for part in G]).norm()
        perturbed = {n: (p + rho * part / length).detach() for (n, p), part in zip(at.items(), G, strict=True)}
        for name in others:
            perturbed[name].requires_grad_()
        w = {n: p for n, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(step)
        leaves = [perturbed.get(n, p) for n, p in w.items()]
        for p, g in zip(w.values(), torch.autograd.grad(loss_at(model, batch, perturbed), leaves), strict=True):
            p.grad = g
        base.step()


def train(model, optimizer, batches, take_step=by_passes):
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        take_step(optimizer, lambda batch=batch: model(**batch).loss)


@pytest.mark.parametrize("take_step", [by_passes, by_closure])
@pytest.mark.parametrize("kind", MODELS)
def test_merged_sam_equals_its_reference(kind, take_step):
    model = adapted(**MODELS[kind])
    start, twin, plain = (copy.deepcopy(model) for _ in range(3))
    batches = sentences(5)
    train(model, merged_sam(base_of(model), RHO, model=model), batches, take_step)
    merged_sam_by_hand(twin, base_of(twin), batches, RHO)
    merged_sam_by_hand(plain, base_of(plain), batches, 0.0)
    assert closeness(model, twin, start) < 1e-9
    assert closeness(model, plain, start) > 1e-3, "the perturbation must make a difference in this test"


def test_gradient_is_that_of_the_weight_after_merging():
    model, (batch,) = adapted(dropout=0.0), sentences(1)
    merged = copy.deepcopy(model).merge_and_unload()
    weights = [m.c_attn.weight.requires_grad_() for m in merged.modules() if hasattr(m, "c_attn")]
    expected = torch.autograd.grad(merged(**batch).loss, weights)
    optimizer = merged_sam(base_of(model), RHO, model=model)
    seen: list[Tensor] = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            seen = list(optimizer.perturbation.merged.gradients)
            model(**batch).loss.backward()
    assert len(seen) == 2
    for found, g in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, g, rtol=1e-10, atol=1e-12)


def test_fresh_adapter_is_perturbed_in_all_directions_of_the_merged_weight():
    model = peft.get_peft_model(adapted().unload(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    optimizer, (batch,) = merged_sam(base_of(model), RHO, model=model), sentences(1)
    by_passes(optimizer, lambda: model(**batch).loss)
    report = optimizer.report()
    assert report.perturbation_norm == pytest.approx(RHO)
    assert report.length_in_rho == pytest.approx(1.0)
    assert not [hint for hint in report.hints if "never" in hint]


@pytest.mark.parametrize("total_steps", [None, 4])
def test_flat_lora_equals_its_reference(total_steps):
    model = adapted()
    start, twin, plain = (copy.deepcopy(model) for _ in range(3))
    batches = sentences(6)
    train(model, flat_lora(base_of(model), RHO, total_steps=total_steps, seed=3, model=model), batches)
    for each, rho in ((twin, RHO), (plain, 0.0)):
        base = base_of(each)
        for step, batch in enumerate(batches):
            torch.manual_seed(step)
            base.zero_grad()
            loss_at(each, batch, noise_by_hand(each, step, rho, total_steps, 3)).backward()
            base.step()
    assert closeness(model, twin, start) < 1e-9
    assert closeness(model, plain, start) > 1e-3, "the noise must make a difference in this test"


def test_noise_has_the_length_of_rho_in_each_filter():
    model, (batch,) = adapted(), sentences(1)
    optimizer = flat_lora(base_of(model), RHO, model=model)
    for sam_pass in optimizer.passes():
        with sam_pass:
            model(**batch).loss.backward()
            merged = optimizer.perturbation.merged
            e = [merged.perturbations[i]() for i in range(len(merged.layers))]
            ratios = [p.norm(dim=0) / m.merged_weight().norm(dim=0) for p, m in zip(e, merged.layers, strict=True)]
    assert float(torch.cat(ratios).mean()) == pytest.approx(RHO, rel=0.05)


METHODS = {"merged_sam": merged_sam, "flat_lora": functools.partial(flat_lora, total_steps=10)}


@pytest.mark.parametrize("method", METHODS)
def test_base_weights_are_never_written_and_nothing_stays_after_a_pass(method):
    model = adapted()
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = bits(frozen.values())
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    optimizer, batches = METHODS[method](base_of(model), RHO, model=model), sentences(3)
    for batch in batches:
        by_passes(optimizer, lambda batch=batch: model(**batch).loss)
    with pytest.raises(ZeroDivisionError):
        for sam_pass in optimizer.passes():
            with sam_pass:
                loss = model(**batches[0]).loss
                if sam_pass.is_perturbed:
                    assert bits(frozen.values()) == before
                    _ = 1 / 0
                loss.backward()
    assert bits(frozen.values()) == before
    assert not any(p.requires_grad or p.grad is not None for p in frozen.values())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("kind", ["Conv1D", "Linear"])
@pytest.mark.parametrize("method", METHODS)
def test_perturbed_weights_are_not_kept_for_the_backward(method, kind, monkeypatch):
    model, (batch,) = llama() if kind == "Linear" else adapted(), sentences(1)
    optimizer = METHODS[method](base_of(model), RHO, model=model)
    made: list[StorageWeakRef] = []

    def make_and_record(*arguments):
        perturbed = perturbed_weight(*arguments)
        made.append(StorageWeakRef(perturbed.untyped_storage()))
        return perturbed

    monkeypatch.setattr("steppe.methods._merged_weights.perturbed_weight", make_and_record)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss = model(**batch).loss
            layers = len(made)
            assert all(one.expired() for one in made)
            loss.backward()
            again = len(made) - layers
    assert layers > 1
    assert 0 < again <= layers, "made again in the backward, where the gradient of an input needs it"


@pytest.mark.parametrize("method", METHODS)
def test_casts_of_autocast_are_not_kept_with_checkpointed_activations(method):
    model, (batch,) = llama().float(), sentences(1)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    casts = sum(2 * layer.weight.numel() for layer in adapted_layers(model))
    optimizer = METHODS[method](base_of(model), RHO, model=model)
    with LiveMemory() as memory, torch.autocast("cpu", torch.bfloat16):
        before = memory.now
        loss = model(**batch).loss
        plain = memory.now - before
        del loss
        for sam_pass in optimizer.passes():
            with sam_pass:
                before = memory.now
                loss = model(**batch).loss
                assert memory.now - before < plain + 0.2 * casts
                loss.backward()
                del loss


def llama():
    """Return a model of linear layers without biases, and with adapters on all of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=TOKENS, **sizes))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).double().train()


@pytest.mark.parametrize("method", METHODS)
def test_trainer_takes_the_steps_of_a_plain_loop_and_resumes_with_the_same_bits(tmp_path, method):
    model, twin, resumed, plain = (adapted(dtype=torch.float32) for _ in range(4))
    settings = {"method": METHODS[method], "rho": RHO, "gradient_accumulation_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, model, **settings).train()
    by_hand(twin, METHODS[method](adamw(twin), RHO, model=twin), k=2)
    by_hand(plain, METHODS[method](adamw(plain), 0.0, model=plain), k=2)
    trainer(tmp_path, resumed, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert model_bits(model) == model_bits(twin) == model_bits(resumed)
    assert model_bits(model) != model_bits(plain)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_activations_change_no_bit(method):
    model, twin = adapted(), adapted()
    twin.activation_checkpointing_enable()
    for each in (model, twin):
        train(each, METHODS[method](base_of(each), RHO, model=each), sentences(3))
    assert model_bits(model) == model_bits(twin)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_model_takes_the_same_steps(method):
    start, model, twin = (adapted(dropout=0.0) for _ in range(3))
    train(model, METHODS[method](base_of(model), RHO, model=model), sentences(3))
    train(torch.compile(twin, backend="eager"), METHODS[method](base_of(twin), RHO, model=twin), sentences(3))
    assert closeness(model, twin, start) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_bf16_by_autocast_is_close_to_float32(method):
    start, model, twin, plain = (adapted(dtype=torch.float32, dropout=0.0) for _ in range(4))
    for each, rho, enabled in ((model, 5.0, True), (twin, 5.0, False), (plain, 0.0, False)):
        optimizer = METHODS[method](torch.optim.SGD(trained(each), lr=0.1), rho, model=each)
        for batch in sentences(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                by_passes(optimizer, lambda each=each, batch=batch: each(**batch).loss)
    assert closeness(model, twin, start) < 0.05
    assert closeness(model, plain, start) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_accelerate_takes_the_steps_of_a_plain_loop(method):
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    accelerator, batches = Accelerator(cpu=True), sentences(3)
    prepared, optimizer = accelerator.prepare(model, METHODS[method](base_of(model), RHO, model=model))
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        for sam_pass in passes(accelerator, optimizer):
            with sam_pass:
                accelerator.backward(prepared(**batch).loss)
        optimizer.step()
    train(twin, METHODS[method](base_of(twin), RHO, model=twin), batches)
    assert model_bits(model) == model_bits(twin)


def bfloat16_base(model):
    for p in model.parameters():
        p.data = p.data.bfloat16() if not p.requires_grad else p.data.float()
    return model


def test_perturbation_that_a_bfloat16_base_rounds_away_warns_and_stochastic_rounding_keeps_it():
    (batch,) = sentences(1)
    model, rho = bfloat16_base(adapted(dropout=0.0)), 0.0005
    with pytest.warns(UserWarning, match="only .*% of the perturbation survives rounding.*stochastic_rounding=True"):
        by_passes(merged_sam(base_of(model), rho, model=model), lambda: model(**batch).loss)
    optimizer = merged_sam(base_of(model), rho, model=model, stochastic_rounding=True)
    for sam_pass in optimizer.passes():
        with sam_pass:
            model(**batch).loss.backward()
            merged = optimizer.perturbation.merged
            if sam_pass.is_perturbed:
                assert bits([merged.at(0)()]) == bits([merged.at(0)()]), "the same in forward and backward"
                assert merged.surviving_share() == pytest.approx(1.0, abs=0.3)
    by_passes(merged_sam(base_of(model), 1.0, model=model), lambda: model(**batch).loss)  # no warning


def test_further_micro_batches_of_a_step_have_a_perturbation_of_their_own():
    model, halves = adapted(dropout=0.0), sentences(2)
    optimizer, expected = merged_sam(base_of(model), RHO, model=model), []
    for batch in halves:
        for sam_pass in optimizer.passes():
            with sam_pass:
                model(**batch).loss.backward()
        expected.append([p.grad.clone() for p in trained(model)])
        optimizer.zero_grad()
    for i, batch in enumerate(halves):
        for sam_pass in optimizer.passes(accumulate=i > 0):
            with sam_pass:
                model(**batch).loss.backward()
    for p, one, two in zip(trained(model), *expected, strict=True):
        torch.testing.assert_close(p.grad, one + two, rtol=1e-10, atol=1e-14)


def test_copy_and_state_of_the_optimizer():
    model, batches = adapted(), sentences(4)
    optimizer = merged_sam(base_of(model), RHO, model=model)
    train(model, optimizer, batches[:2])
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model, optimizer, batches[2:])
    train(model2, optimizer2, batches[2:])
    assert model_bits(model) == model_bits(model2)


# What has no merged weight that can be perturbed.


def with_second_adapter(model):
    model.add_adapter("second", peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    return model


def base_trained(model):
    for p in adapted_weights(model).values():
        p.requires_grad_(True)
    return model


def half_integer(model):
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)).base_layer
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


REFUSED = {
    "several adapters": (lambda: with_second_adapter(adapted()), "c_attn has several active adapters .default, second"),
    "merged": (lambda: merged(adapted()), "c_attn holds merged adapters .default.*unmerge_adapter"),
    "disabled": (lambda: disabled(adapted()), "c_attn has its adapters disabled.*enable_adapter_layers"),
    "DoRA": (lambda: adapted("dora"), "c_attn has a variant of LoRA .*DoRA.*plain LoRA, or steppe.SAM"),
    "quantized": (lambda: half_integer(adapted()), "c_attn has a quantized base weight .*int8"),
    "trained base": (lambda: base_trained(adapted()), "c_attn has a base weight that is trained itself"),
    "tied": (lambda: adapted(target_modules=["lm_head"], fan_in_fan_out=False), "lm_head shares its base weight"),
    "no adapter": (lambda: torch.nn.Linear(2, 2), "no layer with a trained LoRA adapter.*get_peft_model"),
    "another kind": (
        lambda: peft.get_peft_model(
            adapted().unload(),
            peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True),
        ),
        "adapter of another kind .*steppe.SAM",
    ),
}


@pytest.mark.filterwarnings("ignore:.*[Mm]odel.*tie.*:UserWarning", "ignore:.*tied.*:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_perturbed_raise(case, method):
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        METHODS[method](base_of(model), RHO, model=model)


def test_merging_between_two_steps_raises_at_the_next_one():
    model, (batch,) = adapted(), sentences(1)
    optimizer = merged_sam(base_of(model), RHO, model=model)
    by_passes(optimizer, lambda: model(**batch).loss)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        by_passes(optimizer, lambda: model(**batch).loss)


def test_options_that_do_not_fit_raise():
    model, other = adapted(), adapted(target_modules=["wpe"])
    with pytest.raises(ValueError, match="model= is missing"):
        merged_sam(base_of(model), RHO)
    with pytest.raises(TypeError, match="has a perturbation of its own"):
        merged_sam(base_of(model), RHO, model=model, perturbation=steppe.L2())
    with pytest.raises(ValueError, match="total_steps must be 1 or more"):
        flat_lora(base_of(model), RHO, model=model, total_steps=0)
    with pytest.raises(ValueError, match="is an embedding.*modules_to_save"):
        flat_lora(base_of(other), RHO, model=other)
    with pytest.raises(RuntimeError, match="maximize=True"):
        merged_sam(torch.optim.SGD(trained(model), lr=0.1, maximize=True), RHO, model=model)
    optimizer = merged_sam(base_of(model), RHO, model=model)
    with pytest.raises(RuntimeError, match=r"first_step\(\).*merged weights"):
        optimizer.first_step()


def test_pass_that_runs_another_model_raises():
    model, (batch,) = adapted(), sentences(1)
    other, optimizer = copy.deepcopy(model), merged_sam(base_of(model), RHO, model=model)
    with pytest.raises(RuntimeError, match="no layer with an adapter has run in the pass at w . e"):
        for sam_pass in optimizer.passes():
            with sam_pass:
                (other if sam_pass.is_perturbed else model)(**batch).loss.backward()


def test_papers_to_cite():
    model = adapted()
    assert "2409.14396" in steppe.citation(flat_lora(base_of(model), model=model))
    assert "2010.01412" in steppe.citation(merged_sam(base_of(model), model=model))
