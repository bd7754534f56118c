"""AveragedTrainerMixin: the average in evaluation, in checkpoints, and after training."""

import functools
from pathlib import Path

import pytest
import torch

from support import bits, model_bits

pytest.importorskip("transformers")

from tiny_transformer import IGNORED_WARNINGS, gpt, tokens, trainer
from transformers import Trainer, TrainerCallback

from steppe.averaging import EMA, SWA, LastPart
from steppe.integrations.transformers import AveragedTrainerMixin, SAMTrainer

pytestmark = IGNORED_WARNINGS


class AveragedSAMTrainer(AveragedTrainerMixin, SAMTrainer):
    pass


class AveragedTrainer(AveragedTrainerMixin, Trainer):
    pass


class Record(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append([p.detach().clone() for p in model.parameters()])


SAM_OPTIONS = {"of": AveragedSAMTrainer, "rho": 0.1}


@pytest.mark.parametrize("options", [SAM_OPTIONS, {"of": AveragedTrainer}], ids=["sam", "plain"])
def test_average_is_that_of_the_weights_after_each_step(tmp_path, options):
    model, record = gpt(), Record()
    trained = trainer(tmp_path, model, average=SWA, callbacks=[record], gradient_accumulation_steps=2, **options)
    trained.train()
    assert len(record.seen) == int(trained.averaged.n_averaged) == 6
    for mine, *seen in zip(trained.averaged.module.parameters(), *record.seen, strict=True):
        torch.testing.assert_close(mine.detach(), torch.stack(seen).mean(0))
    assert bits(model.parameters()) == bits(record.seen[-1])


def test_evaluation_and_prediction_use_the_average_and_restore_the_weights(tmp_path):
    model = gpt()
    average = functools.partial(EMA, decay=0.9)
    trained = trainer(tmp_path, model, average=average, eval_dataset=tokens(), eval_strategy="epoch", **SAM_OPTIONS)
    before_training = trained.evaluate()["eval_loss"]
    trained.train()
    logged = [entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry]
    weights = model_bits(model)
    loss = trained.evaluate({"a": tokens(), "b": tokens(4)})["eval_a_loss"]
    assert trained.predict(tokens()).metrics["test_loss"] == loss == logged[-1] != before_training
    assert model_bits(model) == weights
    trained.averaged = None
    assert trained.evaluate()["eval_loss"] != loss


def test_average_resumes_from_a_checkpoint_to_the_same_bits(tmp_path):
    whole = trainer(tmp_path / "whole", gpt(), average="ema", save_strategy="steps", save_steps=4, **SAM_OPTIONS)
    whole.train()
    resumed = trainer(tmp_path / "resumed", gpt(seed=3), average="ema", **SAM_OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert model_bits(resumed.averaged) == model_bits(whole.averaged)
    assert int(resumed.averaged.n_steps) == 10
    assert (Path(tmp_path) / "whole" / "checkpoint-4" / "averaged.pt").exists()


def test_best_checkpoint_brings_its_average(tmp_path):
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    scores = iter([1.0, 2.0, 3.0, 5.0, 4.0])
    trained = trainer(
        tmp_path,
        gpt(),
        average="swa",
        eval_dataset=tokens(),
        compute_metrics=lambda _: {"score": next(scores)},
        metric_for_best_model="score",
        load_best_model_at_end=True,
        learning_rate=0.3,
        **options,
        **SAM_OPTIONS,
    )
    trained.train()
    assert isinstance(trained.averaged, LastPart)
    assert trained.averaged.start == 8  # of 10 steps: the last quarter is 2
    best = trained.state.best_model_checkpoint
    assert best is not None
    saved = torch.load(f"{best}/averaged.pt", weights_only=True)
    assert {name: bits([value]) for name, value in saved.items()} == {
        name: bits([value]) for name, value in trained.averaged.state_dict().items()
    }
    assert int(trained.averaged.n_steps) == int(best.rpartition("-")[2]) == 8
