"""Batches and models of Hugging Face: weights of batches, activation checkpointing, adapters and merged weights."""

import copy

import pytest
import torch
from small_networks import unchanged

from steppe.flatness import EmpiricalFisher, GaussNewton, Hessian, Objective, eigenvalues

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCABULARY = 12


def gpt(dropout=0.2, **options):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 8}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = transformers.GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config).double()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).double()


def bert_classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).double()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(config).double()


def batch_of(model, n=7):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (n, 6), generator=g)
    if model.__class__.__name__ == "BertForSequenceClassification":
        return {"input_ids": ids, "labels": torch.randint(3, (n,), generator=g)}
    left_out = torch.rand(n, 6, generator=g) < torch.linspace(0.0, 0.8, n)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(left_out, -100)}


def split(batch, size):
    parts = [t.split(size) for t in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("make", [gpt, bert, bert_classifier, t5], ids=lambda f: f.__name__)
def test_objective_is_the_loss_over_all_data_in_one_batch(make):
    model = make()
    batch = batch_of(model)
    model.eval()
    whole = model(**batch)
    gradients = torch.autograd.grad(whole.loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    model.train()
    for data in (split(batch, 3), transformers.BatchEncoding(batch)):
        objective = Objective(model, data)
        loss, gradient = objective.gradient()
        # transformers computes its losses in float32
        torch.testing.assert_close(loss.float(), whole.loss.detach().float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, objective.flatten(gradients), rtol=1e-5, atol=1e-7)
        assert objective.weighted_by == ("samples" if make is bert_classifier else "tokens")


def test_matrices_of_a_language_model_do_not_depend_on_the_batches():
    model = gpt()
    batch = batch_of(model)
    v = torch.randn(2, Objective(model, batch).n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for kind in (Hessian, GaussNewton, lambda o: EmpiricalFisher(o, per="token")):
        one, many = (kind(Objective(model, data))(v) for data in (batch, split(batch, 2)))
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)
        assert one.norm() > 1e-2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_used_and_changes_nothing(use_reentrant):
    plain = gpt()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    runs = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: runs.append(model.transformer.h[0].training))
    batch = batch_of(model)
    ours, theirs = (Objective(m, split(batch, 3)) for m in (model, plain))
    with unchanged(model):
        torch.testing.assert_close(ours.gradient()[1], theirs.gradient()[1], rtol=1e-6, atol=1e-8)
        runs.clear()
        ours.gradient()
    assert len(runs) == 2 * 3  # each of the three batches runs again in the backward
    assert not any(runs)  # dropout within the layer is off
    v = torch.randn(2, ours.n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Hessian(ours)(v), Hessian(theirs)(v), rtol=1e-4, atol=1e-6)


def test_adapters_only_or_the_merged_weights():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = gpt(dropout=0.0)
    batch = batch_of(model)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    adapters = Objective(adapted, split(batch, 3))
    assert all("lora_" in name for name in adapters.names)
    assert adapters.n == 2 * (2 * 8 + 2 * 24)
    top = eigenvalues(Hessian(adapters), 1)
    assert float(top.values[0]) > 0
    whole = copy.deepcopy(adapted).merge_and_unload()
    merged = Objective(whole, batch, parameters=[f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)])
    assert merged.n == 2 * 8 * 24
    torch.testing.assert_close(merged.loss(), adapters.loss(), rtol=1e-6, atol=0)
