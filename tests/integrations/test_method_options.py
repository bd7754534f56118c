"""MethodOptions wraps base optimizers alike in all integrations, and raises for what no method can be."""

from functools import partial

import pytest
import torch

import steppe
from steppe.integrations._method_options import MethodOptions, set_model_if_missing
from support import BASES, net


def wrap(method=steppe.SAM, rho=None, **options):
    model = net()
    return MethodOptions("Owner", method, rho, **options).wrap(BASES["sgd"](model.parameters()), model), model


@pytest.mark.parametrize(
    ("method", "rho", "expected"),
    [
        (steppe.SAM, None, 0.05),
        (steppe.SAM, 0.1, 0.1),
        (partial(steppe.SAM, rho=0.2), None, 0.2),
        (steppe.variants.asam, None, 0.5),
        (lambda base, model, rho: steppe.SAM(base, rho=2 * rho, model=model), 0.1, 0.2),
    ],
)
def test_rho_is_that_of_the_option_or_of_the_method(method, rho, expected):
    sam, model = wrap(method, rho)
    assert sam.param_groups[0]["sam_rho"] == expected
    assert sam.model is model


def test_further_options_are_those_of_the_method():
    sam, _ = wrap(steppe.variants.looksam, 0.1, interval=3)
    assert sam.cadence == steppe.Periodic(3)


@pytest.mark.parametrize(
    ("method", "rho", "message"),
    [
        (0.05, None, r"got 0\.05: write Owner\(rho=0\.05\)"),
        (partial(steppe.SAM, rho=0.2), 0.1, r"two radii, rho=0\.1 and the method's own rho=0\.2"),
        (lambda base: steppe.SAM(base), None, r"cannot be called as method\(base, model=model"),
        (lambda base, model: base, None, r"returned SGD, and Owner needs a steppe\.SAM"),
    ],
)
def test_object_that_is_no_method_raises(method, rho, message):
    with pytest.raises(TypeError, match=message):
        wrap(method, rho)


def test_optimizer_as_method_raises_and_names_its_place():
    sam, _ = wrap()
    with pytest.raises(TypeError, match="; a ready-made SAM goes there"):
        MethodOptions("Owner", sam, ready_made="a ready-made SAM goes there")


def test_are_default_is_true_only_without_method_and_options():
    assert MethodOptions("Owner", steppe.SAM).are_default
    assert not MethodOptions("Owner", steppe.SAM, 0.05).are_default
    assert not MethodOptions("Owner", steppe.variants.asam).are_default


def test_given_model_is_kept():
    given, other = net(), net()
    sam = steppe.SAM(BASES["sgd"](given.parameters()), model=given)
    set_model_if_missing(sam, other)
    assert sam.model is given


def test_missing_model_is_set_and_its_buffers_are_protected():
    model = net()
    sam = steppe.SAM(BASES["sgd"](model.parameters()))
    set_model_if_missing(sam, model)
    for sam_pass in sam.passes():
        with sam_pass:
            model(torch.ones(2, 1, 8, 8)).sum().backward()
    assert model.layers[1].num_batches_tracked == 1
