"""Contract C9 and C13: arguments of the constructor, in the instance form and in the class form."""

import pytest
import torch

from steppe import SAM
from support import by_closure, by_passes, model_bits, net, parameter, train


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
