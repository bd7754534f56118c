"""TRL's trainers under SAMTrainerMixin equal passes by hand, with LoRA and without; those that generate raise."""

import functools
import importlib

import pytest
import torch

from support import each_in_turn, in_pairs, model_bits, rest_is_slow

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl", reason="needs TRL: pip install trl")

import peft
from accelerate_state import fresh_accelerate_state  # noqa: F401
from tiny_trl import (
    FORMATS,
    ROWS,
    BalanceByHand,
    ByHand,
    MergedByHand,
    NoiseByHand,
    logs_of,
    lora,
    model,
    trainer,
    without_cache_or_hub,  # noqa: F401
)

import steppe
from steppe.integrations.peft import bar, flat_lora, merged_sam
from steppe.integrations.transformers import SAMTrainerMixin

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL about its own future
RHO = 0.5
METHODS = {
    "whole": (False, steppe.SAM, ByHand),
    "LoRA": (True, steppe.SAM, ByHand),
    "merged_sam": (True, merged_sam, MergedByHand),
    "flat_lora": (True, flat_lora, NoiseByHand),
    "bar": (True, functools.partial(bar, alpha=RHO), BalanceByHand),
}
"""By name: with adapters or not, the method, and its passes by hand."""

OPTIONS = {
    "": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "precomputed": {"precompute_ref_log_probs": True},
}
"""Options of TRL that change neither weights nor logs."""

PREFERENCES = ("DPO", "KTO")
CASES = [(kind, "", name) for kind in ROWS for name in METHODS]
CASES += [(data, "", name) for data in FORMATS if data not in ROWS for name in ("whole", "LoRA")]
# Further options, with the kinds of trainers in turn; the slow tests have each kind with each method.
CHECKPOINTED = in_pairs(ROWS, METHODS, ["reentrant", "not reentrant"])
PRECOMPUTED = [(kind, name, "precomputed") for kind in PREFERENCES for name in METHODS]
CASES += [(kind, option, name) for kind, name, option in (*CHECKPOINTED, *PRECOMPUTED)]


def is_fast(data: str, option: str, name: str) -> bool:
    """True for each method with every second kind of trainer, and under each option with one kind in turn."""
    if data not in ROWS:
        return True
    kinds = PREFERENCES if option == "precomputed" else tuple(ROWS)
    return (kinds.index(data) + tuple(METHODS).index(name)) % (len(kinds) if option else 2) == 0


def weights(trained: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.parameters() if p.requires_grad])


def ours(folder, data, name, **options):
    adapters, method, _ = METHODS[name]
    settings = {"adapters": adapters, "method": method, "log_sharpness": True}
    settings |= {} if name == "bar" else {"rho": RHO}
    return trainer(folder, SAMTrainerMixin, data, **{**settings, **options})


