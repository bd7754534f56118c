"""Contract C2 and C3: checkpoints and copies of SAM take the identical next step."""

import copy
import functools
import pickle
import warnings

import pytest
import torch

import steppe
from checks import build_with_memory, resumes
from steppe import SAM
from support import BASES, DRIVES, bits, by_closure, every_base, every_drive, model_bits, net, parameter, plain, train


@every_drive
@every_base
def test_c2_checkpoint_resumes_bit_for_bit(base, drive):
    resumes(functools.partial(build_with_memory, base), drive, after=3)


@every_base
def test_c2_base_and_sam_load_checkpoints_of_each_other(base):
    model = net()
    optimizer = build_with_memory(base, model)
    train(model, optimizer, by_closure, 3)
    plain_base = BASES[base](model.parameters())
    plain_base.load_state_dict(optimizer.state_dict())  # disable SAM ...
    train(model, plain_base, plain, 1)
    again = SAM(BASES[base](model.parameters()), rho=0.25, model=model)
    again.load_state_dict(plain_base.state_dict())  # ... and enable it again
    train(model, again, by_closure, 1)
    fresh = BASES[base](model.parameters())
    never_wrapped = fresh.state_dict()
    again.load_state_dict(never_wrapped)
    assert again.param_groups[0]["sam_rho"] in (0.1, 0.25), "a checkpoint of the base leaves the radius unchanged"


def test_c2_loading_a_checkpoint_of_the_base_keeps_the_radius_of_each_group():
    a, b = parameter(1.0), parameter(2.0)
    groups = [{"params": [a], "sam_rho": 0.3}, {"params": [b]}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.05)
    bare = torch.optim.SGD([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)]}], lr=0.7)
    optimizer.load_state_dict(bare.state_dict())
    assert [(g["sam_rho"], g["lr"]) for g in optimizer.param_groups] == [(0.3, 0.7), (0.05, 0.7)]


def test_c2_wrapping_a_base_with_a_loaded_sam_checkpoint_resumes_bit_for_bit():
    straight, model = net(dropout=0.0), net(dropout=0.0)
    optimizer = build_with_memory("momentum", straight)
    train(straight, optimizer, by_closure, 6)
    first = build_with_memory("momentum", model)
    train(model, first, by_closure, 3)
    base = BASES["momentum"](model.parameters())
    base.load_state_dict(first.state_dict())
    second = SAM(
        base, rho=0.1, model=model, perturbation=first.perturbation, cadence=first.cadence
    )  # the memory and the step counter are in the state of the base
    train(model, second, by_closure, 3, start=3)
    assert model_bits(model) == model_bits(straight)
    assert all(not str(k).startswith("sam.") for s in base.state.values() for k in s)


def _saved_again(optimizer, model):
    again = build_with_memory("momentum", model)
    again.load_state_dict(optimizer.state_dict())
    return again


@pytest.mark.parametrize(
    "then",
    [lambda optimizer, _: optimizer, _saved_again, lambda optimizer, _: copy.deepcopy(optimizer)],
    ids=["trained", "saved", "copied"],
)
def test_c2_checkpoint_of_sam_that_is_loaded_into_the_base_of_another_is_complete(then):
    straight, model = net(dropout=0.0), net(dropout=0.0)
    first = build_with_memory("momentum", straight)
    train(straight, first, by_closure, 3)
    model.load_state_dict(straight.state_dict())
    second = build_with_memory("momentum", model)
    second.base.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.perturbs_next == first.perturbs_next
    second = build_with_memory("momentum", model)
    second.base.load_state_dict(copy.deepcopy(first.state_dict()))
    second = then(second, model)
    train(straight, first, by_closure, 3, start=3)
    train(second.model, second, by_closure, 3, start=3)
    assert model_bits(second.model) == model_bits(straight)


