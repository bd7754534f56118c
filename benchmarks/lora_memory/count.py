"""Count the bytes that fine-tuning of language models takes, whole or with LoRA, by method."""

import gc
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import steppe
from live_memory import LiveMemory, SkippedKernels
from steppe.integrations.peft import flat_lora, merged_sam
from steppe.variants import looksam

RANK = 8


def _gpt2(**sizes: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False))


def _llama(**sizes: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, use_cache=False))


MODELS: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "GPT-2": _gpt2,
        "GPT-2 medium": partial(_gpt2, n_embd=1024, n_layer=24, n_head=16),
        "Llama 3.2 1B": partial(
            _llama,
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
        ),
    }
)
"""The shapes of published models, by name; their weights are random."""

TINY: MappingProxyType[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "tiny GPT-2": partial(_gpt2, vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2),
        "tiny Llama": partial(
            _llama,
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    }
)


class Method(NamedTuple):
    """A method, and how many steps show all of its memory: AdamW has its state after the first one."""

    make: Callable[[Optimizer, nn.Module], Any]
    steps: int = 2
    only_lora: bool = False


METHODS: MappingProxyType[str, Method] = MappingProxyType(
    {
        "AdamW": Method(lambda base, model: base),
        "SAM": Method(lambda base, model: steppe.SAM(base, rho=0.05, model=model)),
        "LookSAM": Method(lambda base, model: looksam(base, rho=0.05, interval=2, model=model), steps=3),
        "merged_sam": Method(lambda base, model: merged_sam(base, rho=0.05, model=model), only_lora=True),
        "flat_lora": Method(lambda base, model: flat_lora(base, rho=0.05, model=model), only_lora=True),
    }
)
FITTED = ("AdamW", "SAM", "merged_sam")
"""Methods that are counted with two sizes of batches, to see how many sequences fit."""
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setup:
    """What is counted."""

    model: str
    """A name in :data:`MODELS`."""
    lora: bool
    """Train adapters of LoRA on all linear layers, instead of all weights."""
    dtype: str
    """That of the base weights: "float32" or "bfloat16". PEFT keeps adapters in float32."""
    method: str
    """A name in :data:`METHODS`."""
    checkpointing: bool
    """Recompute the activations of each block in the backward."""
    batch: int
    """Sequences in a batch."""
    length: int
    """Tokens in a sequence."""


@dataclass(frozen=True)
class Bytes:
    """What a setup takes, in bytes."""

    weights: int
    """Of the model: parameters, buffers and adapters."""
    trained: int
    """Parameters that are trained: the adapters, or all."""
    gradients: int
    optimizer_state: int
    """Of AdamW."""
    kept: int
    """What the method keeps from step to step beside all that."""
    peak: int
    """The most that is live within a step, everything included."""


def setups(models: Iterable[str], few: int, many: int, length: int) -> list[Setup]:
    """Return the setups of some models: whole and LoRA, in both dtypes, with and without checkpointing, by method.

    Args:
        models: Names in :data:`MODELS`.
        few: A small batch, for the methods in :data:`FITTED`.
        many: A large batch, for all methods.
        length: Tokens in a sequence.
    """
    choices = product(models, (False, True), DTYPES, METHODS, (False, True), (few, many))
    found = [Setup(*choice, length) for choice in choices]
    found = [setup for setup in found if setup.lora or not METHODS[setup.method].only_lora]
    return [setup for setup in found if setup.batch == many or setup.method in FITTED]


def count(setup: Setup, *, kernels: bool = False) -> Bytes:
    """Count the bytes of a setup in a few steps, under bfloat16 autocast as with the Trainer's ``bf16=True``.

    Args:
        setup: What to count.
        kernels: Run the kernels, too; the bytes are the same.
    """
    memory = LiveMemory()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(nullcontext() if kernels else SkippedKernels())
        stack.enter_context(memory)
        model = _model(setup)
        weights = memory.now
        trained = [p for p in model.parameters() if p.requires_grad]
        base = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        method = METHODS[setup.method]
        optimizer = method.make(base, model)
        memory.reset_peak()
        for _ in range(method.steps):
            optimizer.step(lambda: _loss(optimizer, model, setup))
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        optimizer.zero_grad()
        peak = memory.peak
        gc.collect()
        state = sum(v.nbytes for values in base.state.values() for v in values.values() if isinstance(v, Tensor))
        kept = memory.now - weights - state
    return Bytes(weights, sum(p.nbytes for p in trained), gradients, state, kept, peak)


def _model(setup: Setup) -> nn.Module:
    torch.manual_seed(0)
    model: Any = {**MODELS, **TINY}[setup.model]().to(getattr(torch, setup.dtype))
    if setup.lora:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if setup.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _loss(optimizer: Any, model: nn.Module, setup: Setup) -> Tensor:
    tokens = torch.zeros(setup.batch, setup.length, dtype=torch.long)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def counted(setup: Setup) -> dict[str, Any]:
    """Return a setup and its bytes as one flat dict."""
    return {**asdict(setup), **asdict(count(setup))}
