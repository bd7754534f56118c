"""A tiny transformer, its data, and the plain loop that the Hugging Face Trainer must equal."""

import contextlib

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from steppe.integrations.transformers import SAMTrainer

TOKENS = 40
IGNORED_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning",  # the loader's, without an accelerator
    "ignore:.*joblib will operate in serial mode.*:UserWarning",
    "ignore::DeprecationWarning:torch.*",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo's, while it traces
)


def tokens(n: int = 10, length: int = 6) -> list[dict[str, torch.Tensor]]:
    """Return sentences with ignored labels, so that the micro-batches of a window have different weights."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS, (n, length), generator=g)
    holes = torch.rand(n, length, generator=g) < torch.linspace(0.1, 0.8, n)[:, None]
    holes[:, -1] = False
    return [{"input_ids": i, "labels": i.masked_fill(h, -100)} for i, h in zip(ids, holes, strict=True)]


def gpt(seed: int = 0, dropout: float = 0.2):
    torch.manual_seed(seed)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": TOKENS, "n_positions": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**rates, **sizes, **ends, use_cache=False))
    model.loss_type = "ForCausalLM"  # so that the Trainer counts the tokens that the loss counts
    return model


def arguments(folder, *, of=TrainingArguments, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "optim": "adamw_torch_fused",  # the Trainer's own default from torch 2.8
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return of(output_dir=str(folder), **{**settings, **changes})


class SeedsEachStep(TrainerCallback):
    """Seeds the generators by the step's number, as the plain loop does."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def trainer(folder, model, *, of=SAMTrainer, data=None, callbacks=(), **options):
    changes = {k: options.pop(k) for k in list(options) if k in TrainingArguments.__dataclass_fields__}
    return of(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=tokens() if data is None else data,
        callbacks=[SeedsEachStep(), *callbacks],
        **options,
    )


def groups(model, weight_decay: float = 0.01):
    """Return the parameter groups of the Trainer: no weight decay for biases and norms."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        (plain if "bias" in name or "ln_" in name or "norm" in name.lower() else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), lr=0.01, fused=True)


def token_loss(model, batch, window):
    """Return this micro-batch's share of the mean over all predicted tokens of the window."""
    count = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in window)
    return model(**batch, num_items_in_batch=count).loss


def micro_batches(data, size: int = 2) -> list[dict[str, torch.Tensor]]:
    return [
        {name: torch.stack([row[name] for row in data[i : i + size]]) for name in data[0]}
        for i in range(0, len(data), size)
    ]


def by_hand(
    model,
    optimizer,
    *,
    k=1,
    epochs=2,
    clip=0.0,
    schedule=None,
    amp=None,
    scaler=None,
    data=None,
    size=2,
    loss=token_loss,
) -> list[dict[str, float]]:
    """Train by the plain loop, with all micro-batches of a window in each pass; return what a log has."""
    scheduler = schedule(optimizer) if schedule else None
    micro = micro_batches(tokens() if data is None else data, size)
    windows = [micro[i : i + k] for i in range(0, len(micro), k)]
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    logs = []
    model.train()
    for step, window in enumerate(windows * epochs):
        torch.manual_seed(step)
        losses = []
        for sam_pass in optimizer.passes():
            with sam_pass:
                losses.append(0.0)
                for batch in window:
                    with torch.autocast("cpu", amp) if amp else contextlib.nullcontext():
                        value = loss(model, batch, window)
                    scaler.scale(value).backward()
                    losses[-1] += value.item()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scheduler and scaler.get_scale() >= scale:
            scheduler.step()
        logs.append({"loss": losses[0], "perturbed_loss": losses[-1], "norm": norm.item(), "scale": scaler.get_scale()})
    return logs