def test_c2_torch_distributed_checkpoint_keeps_memory_and_step_counter(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    straight = net(dropout=0.0)
    optimizer = build_with_memory("momentum", straight)
    train(straight, optimizer, by_closure, 3)
    weights = copy.deepcopy(straight.state_dict())
    saved = {"optimizer": get_optimizer_state_dict(straight, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns that there is one process only
        dcp.save(saved, checkpoint_id=tmp_path)
        train(straight, optimizer, by_closure, 3, start=3)
        model = net(seed=5, dropout=0.0)
        model.load_state_dict(weights)
        fresh = build_with_memory("momentum", model)
        train(model, fresh, by_closure, 1)  # so that there is a state to load into
        model.load_state_dict(weights)
        target = {"optimizer": get_optimizer_state_dict(model, fresh)}
        dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, fresh, target["optimizer"])
    train(model, fresh, by_closure, 3, start=3)
    assert model_bits(model) == model_bits(straight)


def test_c2_distributed_checkpoint_of_the_base_loads_into_sam(tmp_path):
    """SAM is enabled in the middle of a run."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = net(dropout=0.0)
    base = BASES["momentum"](model.parameters())
    train(model, base, plain, 3)
    other = net(5, dropout=0.0)
    optimizer = SAM(BASES["momentum"](other.parameters()), rho=0.1, model=other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp warns that there is one process only
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, base), strict=True)), checkpoint_id=tmp_path)
        parts = dict(zip(("model", "optimizer"), get_state_dict(other, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(other, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    train(model, SAM(base, rho=0.1, model=model), by_closure, 3, start=3)
    train(other, optimizer, by_closure, 3, start=3)
    assert model_bits(other) == model_bits(model)


def test_c2_get_optimizer_state_dict_neither_warns_nor_counts_as_a_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = SAM(BASES["sgd"](model.parameters()), model=model)
    before = bits(model.parameters())
    get_optimizer_state_dict(model, optimizer)  # steps with lr = 0 to have a state; warnings are errors here
    assert optimizer._engine.steps == 0
    assert bits(model.parameters()) == before


class DropsUnknownState(torch.optim.SGD):
    """A base that drops unknown state of a checkpoint, as wrappers of another optimizer do."""

    def load_state_dict(self, state_dict):
        state = {i: {k: v for k, v in own.items() if k == "momentum_buffer"} for i, own in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state})


@pytest.mark.parametrize("rule", [steppe.Friendly(), steppe.VarianceSuppressed()], ids=str)
def test_c2_rule_memory_loads_even_if_the_base_drops_unknown_state(rule):
    def make(seed):
        model = net(seed, dropout=0.0)
        return model, SAM(
            DropsUnknownState(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=model, perturbation=rule
        )

    model, optimizer = make(0)
    train(model, optimizer, DRIVES["passes"], 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, DRIVES["passes"], 3, start=3)
    other, other_optimizer = make(7)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, DRIVES["passes"], 3, start=3)
    assert model_bits(other) == model_bits(model)


def test_c2_state_dict_hooks_fire():
    optimizer = SAM(torch.optim.SGD([parameter(1.0)], lr=0.1))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append(s.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", 1, "post"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@every_base
def test_c3_copy_takes_the_identical_next_step(base, how):
    model = net(dropout=0.0)
    optimizer = build_with_memory(base, model)
    train(model, optimizer, by_closure, 3)
    model2, optimizer2 = how((model, optimizer))
    assert type(optimizer2.base) is type(optimizer.base)
    assert next(model2.parameters()) is optimizer2.param_groups[0]["params"][0]
    train(model, optimizer, by_closure, 3, start=3)
    assert model_bits(model2) != model_bits(model)
    train(model2, optimizer2, by_closure, 3, start=3)
    assert model_bits(model2) == model_bits(model)


class Agent(torch.nn.Module):
    """A module that holds its optimizer."""

    def __init__(self, whole):
        super().__init__()
        self.net = net(dropout=0.0)
        models = {"itself": self, "in a list": [self.net, self]}
        self.optimizer = build_with_memory("momentum", self.net)
        self.optimizer.model = models[whole]


@pytest.mark.parametrize("whole", ["itself", "in a list"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
@every_drive
def test_c3_copy_of_a_module_that_holds_its_optimizer_takes_the_identical_next_steps(drive, how, whole):
    agent = Agent(whole)
    train(agent.net, agent.optimizer, DRIVES[drive], 2)
    twin = how(agent)
    train(agent.net, agent.optimizer, DRIVES[drive], 3, start=2)
    train(twin.net, twin.optimizer, DRIVES[drive], 3, start=2)
    assert model_bits(twin.net) == model_bits(agent.net)
