"""TRL's trainers on tiny models without a hub, and the same trainers with the passes of SAM by hand."""

import copy
import uuid

import pytest
import torch
import transformers
from tiny_peft import adapted_weights, factors_of, is_factor, noise_by_hand

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")

WORDS = list("abcdefghij")
PROMPTS = [" ".join(WORDS[(i * 3 + j * (i + 1)) % 10] for j in range(3 + i % 4)) for i in range(10)]
GOOD = [" " + " ".join(WORDS[(i + 2 * j) % 10] for j in range(1 + i % 3)) for i in range(10)]
BAD = [" " + " ".join(WORDS[(7 * i + j) % 10] for j in range(1 + i % 2)) for i in range(10)]
BOTH = [(prompt + good, prompt + bad) for prompt, good, bad in zip(PROMPTS, GOOD, BAD, strict=True)]

ROWS = {
    "SFT": {"text": [good for good, _ in BOTH]},
    "DPO": {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD},
    "KTO": {"prompt": PROMPTS, "completion": GOOD, "label": [True, False] * 5},
    "Reward": {"chosen": [good for good, _ in BOTH], "rejected": [bad for _, bad in BOTH]},
}
COMPLETIONS = {"prompt": PROMPTS, "completion": GOOD}
CHATS = {
    "messages": [
        [{"role": role, "content": text} for text in (good, bad) for role in ("user", "assistant")]
        for good, bad in BOTH
    ]
}
FORMATS = {
    **{kind: (kind, {}, rows) for kind, rows in ROWS.items()},
    "packing": ("SFT", {"packing": True, "max_length": 8}, ROWS["SFT"]),
    "packing across rows": ("SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 6}, ROWS["SFT"]),
    "padding-free": ("SFT", {"padding_free": True, "max_length": None}, ROWS["SFT"]),
    "loss on completions": ("SFT", {}, COMPLETIONS),
    "loss on the assistant": ("SFT", {"assistant_only_loss": True, "max_length": 40}, CHATS),
    "noise in embeddings": ("SFT", {"neftune_noise_alpha": 5.0}, ROWS["SFT"]),
}
"""By name: the trainer, options of its configuration, and its data."""

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' [EOS] ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def without_cache_or_hub(monkeypatch):
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex[:16]))
    monkeypatch.setenv("CI", "1")  # TRL reports no use of itself


def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, chat_template=TEMPLATE, **specials)


def model(kind: str = "SFT", *, dropout: float = 0.1):
    torch.manual_seed(0)
    of = transformers.GPT2ForSequenceClassification if kind == "Reward" else transformers.GPT2LMHeadModel
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 16, "n_positions": 64, "num_labels": 1}
    return of(transformers.GPT2Config(**rates, **sizes, bos_token_id=2, eos_token_id=2, pad_token_id=0)).double()


def lora(kind: str = "SFT"):
    """Return adapters whose product B A is not zero at first, and a layer beside them that is trained whole."""
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    sizes = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    return peft.LoraConfig(**sizes, init_lora_weights=False, modules_to_save=["ln_f"], task_type=task)


