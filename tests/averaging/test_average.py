"""What can be done with an average: in the model, in a checkpoint, of any model."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured

from averaged_training import interrupted, sam, sgd, steps
from steppe.averaging import EMA, SWA
from support import (
    batch,
    bits,
    by_closure,
    by_passes,
    model_bits,
    net,
    parameter,
    plain,
    saved_and_loaded,
)

# The averaged weights in the model.


def test_applied_gives_the_model_the_average_and_restores_it_to_the_bit():
    model = net()
    optimizer = sam(model)
    averaged = EMA(model, optimizer, 0.9)
    list(steps(model, optimizer, by_passes, range(3)))
    before, average = model_bits(model), model_bits(averaged.module)
    storage = [p.data_ptr() for p in model.parameters()]
    with averaged.applied() as applied:
        assert applied is model
        assert model_bits(model) == average != before
        assert [p.data_ptr() for p in model.parameters()] == storage
    assert model_bits(model) == before
    with pytest.raises(ZeroDivisionError), averaged.applied():
        model.double()
        raise ZeroDivisionError
    assert model_bits(model.float()) == before
    assert model_bits(averaged.module) == average


def test_training_within_applied_raises_and_the_step_is_not_taken():
    model = net()
    optimizer = sam(model)
    averaged = SWA(model, optimizer)
    list(steps(model, optimizer, by_passes, range(2)))
    before = model_bits(model)
    with averaged.applied():
        for call in (averaged.update_parameters, lambda: averaged.applied().__enter__()):
            with pytest.raises(RuntimeError, match=r"within applied\(\)"):
                call()
        with pytest.raises(RuntimeError, match=r"step\(\) was called within applied\(\)"):
            list(steps(model, optimizer, by_closure, range(1)))
    assert model_bits(model) == before
    assert int(averaged.n_steps) == 2
    list(steps(model, optimizer, by_closure, range(1)))
    assert int(averaged.n_steps) == 3


def test_other_averages_do_not_take_applied_weights_for_those_of_the_model():
    model = net()
    optimizer = sgd(model)
    averaged, other, of_part = SWA(model, optimizer), EMA(model), SWA(model.layers[0])
    list(steps(model, optimizer, plain, range(2)))
    with averaged.applied():
        for call in (other.update_parameters, of_part.update_parameters):
            with pytest.raises(RuntimeError, match=r"update_parameters\(\) was called within applied\(\)"):
                call()
        with pytest.raises(RuntimeError, match=r"EMA was called within applied\(\)"):
            EMA(model, optimizer)
        with other.applied():
            assert model_bits(model) == model_bits(other.module)
        assert model_bits(model) == model_bits(averaged.module)
        SWA(net()).update_parameters()  # of another model
    other.update_parameters()


def test_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the optimizer of this EMA has no parameter of its model"):
        EMA(net(), sgd(net()))
    model = net()
    EMA(model, sgd(model.layers[0]))  # a part of it
    EMA(model.layers[0], sgd(model))


def test_interrupt_at_any_line_within_applied_restores_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    for scale in (1.0, 2.0):
        plain(optimizer, lambda scale=scale: model(scale * torch.eye(2)).square().sum() + model[0].weight.sum())
    before = model_bits(model)

    def evaluate():
        with averaged.applied():
            assert model_bits(model) != before

    lines = interrupted(evaluate, None)
    for at in range(lines):
        interrupted(evaluate, at)
        assert model_bits(model) == before, at
    assert lines > 50
    assert not averaged.is_applied
    evaluate()


def test_call_runs_the_averaged_module():
    model = net()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    list(steps(model, optimizer, plain, range(2)))
    averaged.eval()
    model.eval()
    x, _ = batch(9)
    assert bits([averaged(x)]) == bits([averaged.module(x)]) != bits([model(x)])
    with averaged.applied():
        assert bits([model(x)]) == bits([averaged(x)])


# Checkpoints and copies.


@pytest.mark.parametrize("make", [EMA, lambda m, o: SWA(m, o, start=2, every=2)], ids=["ema", "swa"])
def test_checkpoint_resumes_to_the_same_bits(make):
    def parts(seed):
        model = net(seed)
        optimizer = sam(model)
        return model, optimizer, make(model, optimizer)

    whole = parts(0)
    torch.manual_seed(1)
    list(steps(whole[0], whole[1], by_passes, range(7)))
    first = parts(0)
    torch.manual_seed(1)
    list(steps(first[0], first[1], by_passes, range(3)))
    generator = torch.get_rng_state()
    resumed = parts(5)
    for part, state in zip(resumed, saved_and_loaded([part.state_dict() for part in first]), strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(generator)
    list(steps(resumed[0], resumed[1], by_passes, range(3, 7)))
    assert model_bits(resumed[2]) == model_bits(whole[2])
    assert int(resumed[2].n_steps) == 7


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda three: pickle.loads(pickle.dumps(three))], ids=["deep", "file"]
)
def test_copy_with_model_and_optimizer_averages_on(copied):
    model = net(dropout=0.0)
    optimizer = sam(model)
    three = (model, optimizer, EMA(model, optimizer))
    list(steps(model, optimizer, by_passes, range(2)))
    twins = copied(three)
    list(steps(model, optimizer, by_passes, range(2, 4)))
    list(steps(twins[0], twins[1], by_passes, range(2, 4)))
    assert model_bits(twins[2]) == model_bits(three[2])
    assert int(twins[2].n_steps) == 4


def test_discarded_average_is_updated_no_more():
    model = net()
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    alive = weakref.ref(averaged)
    del averaged
    gc.collect()
    assert alive() is None
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


# Models.


def test_compiled_model_is_averaged_without_recompilation_and_its_copy_is_not_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = nn.Linear(2, 1)
    compiled = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    averaged = SWA(compiled, optimizer)
    for _ in range(2):
        plain(optimizer, lambda: compiled(torch.ones(3, 2)).square().mean())
        last = compiled(torch.ones(3, 2))
        with averaged.applied():
            output = compiled(torch.ones(3, 2))
            torch.testing.assert_close(output, averaged(torch.ones(3, 2)))
    assert len(graphs) == 1
    assert not torch.equal(output, last)
    assert type(averaged.module) is nn.Linear
    assert list(averaged.module.state_dict()) == ["weight", "bias"]


def test_average_is_not_updated_inside_of_a_compiled_step():
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).square().mean().backward()
        step()
        seen.append(model.weight.detach().clone())
    assert int(averaged.n_averaged) == 3
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))


def test_models_that_cannot_be_copied_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="run one forward before"):
        SWA(nn.LazyLinear(2))
    model = nn.Sequential(nn.Linear(2, 2))
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    with pytest.raises(ValueError, match="the forward of '0' was replaced by a function that holds the model itself"):
        SWA(model)
    model[0].forward = lambda x: x  # holds nothing
    SWA(model)


def test_changed_model_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    averaged = SWA(model)
    model.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model was changed after the average was made"):
        averaged.update_parameters()


def test_average_without_an_optimizer_is_updated_by_hand_also_from_another_model():
    model, other = nn.ParameterList([parameter(1.0)]), nn.ParameterList([parameter(4.0)])
    averaged = SWA(model)
    averaged.update_parameters()
    averaged.update_parameters(other)
    assert averaged.module[0].item() == 2.5


def test_counters_stay_on_the_host_when_the_average_moves():
    averaged = SWA(nn.Linear(2, 1)).to("meta")
    assert averaged.module.weight.device.type == "meta"
    assert averaged.n_averaged.device.type == averaged.n_steps.device.type == "cpu"


def test_model_and_optimizer_are_no_part_of_the_average():
    model = net()
    averaged = EMA(model, sgd(model))
    assert len(list(averaged.parameters())) == len(list(model.parameters()))
    assert {name.partition(".")[0] for name in averaged.state_dict()} == {"module", "n_averaged", "n_steps", "frozen"}


@pytest.mark.parametrize("average", [EMA, SWA])
def test_average_made_or_updated_in_inference_mode_is_updated_and_loaded_outside_of_it(average):
    results = []
    for inference in (True, False):
        model = net(dropout=0.0)
        optimizer = sam(model)
        with torch.inference_mode(inference):
            averaged = average(model, optimizer)
        list(steps(model, optimizer, by_closure, range(3)))
        with torch.inference_mode(inference):
            averaged.update_parameters()
        averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
        list(steps(model, optimizer, by_closure, range(3, 5)))
        assert not any(t.is_inference() for t in (*averaged.parameters(), *averaged.buffers()))
        results.append(model_bits(averaged))
    assert results[0] == results[1]


class KeepsOutputs(nn.Linear):
    """A layer that keeps its last outputs, with their graph."""

    def forward(self, x):
        self.last = [super().forward(x)]
        return self.last[0]


def weight_normed():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(3, 2))


@pytest.mark.parametrize(
    "layer",
    [
        weight_normed,
        lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 2)),
        lambda: random_unstructured(nn.Linear(3, 2), "weight", 0.5),
        lambda: KeepsOutputs(3, 2),
    ],
    ids=["weight_norm", "spectral_norm", "pruning", "outputs"],
)
def test_models_whose_attributes_have_a_graph_are_averaged(layer):
    torch.manual_seed(0)
    model, x = nn.Sequential(layer()), torch.randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)
    averaged = EMA(model, optimizer, 0.5, warmup=False)
    expected = None
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        expected = now if expected is None else [a + 0.5 * (w - a) for a, w in zip(expected, now, strict=True)]
    for p, a in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), a)
    model.eval(), averaged.eval()
    with averaged.applied():
        outputs = model(x)
    torch.testing.assert_close(averaged(x), outputs, rtol=0, atol=0)
