"""LightningCLI builds SAMCallback, SAM and rules from YAML."""

import copy
import pickle

import pytest
import torch
import yaml
from lightning_reference import IGNORED_WARNINGS, Classifier, by_hand, loader, pl

import steppe
from steppe.integrations.lightning import ConfiguredSAM, SAMCallback
from support import model_bits

pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")
from lightning.pytorch.cli import LightningCLI, OptimizerCallable

pytestmark = [*IGNORED_WARNINGS, pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")]
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
CALLBACK = "steppe.integrations.lightning.SAMCallback"


TWO_STEPS = {"class_path": "steppe.AscentSteps", "init_args": {"rule": {"class_path": "steppe.L2"}, "ascent_steps": 2}}
ADAPTIVE = {"class_path": "steppe.Adaptive", "init_args": {"eta": 0.5}}


class Module(pl.LightningModule):
    """The classifier, whose optimizer LightningCLI configures."""

    def __init__(self):
        super().__init__()
        self.model = Classifier().model

    on_train_batch_start, training_step = Classifier.on_train_batch_start, Classifier.training_step

    def train_dataloader(self):
        return loader()


@pytest.fixture(autouse=True)
def _without_warnings_about_calls_of_lightning(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def train_from_yaml(folder, callback, optimizer=SGD, of=Module, **own):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, "callbacks": [callback]}
    config = {"trainer": trainer, **(own or {"optimizer": optimizer})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return LightningCLI(
        of,
        save_config_callback=None,
        seed_everything_default=0,
        args=["fit", "--config", str(folder / "config.yaml")],
    )


def assert_equals_by_hand(cli, method):
    twin = Module()
    by_hand(twin.model, method(torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), model=twin))
    assert model_bits(cli.model) == model_bits(twin)
    assert any(isinstance(callback, SAMCallback) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize(
    ("init_args", "options"),
    [
        ({}, {}),
        ({"rho": 0.5, "stochastic_rounding": True, "log_sharpness": True}, {"rho": 0.5}),
        ({"rho": 0.5, "perturbation": ADAPTIVE}, {"rho": 0.5, "perturbation": steppe.Adaptive(eta=0.5)}),
        (
            {"perturbation": TWO_STEPS, "cadence": {"class_path": "steppe.Periodic", "init_args": {"interval": 2}}},
            {"perturbation": steppe.AscentSteps(steppe.L2(), 2), "cadence": steppe.Periodic(2)},
        ),
        (
            {"rho": 0.5, "combination": {"class_path": "steppe.SurrogateGap", "init_args": {"alpha": 0.3}}},
            {"rho": 0.5, "combination": steppe.SurrogateGap(0.3)},
        ),
        (
            {"rho": 0.5, "method": {"class_path": "steppe.SAM", "init_args": {"perturbation": ADAPTIVE}}},
            {"rho": 0.5, "perturbation": steppe.Adaptive(eta=0.5)},
        ),
    ],
)
def test_callback_with_options_and_rules(tmp_path, init_args, options):
    cli = train_from_yaml(tmp_path, {"class_path": CALLBACK, "init_args": init_args})
    assert_equals_by_hand(cli, lambda base, model: steppe.SAM(base, model=model, **options))


def test_callback_with_named_method_and_its_option(tmp_path):
    method = {"method": "steppe.variants.gsam", "rho": 0.5}
    cli = train_from_yaml(tmp_path, {"class_path": CALLBACK, "init_args": method, "dict_kwargs": {"alpha": 0.3}})
    assert_equals_by_hand(cli, lambda base, model: steppe.variants.gsam(base, 0.5, alpha=0.3, model=model))


def test_optimizer_built_from_its_base_and_rules(tmp_path):
    init_args = {"base": SGD, "rho": 0.5, "perturbation": ADAPTIVE}
    optimizer = {"class_path": "steppe.integrations.lightning.ConfiguredSAM", "init_args": init_args}
    cli = train_from_yaml(tmp_path, {"class_path": CALLBACK}, optimizer)
    assert cli.trainer.optimizers[0].perturbation == steppe.Adaptive(eta=0.5)
    assert_equals_by_hand(cli, lambda base, model: steppe.variants.asam(base, 0.5, eta=0.5, model=model))


class TakesOptimizer(Module):
    """A module that gets a function that makes its optimizer."""

    def __init__(self, make: OptimizerCallable):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


def test_optimizer_as_argument_of_the_module(tmp_path):
    init_args = {"base": SGD, "rho": 0.5, "perturbation": ADAPTIVE}
    optimizer = {"class_path": "steppe.integrations.lightning.ConfiguredSAM", "init_args": init_args}
    options = {"model": {"make": optimizer}}
    cli = train_from_yaml(tmp_path, {"class_path": CALLBACK}, of=TakesOptimizer, **options)
    assert_equals_by_hand(cli, lambda base, model: steppe.variants.asam(base, 0.5, eta=0.5, model=model))


def test_copies_of_the_optimizer_are_independent():
    module = Module()
    optimizer = ConfiguredSAM(module.parameters(), torch.optim.SGD, rho=0.5, perturbation=steppe.Adaptive())
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert repr(copied) == repr(optimizer)
        assert copied.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def test_radii_of_callback_and_of_method_in_one_file_raise(tmp_path):
    method = {"class_path": "steppe.SAM", "init_args": {"rho": 0.1}}
    with pytest.raises(ValueError, match=r"two radii, rho=0.5 and the method's own rho=0.1"):
        train_from_yaml(tmp_path, {"class_path": CALLBACK, "init_args": {"rho": 0.5, "method": method}})