@functools.cache
def by_hand(folder, data, name, rho=RHO):
    """Return the weights before and after a training by hand, and its logs. The reference is computed before it."""
    adapters, _, mixin = METHODS[name]
    options = {"precompute_ref_log_probs": True} if data in PREFERENCES else {}
    mine = trainer(folder, mixin, data, adapters=adapters, rho=rho, **options)
    start = weights(mine.model)
    mine.train()
    return start, weights(mine.model), logs_of(mine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("by_hand")


def check_weights(trained, expected, start):
    assert (weights(trained) - expected).norm() < 1e-6 * (expected - start).norm()


def check_logs(trained, expected):
    logs = logs_of(trained)
    assert len(logs) == len(expected) == 5  # three steps, an evaluation, the end
    for entry, of_first_pass in zip(logs, expected, strict=True):
        assert entry == pytest.approx(of_first_pass, rel=1e-4, abs=1e-5)  # TRL computes logits in float32


@pytest.mark.parametrize(("data", "option", "name"), rest_is_slow(CASES, is_fast))
def test_weights_and_logs_are_those_of_passes_by_hand(tmp_path, folder, data, option, name):
    options = dict(OPTIONS[option])
    if data in PREFERENCES and name == "whole" and option != "precomputed":
        options["ref_model"] = model()
    mine = ours(tmp_path, data, name, **options)
    mine.train()
    start, expected, logs = by_hand(folder, data, name)
    check_weights(mine.model, expected, start)
    check_logs(mine, logs)


@pytest.mark.parametrize("name", ["whole", "LoRA", "bar"])
@pytest.mark.parametrize("kind", ROWS)
def test_passes_by_hand_differ_from_training_without_sam(folder, kind, name):
    start, expected, _ = by_hand(folder, kind, name)
    _, plain, _ = by_hand(folder, kind, name, rho=0.0)
    assert (plain - expected).norm() > 0.1 * (expected - start).norm()


class WithoutSAM:
    """The trainer of TRL as it is."""


@pytest.mark.parametrize("kind", ROWS)
def test_logs_are_those_of_the_trainer_without_sam(tmp_path, kind):
    options = {"learning_rate": 0.0} | ({"precompute_ref_log_probs": True} if kind in PREFERENCES else {})
    expected, logs = [], []
    for mixin, found, more in ((WithoutSAM, expected, {}), (SAMTrainerMixin, logs, {"rho": RHO})):
        mine = trainer(tmp_path, mixin, kind, **options, **more)
        mine.train()
        found += [{name: value for name, value in entry.items() if name != "grad_norm"} for entry in logs_of(mine)]
        assert all("num_tokens" in entry for entry in found if "loss" in entry)
    for entry, of_one_pass in zip(logs, expected, strict=True):
        assert entry == pytest.approx(of_one_pass, rel=1e-5, abs=1e-6)


def with_adapter():
    """Return a model with an adapter that was trained before: TRL's reference is a copy of it, not W0."""
    torch.manual_seed(1)
    return peft.get_peft_model(model(), lora())


WITH_ADAPTERS = [name for name, (adapters, _, _) in METHODS.items() if adapters]


@pytest.mark.parametrize(("name", "kind"), each_in_turn(WITH_ADAPTERS, PREFERENCES))
def test_reference_with_a_copy_of_the_adapter_is_never_perturbed(tmp_path, kind, name):
    by_hand = trainer(tmp_path, METHODS[name][2], kind, trained=with_adapter(), rho=RHO, precompute_ref_log_probs=True)
    mine = ours(tmp_path, kind, name, trained=with_adapter(), adapters=False)
    reference = {n: p.detach().clone() for n, p in mine.model.named_parameters() if ".ref." in n}
    start = weights(mine.model)
    by_hand.train()
    mine.train()
    check_weights(mine.model, weights(by_hand.model), start)
    check_logs(mine, logs_of(by_hand))
    assert len(reference) == 6  # of two layers and of the one beside them
    assert all(torch.equal(p, reference[n]) for n, p in mine.model.named_parameters() if ".ref." in n)


@pytest.mark.parametrize("kind", PREFERENCES)
def test_reference_that_follows_the_model_gets_the_weights_of_the_steps(tmp_path, kind):
    follows = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    by_hand = trainer(tmp_path, ByHand, kind, rho=RHO, ref_model=model(), **follows)
    mine = ours(tmp_path, kind, "whole", ref_model=model(), **follows)
    start = weights(mine.model)
    by_hand.train()
    mine.train()
    check_weights(mine.model, weights(by_hand.model), start)
    check_weights(mine.ref_model, weights(by_hand.ref_model), start)


RESUMED = [("SFT", "whole"), ("DPO", "merged_sam"), ("KTO", "flat_lora"), ("Reward", "LoRA"), ("SFT", "bar")]


@pytest.mark.parametrize(("kind", "name"), rest_is_slow(RESUMED, lambda *case: case in RESUMED[:3]))
def test_run_resumed_in_mid_epoch_has_the_same_bits_and_its_checkpoints_are_at_w(tmp_path, kind, name):
    saves = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    mine, resumed = (ours(tmp_path, kind, name, **saves) for _ in range(2))
    mine.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert model_bits(resumed.model) == model_bits(mine.model)
    if METHODS[name][0]:
        saved = peft.PeftModel.from_pretrained(model(kind), tmp_path / "checkpoint-6", is_trainable=True)
    else:
        saved = type(mine.model).from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(weights(saved), weights(mine.model))


TRAINERS = {"GRPO": "trl", "RLOO": "trl", "Distillation": "trl"}
TRAINERS |= {name: f"trl.experimental.{name.lower()}" for name in ("SDFT", "SDPO", "GKD", "GOLD", "GMPO")}
TRAINERS |= {"OnlineDPO": "trl.experimental.online_dpo", "IWOPD": "trl.experimental.iw_opd"}


@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_that_generate_raise(kind):
    of = getattr(importlib.import_module(TRAINERS[kind]), f"{kind}Trainer")
    with pytest.raises(RuntimeError, match="it generates its data inside training_step"):
        type("Ours", (SAMTrainerMixin, of), {})(model=None, rho=0.1)
