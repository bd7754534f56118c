"""What a Trainer records in training_step is that of one pass; data that a pass generates raises an error."""

import collections

import pytest
import torch
import torchmetrics
from tiny_transformer import IGNORED_WARNINGS, TOKENS, adamw, by_hand, gpt, trainer
from transformers import Trainer

import steppe
from steppe.integrations.transformers import SAMTrainer, SAMTrainerMixin
from support import model_bits

pytestmark = IGNORED_WARNINGS


class Recording:
    """Keeps metrics of every kind, as TRL's trainers and scripts do."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.metrics = {"train": collections.defaultdict(list), "eval": {}}
        self.tokens, self.calls, self.recent = 0, 0, collections.deque(maxlen=3)
        self.total, self.mean = torch.zeros(()), torchmetrics.MeanMetric()

    def compute_loss(self, model, inputs, *args, **options):
        loss = super().compute_loss(model, inputs, *args, **options)
        self.metrics["train"]["loss"].append(loss.item())
        self.metrics["train"]["tokens"] = [self.tokens]
        self.tokens += inputs["input_ids"].numel()
        self.calls += 1
        self.recent.append(loss.item())
        self.total += loss.detach()
        self.mean.update(loss.detach())
        self.log({"own": loss.item()})
        return loss

    def records(self):
        own = [entry["own"] for entry in self.state.log_history if "own" in entry]
        return self.metrics, self.tokens, self.calls, list(self.recent), self.total.item(), self.mean.compute(), own


class Plain(Recording, Trainer):
    """One pass."""


class WithSAM(SAMTrainerMixin, Recording, Trainer):
    """Two passes."""


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_and_counters_are_those_of_one_pass(tmp_path, k):
    options = {"gradient_accumulation_steps": k, "learning_rate": 0.0}
    plain = trainer(tmp_path, gpt(dropout=0.0), of=Plain, **options)
    ours = trainer(tmp_path, gpt(dropout=0.0), of=WithSAM, rho=0.5, **options)
    plain.train()
    ours.train()
    assert ours.records() == plain.records()
    assert ours.calls == 10


def test_recording_does_not_change_the_weights(tmp_path):
    model, twin = gpt(), gpt()
    trainer(tmp_path, model, of=WithSAM, rho=0.1).train()
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin))
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("k", [1, 2])
def test_compute_loss_that_changes_its_inputs_in_place_warns(tmp_path, k):
    class Changing(SAMTrainer):
        def compute_loss(self, model, inputs, *args, **options):
            inputs["input_ids"].add_(1).remainder_(TOKENS)
            inputs["labels"].masked_fill_(inputs["labels"] == 0, -100)  # each pass leaves the same labels
            return super().compute_loss(model, inputs, *args, **options)

    ours = trainer(tmp_path, gpt(), of=Changing, rho=0.1, gradient_accumulation_steps=k, max_steps=1)
    changes = r"compute_loss changes a tensor in place \(inputs\[0\]\['input_ids'\]"
    with pytest.warns(UserWarning, match=changes) as caught:
        ours.train()
    assert not any("labels" in str(w.message) for w in caught)


def test_large_data_sets_are_not_copied(tmp_path):
    class Unreadable(list):
        def __iter__(self):
            raise AssertionError("copied")

    ours = trainer(tmp_path, gpt(), rho=0.1)
    ours.eval_dataset = ours.train_dataset = Unreadable(ours.train_dataset)
    ours.train()


class Generates(SAMTrainer):
    def compute_loss(self, model, inputs, *args, **options):
        if self.repeats or self.current_pass.is_first:
            model.generate(inputs["input_ids"], max_new_tokens=1, do_sample=False, pad_token_id=0)
        return super().compute_loss(model, inputs, *args, **options)


def test_generation_in_a_further_pass_raises_and_leaves_the_model(tmp_path):
    ours = trainer(tmp_path, gpt(), of=Generates, rho=0.1)
    ours.repeats, before = True, model_bits(ours.model)
    with pytest.raises(RuntimeError, match="this pass would get other data than the first one.*current_pass.is_first"):
        ours.train()
    assert model_bits(ours.model) == before
    assert "generate" not in vars(ours.model)
    ours.repeats = False
    ours.train()


def test_trainer_that_generates_its_data_raises(tmp_path):
    class Online(SAMTrainer):
        def _generate_and_score_completions(self, inputs):
            return inputs

    with pytest.raises(RuntimeError, match="Online: it generates its data inside training_step"):
        trainer(tmp_path, gpt(), of=Online, rho=0.1)
