"""TRL's trainers under SAMTrainerMixin log what one pass would have logged; GRPO raises an error."""

import uuid

import pytest
import torch
import transformers

from steppe.integrations.transformers import SAMTrainerMixin

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL about its own future
WORDS = list("abcdefghij")
PROMPTS = [" ".join(WORDS[(i * 3 + j * (i + 1)) % 10] for j in range(5)) for i in range(8)]
ROWS = {
    "SFT": {"text": PROMPTS},
    "DPO": {"prompt": PROMPTS, "chosen": [" a b c"] * 8, "rejected": [" d e"] * 8},
    "KTO": {"prompt": PROMPTS, "completion": [" a b c", " d e"] * 4, "label": [True, False] * 4},
    "Reward": {"chosen": [f"{prompt} a b" for prompt in PROMPTS], "rejected": [f"{prompt} d" for prompt in PROMPTS]},
}


@pytest.fixture(autouse=True)
def _without_cache_of_datasets(monkeypatch):
    monkeypatch.setattr(datasets.fingerprint.Hasher, "hash", classmethod(lambda cls, value: uuid.uuid4().hex[:16]))


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **specials)


def model(kind="SFT"):
    torch.manual_seed(0)
    of = transformers.GPT2ForSequenceClassification if kind == "Reward" else transformers.GPT2LMHeadModel
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 16, "n_positions": 32, "num_labels": 1}
    return of(transformers.GPT2Config(**rates, **sizes, bos_token_id=2, eos_token_id=2, pad_token_id=0))


def train(folder, kind, of, **options):
    settings = {"num_train_epochs": 1, "learning_rate": 0.0, "logging_steps": 1, "lr_scheduler_type": "constant"}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False}
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    args = getattr(trl, f"{kind}Config")(str(folder), **settings, **quiet, **batches, max_length=24)
    reference = {"ref_model": model()} if kind in ("DPO", "KTO") else {}
    data, own = datasets.Dataset.from_dict(ROWS[kind]), model(kind)
    trained = of(model=own, args=args, train_dataset=data, processing_class=tokenizer(), **reference, **options)
    trained.train()
    return [
        {
            name: value
            for name, value in entry.items()
            if name not in ("grad_norm", "total_flos") and "train_" not in name
        }
        for entry in trained.state.log_history
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_metrics_and_token_counts_are_those_of_one_pass(tmp_path, kind):
    plain = getattr(trl, f"{kind}Trainer")
    ours = type("Ours", (SAMTrainerMixin, plain), {})
    expected, logs = train(tmp_path, kind, plain), train(tmp_path, kind, ours, rho=0.5)
    assert len(logs) == len(expected) > 2
    assert all("num_tokens" in entry for entry in expected[:-1])
    for entry, of_one_pass in zip(logs, expected, strict=True):
        assert entry == pytest.approx(of_one_pass, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trainers_that_generate_raise(kind):
    ours = type("Ours", (SAMTrainerMixin, getattr(trl, f"{kind}Trainer")), {})
    with pytest.raises(RuntimeError, match="it generates its data inside training_step"):
        ours(model=model(), reward_funcs=[], rho=0.1)
