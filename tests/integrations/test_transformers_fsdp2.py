"""The Hugging Face Trainer under FSDP2 equals one process, and resumes from its checkpoints."""

import pytest
import torch

import steppe
from layouts import skip_without_fsdp2, weights
from ranks import start_ranks

pytest.importorskip("transformers")

from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate_state import reset_accelerate_state
from fsdp2_of_accelerate import choose_fsdp2, distributed_environment
from tiny_transformer import adamw, arguments, by_hand, gpt, tokens

from steppe.integrations.transformers import AveragedTrainerMixin, SAMTrainer

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Start the processes, and import what they need, before the first test: this takes seconds."""
    start_ranks()(warm_up)


def warm_up():
    gpt()
    reset_accelerate_state()


class FSDP2Trainer(SAMTrainer):
    """The Trainer with the engine that its arguments name; on a CPU, Accelerate would ignore them."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        choose_fsdp2(self.accelerator, FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
        self.is_fsdp_enabled = True


class AveragedFSDP2Trainer(AveragedTrainerMixin, FSDP2Trainer):
    pass


def train(folder, *, of=FSDP2Trainer, resume=None, **options):
    """Return the weights and the log of one process of two."""
    skip_without_fsdp2(torch.float64)
    with distributed_environment():
        reset_accelerate_state()
        model = gpt(dropout=0.0).double()
        settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": STEPS, "ddp_backend": "gloo"}
        args = arguments(folder, **settings, fsdp=True, fsdp_config={"version": 2}, **options)
        trainer = of(model=model, args=args, train_dataset=tokens(12), rho=0.1, log_sharpness=True)
        trainer.train(resume_from_checkpoint=resume)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in trainer.model.parameters())
        return weights(trainer.model), trainer.state.log_history


def test_two_processes_equal_one(tmp_path):
    model = gpt(dropout=0.0).double()
    optimizer = steppe.SAM(adamw(model), rho=0.1, model=model)
    logs = by_hand(model, optimizer, k=2, clip=0.5, data=tokens(12), size=4, epochs=3)
    for found, written in start_ranks()(train, tmp_path):
        torch.testing.assert_close(found, weights(model), rtol=1e-10, atol=1e-12)
        for entry, expected in zip(written, logs, strict=False):
            assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert entry["grad_norm"] == pytest.approx(expected["norm"], rel=1e-6)
            assert entry["perturbed_loss"] == pytest.approx(expected["perturbed_loss"], rel=1e-6)


def resumed(folder):
    straight, _ = train(folder, save_strategy="steps", save_steps=STEPS // 2)
    return straight, train(folder, resume=str(folder / f"checkpoint-{STEPS // 2}"))[0]


@pytest.mark.slow
def test_checkpoint_resumes(tmp_path):
    for straight, again in start_ranks()(resumed, tmp_path):
        assert all(map(torch.equal, straight, again))


def average(folder):
    with pytest.raises(ValueError, match=r"FSDP2.*pass it as module="):
        train(folder, of=AveragedFSDP2Trainer)


def test_average_of_the_trainer_raises(tmp_path):
    start_ranks()(average, tmp_path)
