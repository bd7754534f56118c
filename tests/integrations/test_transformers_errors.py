"""Errors of SAMTrainer for what is not supported, and of the plain Trainer with SAM."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import steppe

pytest.importorskip("transformers")

import transformers
from accelerate.utils import DistributedType
from tiny_transformer import IGNORED_WARNINGS, adamw, arguments, gpt, tokens, trainer

from steppe.integrations.transformers import SAMTrainer

pytestmark = IGNORED_WARNINGS


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (DistributedType.DEEPSPEED, "SAM would be silently off"),
        (DistributedType.FSDP, "a norm of its own"),
        (DistributedType.MEGATRON_LM, "SAM would be silently off"),
        (DistributedType.XLA, r"in optimizer\.step\(\) only"),
    ],
)
def test_unsupported_engines_raise_in_the_trainer(tmp_path, monkeypatch, engine, reason):
    class Engine(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator = SimpleNamespace(
                distributed_type=engine, parallelism_config=None, unwrap_model=lambda m: m
            )

    with pytest.raises(RuntimeError, match=f"{engine.value}.*{reason}"):
        trainer(tmp_path, gpt(), of=Engine, rho=0.1)


def test_sharded_loading_layerwise_optimizers_and_data_parallel_raise(tmp_path):
    sharded = gpt()
    of = type(sharded)
    sharded.__class__ = type(of.__name__, (of,), {"is_distributed_loading_by_transformers": True})
    with pytest.raises(RuntimeError, match="sharded at load time"):
        trainer(tmp_path, sharded, rho=0.1)
    for name in ("lomo", "galore_adamw_layerwise"):
        with pytest.raises(RuntimeError, match=f"optim='{name}'.*steps during each backward"):
            trainer(tmp_path, gpt(), rho=0.1, optim=name)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel on 2 GPUs.*torchrun"):
        SAMTrainer(model=gpt(), args=args, train_dataset=tokens(), rho=0.1)


@pytest.mark.parametrize("form", ["instance", "class"])
def test_plain_trainer_with_sam_raises(tmp_path, form):
    model = gpt()
    own = {"base_class": torch.optim.AdamW, "rho": 0.1, "lr": 0.01}
    given = {
        "instance": {"optimizers": (steppe.SAM(adamw(model), rho=0.1), None)},
        "class": {"optimizer_cls_and_kwargs": (steppe.SAM, own)},
    }[form]
    plain = trainer(tmp_path, model, of=transformers.Trainer, **given)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match=r"steppe\.integrations\.transformers.*SAMTrainer"),
    ):
        warnings.simplefilter("ignore")
        plain.train()


def test_gradient_of_a_callback_warns_once_that_it_is_cleared(tmp_path):
    class Penalty(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            sum(p.square().sum() for p in model.parameters()).backward()

    with pytest.warns(UserWarning, match="SAM's passes clear it: add the term to the loss, in compute_loss") as found:
        trainer(tmp_path, gpt(), callbacks=[Penalty()], rho=0.1).train()
    assert len([w for w in found if "SAM's passes clear it" in str(w.message)]) == 1
