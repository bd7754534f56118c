"""All measures at once: each is there, is what it is called, and is blind to what its family is blind to."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_hessian, objective, relu_net, rescaled, samples, tanh_net
from torch import nn

from steppe.flatness import (
    FAMILIES,
    Budget,
    Flatness,
    Measure,
    Objective,
    average_sharpness,
    m_sharpness,
    measure,
    normalized_logits,
    sharpness,
)

SMALL = Budget(
    m=5, steps=4, restarts=2, pairs=4, top=2, tol=1e-6, probes=4, density_probes=2, density_steps=8, points=3
)


def measured(net, budget=SMALL, **options):
    x, y = samples()
    normalized = Objective(net, (x, y), loss=normalized_logits(F.cross_entropy), **options)
    return measure(objective(net, (x, y), **options), budget, normalized=normalized)


def test_every_name_is_measured_and_no_other():
    found = measured(relu_net())
    assert set(found.measures) == {name for family in FAMILIES.values() for name in family.measures}
    assert all(math.isfinite(m.value) for m in found.measures.values())
    plain = measure(objective(relu_net()), SMALL)
    assert set(plain.measures) == set(found.measures) - set(FAMILIES["normalized"].measures)
    assert {k: v for k, v in found.measures.items() if k in plain.measures} == plain.measures


def test_each_is_what_it_is_called():
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
    climb = {"steps": 4, "restarts": 2}
    assert values["sharpness"] == sharpness(objective(net), 0.05, **climb).value
    assert values["adaptive_sharpness"] == sharpness(objective(net), 0.5, adaptive=True, **climb).value
    assert values["m_sharpness"] == m_sharpness(objective(net), 0.05, 5, **climb).value > values["sharpness"]
    average = average_sharpness(objective(net), 0.005, pairs=4)
    assert found.measures["average_sharpness"] == Measure(average.value, average.error)
    average = average_sharpness(objective(net), 0.05, pairs=4, adaptive=True)
    assert found.measures["adaptive_average_sharpness"] == Measure(average.value, average.error)


def test_average_sharpness_is_the_trace_where_the_loss_is_smooth():
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


def test_rescaling_changes_the_raw_family_and_not_the_adaptive_one():
    plain, other = measured(relu_net()).measures, measured(rescaled(relu_net(), 4.0)).measures
    for name in FAMILIES["adaptive"].measures:
        assert other[name].value == pytest.approx(plain[name].value, rel=1e-6), name
    for name in FAMILIES["raw"].measures:
        assert other[name].value != pytest.approx(plain[name].value, rel=0.2), name
    assert other["normalized_adaptive_sharpness"].value == pytest.approx(
        plain["normalized_adaptive_sharpness"].value, rel=1e-6
    )
    assert other["loss"].value == pytest.approx(plain["loss"].value, rel=1e-12)


def test_a_network_that_is_surer_of_itself_is_no_flatter_by_normalized_logits():
    sure = tanh_net()
    with torch.no_grad():
        sure[-1].weight.mul_(3.0)
        sure[-1].bias.mul_(3.0)
    # a displacement relative to the weights turns both networks' logits in the same way
    plain, other = measured(tanh_net()).measures, measured(sure).measures
    name = "normalized_adaptive_sharpness"
    assert other[name].value == pytest.approx(plain[name].value, rel=1e-6)
    assert other["adaptive_sharpness"].value != pytest.approx(plain["adaptive_sharpness"].value, rel=0.2)


def test_normalized_logits_are_centerd_and_of_length_one():
    seen = []
    normalized_logits(lambda f, y: seen.append(f))(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]), None)
    expected = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]) / 14**0.5
    torch.testing.assert_close(seen[0], expected)


def test_it_is_deterministic_and_the_seed_decides():
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


def test_settings_say_what_the_numbers_depend_on():
    found = measured(relu_net(), batch_norm="train", batch_size=10)
    assert dict(found.settings) == {
        **{"samples": 20, "batch_norm": "train", "parameters": 42, "dtype": "float64"},
        **dataclasses.asdict(SMALL),
    }


def test_landscapes_are_through_the_solution():
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


def test_a_network_without_a_linear_layer_has_no_relative_flatness():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten()).double()
    x, y = samples()
    found = measure(objective(net, (x[:, None], y)), SMALL)
    assert "relative_flatness" not in found.measures


def same(a: Flatness, b: Flatness) -> None:
    assert dict(a.settings) == dict(b.settings)
    assert a.seconds == pytest.approx(b.seconds, abs=0.1)
    for mine, theirs in (
        (a.eigenvalues, b.eigenvalues),
        (a.residuals, b.residuals),
        (a.density.nodes, b.density.nodes),
        (a.density.weights, b.density.weights),
    ):
        assert torch.equal(mine, theirs)
    for mine, theirs in ((a.landscape, b.landscape), (a.eigen_landscape, b.eigen_landscape)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine.losses, theirs.losses, rtol=0, atol=0, equal_nan=True)
            assert mine.what == theirs.what
            assert mine.center == pytest.approx(theirs.center, rel=1e-6)


@pytest.mark.parametrize("points", [0, 3])
def test_json_and_back(points):
    found = measured(relu_net(), dataclasses.replace(SMALL, points=points))
    back = Flatness.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert back.measures == found.measures
    same(found, back)


def test_what_is_not_finite_is_written_as_null():
    found = measured(relu_net())
    assert found.landscape is not None
    found.landscape.losses[0, 0] = math.inf
    measures = {
        "sharpness": Measure(math.inf, note="x"),
        "trace": Measure(math.nan),
        "m_sharpness": Measure(1.0, math.nan),
    }
    odd = dataclasses.replace(found, measures=measures)
    written = json.loads(json.dumps(odd.to_json(), allow_nan=False))
    assert written["measures"]["sharpness"] == {"value": None, "error": None, "note": "x"}
    assert written["landscape"]["losses"][0][0] is None
    back = Flatness.from_json(written)
    assert math.isnan(back.measures["sharpness"].value)
    assert back.measures["m_sharpness"] == Measure(1.0, None)
    assert back.landscape is not None
    assert math.isnan(back.landscape.losses[0, 0])
    assert json.dumps(back.to_json()) == json.dumps(odd.to_json())


@pytest.mark.parametrize("written", [{}, {"format": "steppe flatness, version 0"}])
def test_another_format_is_refused(written):
    with pytest.raises(ValueError, match="its format is"):
        Flatness.from_json(written)


def test_a_loss_that_is_not_finite_is_refused():
    net = relu_net()
    with torch.no_grad():
        net[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="at the weights themselves is nan"):
        measure(objective(net), SMALL)


def test_progress_says_what_is_measured():
    told = []
    measure(objective(relu_net(), progress=lambda what, passes: told.append(what)), SMALL)
    assert {
        "sharpness",
        "largest eigenvalues",
        "smallest eigenvalue",
        "traces",
        "spectral density",
        "landscape",
    } <= set(told)
