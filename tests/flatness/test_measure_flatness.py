"""measure(): each measure equals the function of its name and has the invariances of its family."""

import dataclasses
import math

import pytest
import torch
from flatness_measured import SMALL, measured
from known_hessians import dense_hessian, objective, relu_net, rescaled, samples, tanh_net
from torch import nn

from steppe.flatness import (
    FAMILIES,
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Measure,
    Objective,
    Scaled,
    adam_preconditioner,
    after_rounding,
    average_sharpness,
    batch_sharpness,
    by_layer,
    eigenvalues,
    m_sharpness,
    measure,
    sharpness,
)


def test_measures_are_exactly_those_of_the_families():
    found = measured(relu_net())
    named = {name for family in FAMILIES.values() for name in family.measures}
    assert set(found.measures) == named - {"adam_sharpness"}  # which needs the optimizer
    assert all(math.isfinite(m.value) for m in found.measures.values())
    plain = measure(objective(relu_net()), SMALL)
    assert set(plain.measures) == set(found.measures) - set(FAMILIES["normalized"].measures)
    assert {k: v for k, v in found.measures.items() if k in plain.measures} == plain.measures


def test_further_measures_are_those_of_their_functions_and_only_where_they_are_named():
    net = tanh_net()
    found, own = measured(net), objective(net)
    exact = {
        "batch_sharpness": batch_sharpness(own, SMALL.m).value,
        "rounding": after_rounding(own, 4).increase,
        "gauss_newton": float(eigenvalues(GaussNewton(own), tol=1e-9).values[0]),
        "fisher": float(eigenvalues(EmpiricalFisher(own), tol=1e-9).values[0]),
        "gauss_newton_trace": float(GaussNewton(own)(torch.eye(own.n, dtype=own.dtype)).trace()),
        "fisher_trace": float(EmpiricalFisher(own)(torch.eye(own.n, dtype=own.dtype)).trace()),
    }
    for name, value in exact.items():
        error = 4 * (found.measures[name].error or 0) if name.endswith("trace") else 0
        assert found.measures[name].value == pytest.approx(value, rel=1e-6, abs=error), name
    few = measured(net, dataclasses.replace(SMALL, further="rounding"))
    assert set(few.measures) & set(FAMILIES["further"].measures) == {"rounding"}
    with pytest.raises(ValueError, match="there is no measure nothing; choose from batch_sharpness"):
        dataclasses.replace(SMALL, further="rounding,nothing")


