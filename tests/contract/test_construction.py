"""Contract C9, C13, C35, C37: arguments of the constructor, in the instance form and in the class form."""

import copy
import inspect

import numpy
import pytest
import torch

import steppe
from steppe import SAM, rho_schedule, variants
from steppe._engine.constructor import Options
from steppe.methods.registry import FUNCTIONS
from support import by_closure, by_passes, model_bits, net, parameter, saved_and_loaded, train


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_c9_negative_or_non_finite_rho_raises(rho):
    w = parameter(1.0)
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        SAM(torch.optim.SGD([w], lr=0.1), rho=rho)
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        SAM([w], torch.optim.SGD, rho=rho, lr=0.1)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    optimizer.param_groups[0]["sam_rho"] = rho
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        by_passes(optimizer, lambda: w.square().sum())


def test_c9_wrong_constructor_arguments_raise():
    w = parameter(1.0)
    sgd = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match="LBFGS cannot be the base"):
        SAM(torch.optim.LBFGS([w]))
    with pytest.raises(TypeError, match="is the class SGD, not an instance"):
        SAM(torch.optim.SGD)
    with pytest.raises(TypeError, match="needs a base optimizer"):
        SAM([w])
    with pytest.raises(TypeError, match="lr: options of the base go to the base"):
        SAM(sgd, lr=0.1)
    with pytest.raises(TypeError, match="rho must be a number"):
        SAM(sgd, torch.optim.SGD)
    with pytest.raises(TypeError, match="makes two passes already"):
        SAM(SAM(sgd))
    with pytest.raises(ValueError, match="empty"):
        SAM([], torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="no parameters"):
        SAM(torch.optim.SGD([{"params": []}], lr=0.1))
    with pytest.raises(TypeError, match="put it into a list"):
        SAM(w, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="holds none of the optimizer's parameters"):
        SAM(sgd, model=net())
    with pytest.raises(ValueError, match="0-dim"):
        SAM(sgd, rho=torch.ones(2))


def test_c9_group_without_radius_raises_with_the_remedy():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = SAM(torch.optim.SGD([a], lr=0.1))
    optimizer.base.add_param_group({"params": [b]})
    with pytest.raises(ValueError, match=r"group 1 has no 'sam_rho'.*add_param_group"):
        by_passes(optimizer, lambda: (a * b).sum())
    optimizer.param_groups[1]["sam_rho"] = 0.1
    by_passes(optimizer, lambda: (a * b).sum())


def test_c13_class_form_equals_instance_form():
    model, twin = net(dropout=0.0), net(dropout=0.0)
    a = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, model=model)
    b = SAM(twin.parameters(), torch.optim.SGD, rho=0.2, model=twin, lr=0.1, momentum=0.9)
    train(model, a, by_closure, 3)
    train(twin, b, by_closure, 3)
    assert model_bits(model) == model_bits(twin)


