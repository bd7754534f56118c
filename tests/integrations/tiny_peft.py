"""Adapters of PEFT on a tiny transformer, and its data."""

import math

import peft
import pytest
import torch
import transformers
from tiny_transformer import IGNORED_WARNINGS as _OF_THE_TRAINER
from tiny_transformer import TOKENS, gpt, micro_batches, tokens
from torch import Tensor, nn

from steppe._tensors.random import generator, key

IGNORED_WARNINGS = [
    _OF_THE_TRAINER,
    pytest.mark.filterwarnings(
        "ignore:.*Could not find a config file in.*:UserWarning",  # PEFT's: the tiny model is on no hub
        "ignore:.*is_gradient_checkpointing. is deprecated.*:FutureWarning",  # Transformers', which PEFT reads
    ),
]

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["ln_f"]},
}


def adapted(kind: str = "lora", *, seed: int = 0, dtype: torch.dtype = torch.float64, dropout: float = 0.2, **options):
    """Return a tiny GPT-2 with adapters on its attention, whose product B A is not zero."""
    config = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(**{**config, **KINDS[kind], **options, "task_type": "CAUSAL_LM"})
    model = peft.get_peft_model(gpt(seed, dropout), config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                p.normal_(0, 0.1)
    return model.train()


def quantized(folder):
    """Return a tiny Llama whose linear layers are 4-bit, with adapters (QLoRA)."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=TOKENS, **sizes)).save_pretrained(folder)
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=four_bits, device_map="cpu")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model.train()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def sentences(steps: int) -> list[dict[str, Tensor]]:
    return (micro_batches(tokens(10), 5) * steps)[:steps]


def closeness(a: nn.Module, b: nn.Module, start: nn.Module | None = None) -> float:
    """Return the distance of the trained parameters; with a start, relative to how far those of b are from it."""
    one, two = (torch.cat([p.detach().flatten() for p in trained(m)]) for m in (a, b))
    if start is None:
        return float((one - two).norm())
    return float((one - two).norm() / (two - torch.cat([p.detach().flatten() for p in trained(start)])).norm())


def adapted_weights(model) -> dict[str, Tensor]:
    """Return the base weights of the adapted layers by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith("base_layer.weight")}


def is_factor(name: str) -> bool:
    return "lora_" in name


def factors_of(model):
    """Return each pair (A, B), by the names that PEFT gives them."""
    named = dict(model.named_parameters())
    kinds = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
    return [(p, named[name.replace(a, b)]) for a, b in kinds for name, p in named.items() if f"{a}." in name]


def noise_by_hand(model, step, rho, total_steps, seed):
    """The paper's perturbation of each filter: standard deviation sigma / sqrt(n) |W'_i|, sigma on half a cosine."""
    sigma = rho * 0.5 * (1 - math.cos(math.pi * min(step / total_steps, 1.0))) if total_steps else rho
    weights = {}
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for position, (name, module) in enumerate(modules):
        W0 = module.base_layer.weight
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        W = W0.T + module.scaling["default"] * B @ A  # (outputs, inputs): GPT-2 keeps the transpose
        draw = torch.empty_like(W0).normal_(generator=generator(W0.device, key("FlatLoRA", seed, step, position)))
        deviation = sigma / math.sqrt(W.shape[1]) * W.square().sum(1).sqrt()
        weights[f"{name}.base_layer.weight"] = (W0 + draw * deviation[None, :]).detach()
    return weights
