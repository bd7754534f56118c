"""An object that copies or proxies the optimizer shares one state with it (C30)."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from named_methods import RULE_METHODS, WRAPPERS, build

import steppe
from steppe import SAM
from support import BASES, DRIVES, bits, by_closure, in_pairs, in_turn, model_bits, net, parameter, rest_is_slow, train


class CopiesDict:
    """Takes over the class and the __dict__ of an optimizer, and steps through it, as older versions of Fabric."""

    def __init__(self, optimizer):
        kept = ("state_dict", "step", "zero_grad")
        self.__dict__ = {name: value for name, value in vars(optimizer).items() if name not in kept}
        self.__class__ = type(f"Copied{type(optimizer).__name__}", (CopiesDict, type(optimizer)), {})
        self._wrapped_optimizer = optimizer

    def step(self, closure=None):
        return self._wrapped_optimizer.step() if closure is None else self._wrapped_optimizer.step(closure)

    def state_dict(self):
        return self._wrapped_optimizer.state_dict()


class LooksUp:
    """Takes over the class of an optimizer, looks up its attributes, and steps through it, as Fabric does."""

    def __init__(self, optimizer):
        self._wrapped_optimizer = optimizer
        self.__class__ = type(f"Proxied{type(optimizer).__name__}", (LooksUp, type(optimizer)), {})

    def step(self, closure=None):
        return self._wrapped_optimizer.step() if closure is None else self._wrapped_optimizer.step(closure)

    def state_dict(self):
        return self._wrapped_optimizer.state_dict()

    def __getattr__(self, name):
        return getattr(self._wrapped_optimizer, name)


class Delegates:
    """Has no class in common with the optimizer, and looks everything up in it, as Accelerate does."""

    def __init__(self, optimizer):
        self._wrapped_optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self._wrapped_optimizer, name)


PROXIES = [CopiesDict, LooksUp, Delegates, copy.copy]
every_proxy = pytest.mark.parametrize("proxy", PROXIES, ids=lambda p: p.__name__)


def trained_through(proxy, name, drive):
    model = net()
    optimizer = build(name)(model)
    proxied = proxy(optimizer)
    torch.manual_seed(1)
    try:
        train(model, proxied, DRIVES[drive], 3)
        train(model, optimizer, DRIVES[drive], 1, start=3)
        train(model, proxied, DRIVES[drive], 2, start=4)
    except RuntimeError as error:  # a method whose passes do not fit the classic API
        return str(error)
    return model_bits(model), optimizer._engine.steps


@functools.cache
def trained_without_proxy(name, drive):
    return trained_through(lambda optimizer: optimizer, name, drive)


OWN_STEPS = [name for name in WRAPPERS if name not in RULE_METHODS]  # each has a class and attributes of its own
OF_RULES = in_pairs(RULE_METHODS, PROXIES, DRIVES)


def a_proxy_in_turn(name: str, proxy: Callable[..., object], drive: str) -> bool:
    """True for SAM with every proxy, for every other rule with one, for every own step with each, the APIs in turn."""
    if name in RULE_METHODS:
        return name == "sam" or in_turn(RULE_METHODS, PROXIES)(name, proxy)
    return (PROXIES.index(proxy) + OWN_STEPS.index(name)) % len(DRIVES) == tuple(DRIVES).index(drive)


@pytest.mark.parametrize(
    ("name", "proxy", "drive"),
    rest_is_slow([*itertools.product(OWN_STEPS, PROXIES, DRIVES), *OF_RULES], a_proxy_in_turn),
)
def test_c30_proxy_of_every_method_takes_the_steps_of_the_optimizer(name, proxy, drive):
    assert trained_through(proxy, name, drive) == trained_without_proxy(name, drive)


@pytest.mark.parametrize("proxy", [CopiesDict, LooksUp, copy.copy])  # Delegates keeps what is assigned to itself
def test_c30_what_is_assigned_to_a_proxy_reaches_the_optimizer(proxy):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
    proxied = proxy(optimizer)
    proxied.rho = 0.25
    proxied.cadence = steppe.Periodic(2)
    proxied.scaler = scaler = torch.amp.GradScaler("cpu")
    assert (optimizer.rho, optimizer.cadence, optimizer.scaler) == (0.25, steppe.Periodic(2), scaler)
    optimizer.perturbation = steppe.LInf()
    assert proxied.perturbation == steppe.LInf()


@every_proxy
def test_c30_pass_and_skipped_steps_are_seen_from_both(proxy):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
    proxied = proxy(optimizer)
    for sam_pass in proxied.passes():
        with sam_pass:
            assert optimizer.current_pass is proxied.current_pass is sam_pass
            (w * float("nan")).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proxied.step()
    assert optimizer.skipped_steps == proxied.skipped_steps == 1
    assert bits([w]) == bits([torch.tensor([3.0, 4.0])])


@every_proxy
def test_c30_proxy_restores_the_weights_that_the_optimizer_has_perturbed(proxy):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=0.5)
    proxied = proxy(optimizer)
    w.square().sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="between first_step"):
        proxied.first_step()
    proxied.restore()
    assert bits([w]) == bits([torch.tensor([3.0, 4.0])])


@every_proxy
def test_c30_checkpoint_of_a_proxy_is_that_of_the_optimizer(proxy):
    model = net()
    optimizer = SAM(BASES["adamw"](model.parameters()), rho=0.1, model=model, cadence=steppe.Periodic(2))
    proxied = proxy(optimizer)
    train(model, proxied, by_closure, 3)
    saved = copy.deepcopy(proxied.state_dict())
    assert saved["param_groups"][0]["sam_step"] == 3
    again = SAM(BASES["adamw"](model.parameters()), rho=0.3, model=model, cadence=steppe.Periodic(2))
    proxy(again).load_state_dict(saved)
    assert (again.rho, again._engine.steps) == (0.1, 3)
    torch.testing.assert_close(again.state_dict(), saved)


@every_proxy
def test_c30_warnings_are_given_once_for_both(proxy):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    proxied = proxy(optimizer)
    w.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="plain step"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        proxied.step()


def test_c30_attribute_that_reset_assigns_is_shared():
    class Counting(steppe.methods._base.OwnStepMethod):
        """A method of a user, with something that lasts from its passes to its step."""

        hyperparameters = ("factor",)

        def __init__(self, *args, **kwargs):
            self.factor = 2
            super().__init__(*args, **kwargs)

        def reset(self):
            self.count = 0

        def step_passes(self, *, accumulate):
            self.count += self.factor
            yield from self.sam_passes(accumulate=accumulate)

        def step_base(self):
            self.seen = self.count
            return self.step_base_once()

    optimizers = [Counting(torch.optim.SGD([parameter(1.0)], lr=0.1), rho=0.1) for _ in range(2)]
    for optimizer in optimizers:
        proxied = LooksUp(optimizer)
        (w,) = optimizer.param_groups[0]["params"]
        for _ in range(2):
            for sam_pass in proxied.passes():
                with sam_pass:
                    w.square().sum().backward()
            proxied.step()
        proxied.factor = 5
        assert (optimizer.seen, optimizer.factor, copy.deepcopy(optimizer).count) == (4, 5, 0)