def test_c13_class_form_takes_groups_and_keywords_of_hugging_face_and_skorch():
    model = net()
    decay, rest = list(model.parameters())[:2], list(model.parameters())[2:]
    groups = [{"params": decay, "weight_decay": 0.1, "rho": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = SAM(groups, base_class=torch.optim.AdamW, rho=0.1, lr=1e-3)
    assert [g["sam_rho"] for g in optimizer.param_groups] == [0.3, 0.1]
    assert "rho" in groups[0], "the caller's groups are unchanged"
    optimizer = SAM(params=net().named_parameters(), base_class=torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.weight"


def test_repr_names_the_rules_and_the_base():
    text = repr(SAM(torch.optim.SGD([parameter(1.0)], lr=0.1)))
    assert "L2()" in text
    assert "Periodic(interval=1)" in text
    assert "SGD" in text


HINTS = {
    "a positional model": (lambda base, m: SAM(base, 0.05, m), "options are given by name: write model=model"),
    "a model in the place of rho": (lambda base, m: SAM(base, m), "rho must be a number.*given by name"),
    "rho twice": (lambda base, m: SAM(base, 0.05, rho=0.1), "got rho twice"),
    "adaptive": (lambda base, m: SAM(base, adaptive=True), r"got adaptive: for ASAM write .*steppe.Adaptive\(\)"),
    "perturb_eps": (lambda base, m: SAM(base, perturb_eps=1e-12), "got perturb_eps: leave it out"),
    "a misspelled option": (lambda base, m: SAM(base, modle=m), "got modle: did you mean model?"),
    "an option of another method": (
        lambda base, m: variants.gsam(base, beta=0.1),
        "steppe.variants.gsam got beta: .*esam",
    ),
    "a misspelled option of a method": (lambda base, m: variants.looksam(base, intervall=2), "did you mean interval?"),
    "the name of another package": (lambda base, m: variants.looksam(base, k=2), r"looksam got k: .*interval=5"),
    "optimizer": (lambda base, m: SAM(optimizer=base), "got optimizer: write base_optimizer="),
    "the classic keyword": (
        lambda base, m: SAM(m.parameters(), base_optimizer=torch.optim.SGD, lr=0.1),
        "base_class= here.*steppe.compat",
    ),
    "a module in the place of params": (
        lambda base, m: SAM(m, torch.optim.SGD, lr=0.1),
        r"write SAM\(model.parameters",
    ),
    "adaptive in the class form": (
        lambda base, m: SAM(m.parameters(), torch.optim.SGD, adaptive=True, lr=0.1),
        "neither SAM nor SGD takes adaptive.*Adaptive",
    ),
    "a positional model in the class form": (
        lambda base, m: SAM(m.parameters(), torch.optim.SGD, 0.05, m, lr=0.1),
        "takes 3 positional arguments, got 4.*: write model=model",
    ),
}


@pytest.mark.parametrize("what", HINTS)
def test_c35_argument_of_another_place_or_package_names_the_remedy(what):
    call, message = HINTS[what]
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=message):
        call(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("rho", [True, torch.tensor(1j), torch.tensor(True), "0.05", None])
def test_c35_rho_of_another_type_raises(rho):
    with pytest.raises(TypeError, match="rho must be a"):
        SAM(torch.optim.SGD([parameter(1.0)], lr=0.1), rho=rho)


@pytest.mark.parametrize("rho", [torch.tensor(-0.1), torch.tensor(float("nan"))])
def test_c35_tensor_that_is_no_radius_raises(rho):
    with pytest.raises(ValueError, match="rho must be finite and at least 0"):
        SAM(torch.optim.SGD([parameter(1.0)], lr=0.1), rho=rho)


def test_c35_rho_may_be_a_scalar_of_numpy():
    w, v = parameter(3.0), parameter(4.0)
    groups = [{"params": [w]}, {"params": [v], "sam_rho": numpy.float64(0.25)}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=numpy.float32(0.5))
    by_closure(optimizer, lambda: (w * v).sum())
    radii = [group["sam_rho"] for group in saved_and_loaded(optimizer.state_dict())["param_groups"]]
    assert radii == [0.5, 0.25]
    assert [type(rho) for rho in radii] == [float, float]
    optimizer.rho = numpy.int64(2)
    assert optimizer.rho == 2.0
    with pytest.raises(TypeError, match="rho must be a number"):
        optimizer.rho = numpy.bool_(True)


def test_c35_rho_of_the_optimizer_is_the_radius():
    w, v = parameter(3.0), parameter(4.0)
    optimizer = SAM(torch.optim.SGD([{"params": [w]}, {"params": [v], "sam_rho": 0.1}], lr=0.0), rho=0.5)
    assert optimizer.rho == 0.5
    assert [group["sam_rho"] for group in optimizer.param_groups] == [0.5, 0.1]
    optimizer.rho = 2.0
    lengths = []
    by_closure(optimizer, lambda: (lengths.append((w - 3.0).square() + (v - 4.0).square()), (w * v).sum())[1])
    assert lengths[1].sqrt().item() == pytest.approx(2.0)
    optimizer.add_param_group({"params": [parameter(1.0)]})
    assert [group["sam_rho"] for group in optimizer.param_groups] == [2.0, 2.0, 2.0]
    schedule = rho_schedule.LinearRho(optimizer, total_steps=2)
    schedule.step()
    assert optimizer.rho == 1.0
    assert copy.deepcopy(optimizer).rho == 1.0
    with pytest.raises(ValueError, match="at least 0"):
        optimizer.rho = -1.0
    assert optimizer.rho == 1.0


def test_c35_model_that_is_assigned_later_is_protected():
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    with pytest.raises(ValueError, match="holds none of the optimizer's parameters"):
        optimizer.model = net()
    with pytest.raises(TypeError, match="model= is a int"):
        optimizer.model = 3
    assert optimizer.model is None
    optimizer.model = [model]
    train(model, optimizer, by_closure, 2)
    assert model.layers[1].num_batches_tracked == 2
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        torch.manual_seed(0)
        train(m, o, by_closure, 1, start=2)
        assert m.layers[1].num_batches_tracked == 3
    assert model_bits(model) == model_bits(twin)


@pytest.mark.parametrize("proxy", [lambda optimizer: optimizer, copy.copy, copy.deepcopy])
def test_c35_options_that_are_assigned_later_take_effect(proxy):
    w = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = proxy(SAM(torch.optim.SGD([w], lr=0.0), rho=1e-3))
    (w,) = optimizer.param_groups[0]["params"]
    drawn, moved = [], []

    def loss():
        drawn.append(torch.rand(()).item())
        moved.append(bool((w != 1).any()))
        return w.square().sum()

    optimizer.stochastic_rounding = True  # rounding to nearest loses all of this perturbation, with a warning
    by_closure(optimizer, loss)
    assert drawn[0] == drawn[1]
    assert moved == [False, True]
    optimizer.replay_rng = False
    by_closure(optimizer, loss)
    assert drawn[2] != drawn[3]


def test_c35_per_rank_that_is_assigned_later_is_checked():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        optimizer.per_rank = True
    with pytest.raises(ValueError, match="whose passes are its own"):
        variants.lookbehind_sam(torch.optim.SGD([w], lr=0.1)).per_rank = True
    assert optimizer.per_rank is False
    by_closure(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(3.0 - 0.1 * 2 * 3.5)


def test_c35_option_that_is_assigned_in_a_step_raises():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    for sam_pass in optimizer.passes():
        with sam_pass, pytest.raises(RuntimeError, match="replay_rng = .*inside a pass"):
            optimizer.replay_rng = False
        break
    assert optimizer.replay_rng is True


@pytest.mark.parametrize(
    "make", [SAM, variants.gam, lambda base: steppe.compat.SAM(base.param_groups, torch.optim.SGD)]
)
@pytest.mark.parametrize("name", ["base", "base_optimizer"])
def test_c35_another_base_is_refused(make, name):
    w = parameter(3.0)
    optimizer = make(torch.optim.SGD([w], lr=0.1))
    base = optimizer.base
    with pytest.raises(AttributeError, match=r"cannot be replaced.*SAM\(base, rho=\.\.\., model=\.\.\.\)"):
        setattr(optimizer, name, torch.optim.Adam([w]))
    assert optimizer.base is optimizer.base_optimizer is base


def test_c37_signature_of_the_optimizer_has_its_options():
    shown = inspect.signature(SAM).parameters
    assert list(shown)[:3] == ["base_optimizer", "rho", "model"]
    assert shown["rho"].default == 0.05
    assert set(Options.__annotations__) <= set(shown)
    assert "args" not in shown
    assert list(inspect.signature(SAM.step).parameters) == ["self", "closure"]


@pytest.mark.parametrize("name", [n for n, f in FUNCTIONS.items() if "options" in f.__code__.co_varnames])
def test_c37_signature_of_each_method_has_the_options_of_sam(name):
    shown = inspect.signature(FUNCTIONS[name]).parameters
    assert set(Options.__annotations__) - {"perturbation", "combination", "cadence"} <= set(shown)
    assert not [p for p in shown.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def test_failed_construction_leaves_the_radii_of_an_earlier_optimizer():
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer = SAM(base, rho=0.3)
    with pytest.raises(TypeError, match="got the class L2"):
        SAM(base, rho=0.1, perturbation=steppe.L2)
    assert [group["sam_rho"] for group in optimizer.param_groups] == [0.3]


def test_sam_on_takes_several_modules():
    parts = [torch.nn.LayerNorm(2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))]
    base = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.1)
    assert len(steppe.variants.sam_on(base, rho=0.1, model=parts).perturbation.parameters) == 4


@pytest.mark.parametrize("lazily", [torch.Tensor.conj, lambda z: z.conj().imag], ids=["conjugated", "negated"])
def test_parameter_that_is_conjugated_or_negated_where_it_is_read_is_refused(lazily):
    p = torch.nn.Parameter(lazily(torch.tensor([1.0 + 2.0j])))
    with pytest.raises(ValueError, match=r"resolve_conj\(\)\.resolve_neg\(\)\.clone\(\)"):
        SAM(torch.optim.SGD([p], lr=0.1))
    SAM(torch.optim.SGD([torch.nn.Parameter(p.detach().resolve_conj().resolve_neg().clone())], lr=0.1))
