"""The pictures of flatness show what was measured: the axes the right way round, holes as holes, errors as bands."""

import math

import numpy as np
import pytest
import torch
from matplotlib.contour import QuadContourSet

from steppe.experiments.figures.drawing import Drawing
from steppe.experiments.figures.flatness import draw
from steppe.experiments.figures.landscapes import plot_landscapes, plot_lines, plot_profiles
from steppe.experiments.figures.spectra import mean_density
from steppe.experiments.figures.style import Style
from steppe.flatness import Density, Flatness, Landscape, Measure

AXIS = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)


def flatness(shift=0.0, surface=None):
    nodes = torch.tensor([[0.0, 1.0], [0.5, 2.0]], dtype=torch.float64) + shift
    density = Density(nodes, torch.tensor([[0.9, 0.1], [0.8, 0.2]], dtype=torch.float64), 100)
    tops = torch.tensor([2.0 + shift], dtype=torch.float64)
    return Flatness({}, {"loss": Measure(0.1)}, tops, tops * 0, density, surface, None, 1.0)


def along_the_first(hole=False):
    losses = (1.0 + AXIS.square())[:, None].expand(9, 9).clone()
    if hole:
        losses[0, 0] = math.nan
    return Landscape(AXIS, losses, 1.0, False, "test")


def contours(figure):
    axes = figure.axes[0]
    return [c for c in axes.get_children() if isinstance(c, QuadContourSet) and not c.filled]


def test_first_direction_is_the_horizontal_axis():
    (lines,) = contours(plot_landscapes({"SGD": along_the_first()}, "landscape", "described"))
    paths = [p.vertices for p in lines.get_paths() if len(p.vertices) > 2]
    assert paths
    for path in lines.allsegs:
        for segment in filter(len, path):
            assert np.ptp(segment[:, 0]) < 1e-9  # where the loss depends on the first direction only, they are upright


def test_methods_share_one_scale():
    higher = Landscape(AXIS, 100 * along_the_first().losses, 100.0, False, "test")
    figure = plot_landscapes({"SGD": along_the_first(), "SAM": higher}, "landscape", "described")
    filled = [c for axes in figure.axes for c in axes.get_children() if isinstance(c, QuadContourSet) and c.filled]
    assert len(filled) == 2
    assert np.array_equal(filled[0].levels, filled[1].levels)
    assert filled[0].levels[0] <= 1.0
    assert filled[0].levels[-1] >= 200.0


def test_contours_leave_a_hole_where_the_loss_is_nan():
    (whole,) = contours(plot_landscapes({"SGD": along_the_first()}, "landscape", "described"))
    (holed,) = contours(plot_landscapes({"SGD": along_the_first(hole=True)}, "landscape", "described"))

    def lowest(lines):
        return min(
            segment[:, 1].min() for path in lines.allsegs for segment in path if len(segment) and segment[0, 0] < -0.76
        )

    assert lowest(whole) == -1.0
    assert lowest(holed) > -1.0


def test_density_is_the_mean_of_the_runs_with_its_standard_error():
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    runs = [flatness(s).density for s in (0.0, 0.1, 0.3)]
    values = torch.stack([run.smoothed(x, 0.2)[0] for run in runs])
    mean, spread = mean_density(runs, x, 0.2)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(spread, values.std(0) / math.sqrt(3))
    alone = mean_density(runs[:1], x, 0.2)
    torch.testing.assert_close(alone, runs[0].smoothed(x, 0.2))


@pytest.mark.slow
def test_files_are_those_of_the_measurements_and_the_same_each_time(tmp_path):
    groups = {"SGD": [], "SAM": [flatness(surface=along_the_first())]}
    first = {file.name: file.read_bytes() for file in draw(groups, tmp_path / "a", "described")}
    assert set(first) == {f"{stem}.{suffix}" for stem in ("spectra", "landscapes") for suffix in ("png", "svg")}
    assert first == {file.name: file.read_bytes() for file in draw(groups, tmp_path / "b", "described")}
    assert draw({"SGD": [], "SAM": []}, tmp_path / "c", "described") == []


def test_lines_with_missing_losses_are_saved(tmp_path):
    line = {
        "a": "sgd",
        "b": "sam",
        "seed": 0,
        "axis": [0.0, 0.5, 1.0],
        "train": [1.0, None, 2.0],
        "test": [1.0, 1.0, 2.0],
    }
    styles = {"sgd": Style("SGD", "-", "red"), "sam": Style("SAM", "-", "blue")}
    files = Drawing("lines", lambda: plot_lines([line | {"reestimated": True}], styles, "described")).save(tmp_path)
    assert [file.name for file in files] == ["lines.png", "lines.svg"]


def test_profile_is_the_middle_of_the_landscape():
    generator = torch.Generator().manual_seed(0)
    surface = Landscape(AXIS, torch.rand(9, 9, generator=generator, dtype=torch.float64), 1.0, False, "test")
    figure = plot_profiles({"SGD": [flatness(surface=surface)]}, {"SGD": Style("SGD", "-", "#D55E00")}, "described")
    for axes in figure.axes:
        x, y = axes.lines[0].get_data()
        assert list(x) == AXIS.tolist()
        assert list(y) == surface.losses[:, 4].tolist()


def test_profile_has_a_gap_where_one_run_is_nan():
    runs = [flatness(surface=Landscape(AXIS, torch.ones(9, 9), 1.0, False, "test")) for _ in range(2)]
    runs[1].landscape.losses[2, 4] = math.nan
    figure = plot_profiles({"SGD": runs}, {"SGD": Style("SGD", "-", "#D55E00")}, "described")
    assert [math.isnan(value) for value in figure.axes[0].lines[0].get_ydata()] == [i == 2 for i in range(9)]
