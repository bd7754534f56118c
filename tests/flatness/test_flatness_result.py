"""Flatness as JSON: all values survive, and those that are not finite become null."""

import dataclasses
import json
import math

import pytest
import torch
from flatness_measured import SMALL, measured
from known_hessians import relu_net

from steppe.flatness import Flatness, Measure


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
            assert mine.center_loss == pytest.approx(theirs.center_loss, rel=1e-6)


@pytest.mark.parametrize("points", [0, 3])
def test_json_round_trip(points):
    found = measured(relu_net(), dataclasses.replace(SMALL, points=points))
    back = Flatness.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert back.measures == found.measures
    same(found, back)


def test_nonfinite_values_are_written_as_null():
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
def test_another_format_raises(written):
    with pytest.raises(ValueError, match="the format is"):
        Flatness.from_json(written)
