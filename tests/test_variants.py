"""`steppe.variants`: the named functions at run time, and their stub for type checkers."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import make_variants
import steppe
from steppe import testing, variants
from steppe.methods.registry import FUNCTIONS
from support import by_closure


def test_variants_are_the_named_functions_of_the_registry():
    functions = {name: f for name, f in vars(variants).items() if inspect.isfunction(f) and not name.startswith("_")}
    assert functions == dict(FUNCTIONS)
    assert variants.__all__ == list(FUNCTIONS)


def test_unknown_name_is_an_error_that_lists_the_methods():
    with pytest.raises(AttributeError, match=r"there is no method 'samm': steppe.variants has sam, aesam, "):
        _ = variants.samm


def test_stub_is_current():
    assert make_variants.main(["--check"]) == 0, "run python scripts/make_variants.py"


def test_stale_stub_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_variants, "STUB", tmp_path / "variants.pyi")
    assert make_variants.main(["--check"]) == 1
    assert "is stale: run python scripts/make_variants.py" in capsys.readouterr().err
    assert make_variants.main([]) == 0
    assert make_variants.main(["--check"]) == 0


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