def trainer(folder, mixin: type, data: str, *, trained=None, adapters: bool = False, **options):
    """Return a trainer of TRL: with accumulation over windows of which the last is shorter, and with an evaluation.

    Args:
        folder: Its output directory.
        mixin: The class before that of TRL.
        data: A name of ``FORMATS``.
        trained: The model; a new one by default.
        adapters: True to let the trainer add adapters.
        **options: Options of its configuration, and others of its class.
    """
    kind, own, rows = FORMATS[data]
    config = getattr(trl, f"{kind}Config")
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "max_length": 24,
    }
    settings |= own | {name: options.pop(name) for name in list(options) if name in config.__dataclass_fields__}
    return type("Mine", (mixin, getattr(trl, f"{kind}Trainer")), {})(
        model=model(kind) if trained is None else trained,
        args=config(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict({name: column[:2] for name, column in rows.items()}),
        processing_class=tokenizer(),
        **({"peft_config": lora(kind)} if adapters else {}),
        **options,
    )


def logs_of(trained: transformers.Trainer) -> list[dict[str, float]]:
    """Return the logs without times, and without the count of operations, which is that of all passes."""
    return [
        {
            name: value
            for name, value in entry.items()
            if name != "total_flos" and not name.endswith(("_runtime", "_per_second"))
        }
        for entry in trained.state.log_history
    ]


class ByHand:
    """A trainer of TRL with the passes of SAM by hand around its own training_step, without code of Steppe.

    Args:
        *args: Arguments of the trainer.
        rho: The radius.
        **kwargs: Keyword arguments of the trainer.
    """

    def __init__(self, *args, rho: float, **kwargs):
        self.rho, self.window, self.losses = rho, [], []
        super().__init__(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.window.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros(())
        window, self.window = self.window, []
        return self.passes(model, lambda: self.one_pass(model, window, num_items_in_batch))

    def one_pass(self, model, window, num_items_in_batch):
        loss = torch.zeros((), dtype=torch.float64)
        for inputs in window:
            loss += super().training_step(model, dict(inputs), num_items_in_batch)
        return loss

    def perturbed(self, model):
        """Return the weights that are perturbed."""
        return [p for p in model.parameters() if p.requires_grad]

    def passes(self, model, one_pass):
        """Run a pass at w and one at w + e, with the same draws, and keep the metrics of the first one."""
        weights, draws = self.perturbed(model), torch.get_rng_state()
        w = [p.detach().clone() for p in weights]
        for p in weights:
            p.requires_grad_()
        loss = one_pass()
        g = torch.cat([p.grad.flatten() for p in weights])
        with torch.no_grad():
            for p, e in zip(weights, (self.rho * g / g.norm()).split([p.numel() for p in weights]), strict=True):
                p += e.view_as(p)
        model.zero_grad()
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        torch.set_rng_state(draws)
        self.losses.append((loss, one_pass()))
        self._metrics, self._total_train_tokens = metrics, tokens
        with torch.no_grad():
            for p, before in zip(weights, w, strict=True):
                p.copy_(before)
        return loss

    def log(self, logs, *args):
        if "loss" in logs and self.losses:
            first, second = self.losses[-1]
            logs = {**logs, "perturbed_loss": second.item(), "sharpness": (second - first).item()}
        super().log(logs, *args)


class MergedByHand(ByHand):
    """Perturbs W0, and the trained parameters beside A and B, along their gradients."""

    def perturbed(self, model):
        others = [p for name, p in model.named_parameters() if p.requires_grad and not is_factor(name)]
        return [*adapted_weights(model).values(), *others]

    def passes(self, model, one_pass):
        loss = super().passes(model, one_pass)
        for W0 in adapted_weights(model).values():
            W0.requires_grad_(False)
            W0.grad = None
        return loss


class NoiseByHand(ByHand):
    """Runs a single pass, at W0 plus the noise of Flat-LoRA."""

    def passes(self, model, one_pass):
        weights = adapted_weights(model)
        before = {name: W0.clone() for name, W0 in weights.items()}
        for name, noisy in noise_by_hand(model, self.state.global_step, self.rho, None, 0).items():
            weights[name].copy_(noisy)
        loss = one_pass()
        for name, W0 in before.items():
            weights[name].copy_(W0)
        return loss


class BalanceByHand(ByHand):
    """Runs a single pass, and scales A and B as nBAR does before the step of the base; `rho` is its alpha."""

    def passes(self, model, one_pass):
        loss = one_pass()
        rate = self.rho * self.args.learning_rate
        with torch.no_grad():
            for A, B in factors_of(model):
                if A.grad is not None:  # not of the reference's adapter
                    s = 1 if A.grad.norm() >= B.grad.norm() else -1
                    A *= 1 + s * rate
                    B *= 1 - s * rate
        return loss