def trained_by_adam(net):
    """Return Adam after two steps of the network on its samples."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
    x, y = samples()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        scheduler.step()
    return optimizer


def test_sharpness_of_adam_and_curvature_by_layer_are_those_of_their_functions():
    net = tanh_net()
    optimizer, own = trained_by_adam(net), objective(net)
    found = measure(own, dataclasses.replace(SMALL, further="adam_sharpness,by_layer"), optimizer=optimizer).measures
    preconditioner = adam_preconditioner(optimizer, own)
    value = float(eigenvalues(Scaled(Hessian(own), preconditioner.rsqrt()), tol=1e-9).values[0])
    assert found["adam_sharpness"].value == pytest.approx(value, rel=1e-6)
    assert found["adam_sharpness"].note == "edge of stability 3.8e+03 at lr 0.01"  # that of the schedule's end is 0
    table = by_layer(own, probes=SMALL.probes, tol=SMALL.tol)
    for row in table:
        assert found[f"lambda_max/{row.layer}"] == row.lambda_max
        assert found[f"trace/{row.layer}"] == Measure(row.trace.value, row.trace.error)
        assert found[f"relative_flatness/{row.layer}"].value == row.relative_flatness.value
    assert len([name for name in found if "/" in name]) == 3 * len(table) > 3


@pytest.mark.parametrize(
    ("further", "message"), [("adam_sharpness", "or pass optimizer="), ("gauss_newton", "needs the model's outputs")]
)
def test_measure_that_is_not_possible_raises_before_the_first_pass(further, message):
    own = Objective(
        tanh_net(), samples(), evaluate=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    )
    with pytest.raises((TypeError, ValueError), match=message):
        measure(own, dataclasses.replace(SMALL, further=further))
    assert own.passes == 0


def test_model_without_second_derivatives_raises_before_the_first_pass():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    own = Objective(tanh_net(), samples(), loss=lambda z, y: nn.functional.cross_entropy(Once.apply(z), y))
    with pytest.raises(RuntimeError, match="no second derivative"):
        measure(own, SMALL)
    assert own.passes == 0


def test_empirical_fisher_of_a_model_on_tokens_has_a_gradient_for_each():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()

        def forward(self, tokens, labels):
            logits = self.layers(tokens)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    torch.manual_seed(0)
    own = Objective(Model(), {"tokens": torch.randint(5, (6, 4)), "labels": torch.randint(5, (6, 4))})
    found = measure(own, dataclasses.replace(SMALL, further="fisher")).measures["fisher"].value
    assert found == pytest.approx(float(eigenvalues(EmpiricalFisher(own, per="token"), tol=1e-9).values[0]), rel=1e-6)


def test_each_measure_equals_its_definition():
    net, (x, y) = tanh_net(), samples()
    found, whole = measured(net), dense_hessian(net, x, y)
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    own, scaled = torch.linalg.eigvalsh(whole), torch.linalg.eigvalsh(w.abs()[:, None] * whole * w.abs())
    values = {name: m.value for name, m in found.measures.items()}
    exact = {"lambda_max": own[-1], "lambda_min": own[0], "adaptive_lambda_max": scaled[-1], "weight_norm": w.norm()}
    for name, value in exact.items():
        assert values[name] == pytest.approx(float(value), rel=1e-6), name
    assert found.eigenvalues.tolist() == pytest.approx(own.flip(0)[:2].tolist(), rel=1e-6)
    for name, value in (("trace", own.sum()), ("adaptive_trace", scaled.sum())):
        assert abs(values[name] - float(value)) < 4 * (found.measures[name].error or 0)
    loss, gradient = objective(net).gradient()
    assert values["loss"] == float(loss)
    assert values["gradient_norm"] == pytest.approx(float(gradient.norm()))
    assert values["first_order"] == pytest.approx(SMALL.rho * float(gradient.norm()))
    ascent = {"ascent_steps": 4, "restarts": 2}
    assert values["sharpness"] == sharpness(objective(net), 0.05, **ascent).value
    assert values["adaptive_sharpness"] == sharpness(objective(net), 0.5, adaptive=True, **ascent).value
    assert values["m_sharpness"] == m_sharpness(objective(net), 0.05, 5, **ascent).value > values["sharpness"]
    average = average_sharpness(objective(net), 0.005, pairs=4)
    assert found.measures["average_sharpness"] == Measure(average.value, average.error)
    average = average_sharpness(objective(net), 0.05, pairs=4, adaptive=True)
    assert found.measures["adaptive_average_sharpness"] == Measure(average.value, average.error)


def test_average_sharpness_of_a_smooth_loss_agrees_with_the_trace():
    found = measured(tanh_net(), dataclasses.replace(SMALL, pairs=100, probes=32, sigma=1e-3, adaptive_sigma=1e-3))
    for average, trace in (("average_sharpness", "trace"), ("adaptive_average_sharpness", "adaptive_trace")):
        one, other = found.measures[average], found.measures[trace]
        scale = 1e-3**2 / 2
        assert one.error is not None
        assert other.error is not None
        assert abs(one.value - scale * other.value) < 4 * math.hypot(one.error, scale * other.error)


def test_at_a_small_radius_sharpness_is_first_order():
    found = measured(tanh_net(), dataclasses.replace(SMALL, rho=1e-6)).measures
    assert found["sharpness"].value == pytest.approx(found["first_order"].value, rel=1e-4)


def test_rescaling_changes_the_raw_family_but_not_the_adaptive_one():
    plain, other = measured(relu_net()).measures, measured(rescaled(relu_net(), 4.0)).measures
    for name in FAMILIES["adaptive"].measures:
        assert other[name].value == pytest.approx(plain[name].value, rel=1e-6), name
    for name in FAMILIES["raw"].measures:
        assert other[name].value != pytest.approx(plain[name].value, rel=0.2), name
    assert other["normalized_adaptive_sharpness"].value == pytest.approx(
        plain["normalized_adaptive_sharpness"].value, rel=1e-6
    )
    assert other["loss"].value == pytest.approx(plain["loss"].value, rel=1e-12)


def test_confidence_does_not_change_normalized_adaptive_sharpness():
    confident = tanh_net()
    with torch.no_grad():
        confident[-1].weight.mul_(3.0)
        confident[-1].bias.mul_(3.0)
    # perturbations relative to the weights change the normalized logits of both networks equally
    plain, other = measured(tanh_net()).measures, measured(confident).measures
    name = "normalized_adaptive_sharpness"
    assert other[name].value == pytest.approx(plain[name].value, rel=1e-6)
    assert other["adaptive_sharpness"].value != pytest.approx(plain["adaptive_sharpness"].value, rel=0.2)


def test_measure_is_deterministic_and_depends_on_the_seed():
    found, again = measured(relu_net()), measured(relu_net())
    other = measured(relu_net(), dataclasses.replace(SMALL, seed=1))
    assert found.measures == again.measures
    assert {**found.to_json(), "seconds": 0} == {**again.to_json(), "seconds": 0}
    drawn = ("average_sharpness", "trace", "adaptive_trace", "relative_flatness")
    assert all(found.measures[name] != other.measures[name] for name in drawn)
    assert not torch.equal(found.density.nodes, other.density.nodes)
    assert found.landscape is not None
    assert other.landscape is not None
    assert not torch.equal(found.landscape.losses, other.landscape.losses)


def test_settings_record_what_the_numbers_depend_on():
    found = measured(relu_net(), batch_norm="train", batch_size=10)
    assert dict(found.settings) == {
        **{"samples": 20, "batch_norm": "train", "parameters": 42, "dtype": "float64"},
        **dataclasses.asdict(SMALL),
    }


def test_landscapes_are_centered_at_the_weights():
    found = measured(relu_net())
    for surface, radius in ((found.landscape, SMALL.radius), (found.eigen_landscape, SMALL.eigen_radius)):
        assert surface is not None
        assert surface.axis.tolist() == [-radius, 0.0, radius]
        assert float(surface.losses[1, 1]) == found.measures["loss"].value
    assert found.eigen_landscape is not None
    x, y = samples()
    top = torch.linalg.eigh(dense_hessian(relu_net(), x, y)).eigenvectors[:, -1]
    top = top * top[top.abs().argmax()].sign()  # its largest entry is positive
    there = [float(objective(relu_net()).loss(side * SMALL.eigen_radius * top)) for side in (-1, 1)]
    assert found.eigen_landscape.losses[[0, 2], 1].tolist() == pytest.approx(there, rel=1e-5)
    without = measured(relu_net(), dataclasses.replace(SMALL, points=0))
    assert (without.landscape, without.eigen_landscape) == (None, None)


def test_relative_flatness_is_left_out_without_a_linear_layer():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten()).double()
    x, y = samples()
    found = measure(objective(net, (x[:, None], y)), SMALL)
    assert "relative_flatness" not in found.measures


def test_nonfinite_loss_raises():
    net = relu_net()
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="at the weights themselves is nan"):
        measure(objective(net), SMALL)


def test_progress_receives_the_stages():
    calls = []
    measure(objective(relu_net(), progress=lambda what, passes: calls.append(what)), SMALL)
    assert {
        "sharpness",
        "largest eigenvalues",
        "smallest eigenvalue",
        "traces",
        "spectral density",
        "landscape",
    } <= set(calls)
