"""`steppe.variants`: the named functions at run time, and their stub for type checkers."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import make_variants
import steppe
from steppe import testing, variants
from steppe.methods.bsam import BSAM
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.registry import CARDS, FUNCTIONS
from steppe.methods.sampa import SAMPa
from steppe.methods.sassha import SASSHA
from steppe.methods.wsam import DecoupledWSAM
from support import by_closure


def test_variants_are_the_named_functions_of_the_registry():
    functions = {name: f for name, f in vars(variants).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert functions == dict(FUNCTIONS)
    assert variants.__all__ == list(FUNCTIONS)


def test_unknown_name_is_an_error_that_lists_the_methods():
    with pytest.raises(AttributeError, match=r"there is no method 'samm': steppe.variants has sam, aesam, "):
        _ = variants.samm


@pytest.mark.parametrize("name", ["fraction_sam", "bisam", "merged_sam"])
def test_method_that_is_no_function_here_is_an_error_that_shows_its_use(name):
    with pytest.raises(AttributeError, match=f"{name!r} is no function of steppe.variants. It is used so:") as error:
        getattr(variants, name)
    assert CARDS[name].usage in str(error.value)


def test_stub_is_current():
    assert make_variants.main(["--check"]) == 0, "run python scripts/make_variants.py"


def test_stale_stub_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_variants, "STUB", tmp_path / "variants.pyi")
    assert make_variants.main(["--check"]) == 1
    assert "run python scripts/make_variants.py" in capsys.readouterr().err
    assert make_variants.main([]) == 0
    assert make_variants.main(["--check"]) == 0


def base_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


FIRST = {name: next(iter(inspect.signature(function).parameters)) for name, function in FUNCTIONS.items()}
"""The first argument of each named function."""


@pytest.mark.parametrize("name", [name for name, first in FIRST.items() if first == "base_optimizer"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "a positional model": (
            lambda m: (base_of(m), 0.05, m),
            "takes 2 positional .* a LayerNorm.*: write model=model$",
        ),
        "a further number": (lambda m: (base_of(m), 0.05, 0.2), "takes 2 positional .* a float.*, as in model=model$"),
        "a model as rho": (lambda m: (base_of(m), m), "rho must be a number.*as in model=model$"),
        "parameters": (lambda m: (m.parameters(),), r"takes a base optimizer first, got an object of generator: write"),
        "a model": (lambda m: (m, base_of(m)), r"takes a base optimizer first, got an object of LayerNorm: write"),
        "a class": (lambda m: (torch.optim.SGD,), r"takes a base optimizer first, got the class SGD: write"),
        "the class form": (lambda m: (m.parameters(), torch.optim.SGD), "takes a base optimizer first"),
        "nothing": (lambda m: (), "takes a base optimizer first, got nothing: write"),
    }.values(),
)
def test_wrong_positional_arguments_are_errors_that_say_what_to_write(name, arguments, message):
    model = torch.nn.LayerNorm(2)
    required = {key: value for key, value in CARDS[name].required.items() if key != "rho"}
    with pytest.raises(TypeError, match=message) as error:
        FUNCTIONS[name](*arguments(model), **required, model=model)
    assert "__init__" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "bsam: a base": (lambda m, b: variants.bsam(b, 0.05), "bsam takes the parameters first.*object of SGD"),
        "bsam: a model": (lambda m, b: variants.bsam(m), r"got an object of Linear: write .*bsam\(model.parameters"),
        "bsam: too many": (lambda m, b: variants.bsam(m.parameters(), 0.1, 0.1, m), "takes 3 .*: write model=model$"),
        "bsam: a base as lr": (lambda m, b: variants.bsam(m.parameters(), b, n_data=9), "lr must be a number"),
        "BSAM: too many": (
            lambda m, b: BSAM(m.parameters(), 0.1, m),
            r"BSAM\(params, lr\) takes 2 .*write model=model$",
        ),
        "sassha: a base": (lambda m, b: variants.sassha(b), "sassha takes the parameters first.*object of SGD"),
        "SASSHA: too many": (
            lambda m, b: SASSHA(m.parameters(), 0.1, m),
            r"SASSHA\(params, lr\) takes 2 .*model=model$",
        ),
        "BSAM: missing": (lambda m, b: BSAM(m.parameters()), "BSAM needs n_data="),
        "mesa: a base": (lambda m, b: variants.mesa(b, m), "mesa takes the model first, got an object of SGD"),
        "mesa: unknown": (lambda m, b: variants.mesa(m, lr=0.1), "mesa got lr: "),
        "saf: missing": (lambda m, b: variants.saf(100), "saf needs classes="),
        "late_sam: missing": (lambda m, b: variants.late_sam(b), "late_sam needs total_steps="),
        "SAM: params, base": (lambda m, b: steppe.SAM(m.parameters(), b), r"instance of SGD.*write SAM\(base"),
        "SAMPa: own rule": (lambda m, b: SAMPa(b, cadence=steppe.Periodic(2)), "a cadence of its own: leave cadence="),
        "WSAM: own rule": (lambda m, b: DecoupledWSAM(b, combination=steppe.SurrogateGap()), "leave combination= out"),
    }.values(),
)
def test_errors_of_arguments_name_the_remedy(call, message):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=message):
        call(model, base_of(model))


def test_signatures_show_the_real_arguments():
    passes = ["replay_rng", "per_rank", "scaler", "stochastic_rounding"]
    own_step = [name for name in passes if name != "per_rank"]
    assert arguments_of(variants.gsam) == ["base_optimizer", "rho", "alpha", "model", *passes]
    assert arguments_of(variants.mesa) == ["model", "optimizer", "lmbda", "tau", "beta", "start"]
    assert arguments_of(SAMPa) == [
        "base_optimizer",
        "rho",
        "lmbda",
        "group",
        "perturbation",
        "model",
        *own_step,
        "kwargs",
    ]
    assert arguments_of(DecoupledWSAM)[:5] == ["base_optimizer", "rho", "gamma", "model", "perturbation"]
    assert arguments_of(Lookbehind)[:5] == ["base_optimizer", "rho", "ascent_steps", "alpha", "perturbation"]
    assert arguments_of(BSAM)[:4] == ["params", "lr", "n_data", "rho"]
    assert arguments_of(SASSHA)[:4] == ["params", "lr", "rho", "betas"]


def arguments_of(function):
    return list(inspect.signature(function).parameters)


def test_terms_in_the_loss_take_their_hyperparameters():
    model = testing.Net()
    assert variants.saf(100, 3, lmbda=0.2).lmbda == 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mesa = variants.mesa(model, optimizer, start=0, beta=0.5)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def loss():
        logits = model(x)
        return F.cross_entropy(logits, y) + mesa(logits, x, epoch=0)

    by_closure(optimizer, loss)


def test_bsam_is_an_optimizer_without_a_base():
    model = testing.Net()
    optimizer = variants.bsam(model.parameters(), 0.05, n_data=100, model=model, seed=3)
    assert type(optimizer) is steppe.methods.bsam.BSAM
    by_closure(optimizer, lambda: model(torch.randn(8, 6)).square().mean())
