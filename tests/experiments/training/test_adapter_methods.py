"""Methods for LoRA adapters in comparisons: by name or as functions, with the run's model and number of steps."""

from pathlib import Path

import pytest
import torch
from own_tasks import classifier, run_of
from tiny import CPU, recipe
from torch import nn

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.config.methods import METHODS, find, from_function
from steppe.experiments.tasks.task import Task
from steppe.experiments.training.run import Training, train
from steppe.methods.flat_lora import flat_lora
from steppe.methods.registry import FUNCTIONS

FOR_ADAPTERS = [name for name, method in METHODS.items() if method.needs_adapters]


def adapted_net() -> nn.Module:
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    model: nn.Module = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    return model


def task() -> Task:
    return classifier(
        model=adapted_net,
        optimizer=lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
    )


@pytest.mark.parametrize("name", FOR_ADAPTERS)
def test_method_for_adapters_trains_a_task_at_its_planned_compute(name: str, tmp_path: Path) -> None:
    run = run_of(task(), name, epochs=4, eval_every=4)
    (record,) = train(run, tmp_path, task(), CPU)
    assert (record.standardized_epoch, record.passes) == (4, run.method.passes)
    assert record.steps == 4 * 4 / run.method.passes
    assert record["train_accuracy"] > 60


def test_noise_on_merged_weights_grows_over_the_steps_of_the_run() -> None:
    run = run_of(task(), "flat_lora:rho=0.2", epochs=4)
    training = Training(run, task(), CPU)
    assert training.optimizer.perturbation.total_steps == run.steps(training.batches) == 16
    assert training.optimizer.param_groups[0]["sam_rho"] == 0.2
    assert run.method.definition.follows_plan


@pytest.mark.parametrize("name", FOR_ADAPTERS)
def test_method_for_adapters_is_refused_for_the_built_in_networks(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} acts on LoRA adapters, and the networks for dataset=sample"):
        recipe(methods=("sgd", name))


@pytest.mark.parametrize("name", FOR_ADAPTERS)
def test_radius_of_a_method_for_adapters_is_checked_without_a_model(name: str) -> None:
    with pytest.raises(ValueError, match="rho"):
        run_of(task(), f"{name}:rho=-1")


def test_function_of_a_method_is_that_method() -> None:
    assert find("steppe.methods.flat_lora:flat_lora") is METHODS["flat_lora"]
    assert from_function("mine", FUNCTIONS["msam"]) is METHODS["msam"]
    assert find("steppe.variants:asam").rho_factor == 10
    mine = from_function("mine", lambda base, rho=0.1: flat_lora(base, rho))  # one of its own
    assert (mine.label, mine.passes) == ("mine", 2)


def test_options_that_a_function_passes_on_are_filled_as_well() -> None:
    def mine(base: torch.optim.Optimizer, rho: float = 0.05, **options: object) -> torch.optim.Optimizer:
        return base

    assert from_function("mine", flat_lora.__wrapped__ if hasattr(flat_lora, "__wrapped__") else flat_lora)
    assert "model" in METHODS["merged_sam"].parameters
    assert "scaler" not in METHODS["merged_sam"].parameters
    assert MethodSpec.parse("merged_sam:rho=0.2").overrides == (("rho", 0.2),)
    assert "model" not in from_function("mine", mine).parameters  # its options are not known
