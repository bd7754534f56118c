import math
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from tiny import image_record, recipe

from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures import curves as figures
from steppe.experiments.figures.pareto import after_epochs
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results


def results(of: Recipe, sharp: bool) -> Results:
    def records(run: Run) -> list[Record]:
        flat = [(0.1 * e, 4.0 * e, 0.5 * e) if sharp and e > 2 else (None, None, None) for e in (2, 4)]
        return [
            image_record(e, e, 10, 100, 1.0, 1.0, 90.0, 1.0, 80.0, 10.0, 1.0, 1.0, *f)
            for e, f in zip((2, 4), flat, strict=True)
        ]

    return {run: records(run) for run in of.runs()}


def drawn(of: Recipe, measured: Results) -> list[Figure]:
    """Return the figure of sharpness over compute, alone in its list, or none; to draw the others takes seconds."""
    return [drawing.figure for drawing in figures.drawings(of, measured) if drawing.stem == "sharpness"]


def test_sharpness_is_drawn_where_it_was_measured_with_the_edges() -> None:
    of = recipe(seeds=2, methods=("sgd", "sam", "asam"), lr=0.1, rho=0.2)
    assert drawn(of, results(of, False)) == []
    (figure,) = drawn(of, results(of, True))
    values, eigenvalues = figure.axes
    assert [line.get_xydata().tolist() for line in values.lines] == [[[4.0, pytest.approx(0.4)]]] * 3
    curves = [line for line in eigenvalues.lines if line.get_alpha() is None]
    edges = [line for line in eigenvalues.lines if line.get_alpha() is not None]
    assert [line.get_ydata().tolist() for line in curves] == [[16.0]] * 3
    # 2/lr, and |g|/(2 rho) (sqrt(1 + 8 rho/(lr |g|)) - 1) at |g| = 2; none for ASAM, whose edge is another
    sam = 2.0 / 0.4 * (math.sqrt(1 + 8 * 0.2 / (0.1 * 2.0)) - 1)
    assert [line.get_ydata().tolist() for line in edges] == [[pytest.approx(20.0)], [pytest.approx(sam)]]


@pytest.mark.parametrize("fields", [{"momentum": 0.9}, {"base": "adamw", "methods": ("adamw", "sam")}], ids=str)
def test_no_edge_is_drawn_that_is_another_ones(fields: dict[str, object]) -> None:
    of = recipe(**fields)
    (figure,) = drawn(of, results(of, True))
    assert all(line.get_alpha() is None for line in figure.axes[1].lines)


def test_between_two_measurements_only_what_both_have_is_interpolated() -> None:
    early, late = (image_record(e, e, 10, 100 * e, 1.0, 1.0, 90.0, 1.0, 80.0, 10.0, 1.0, 1.0) for e in (2, 4))
    sharp = [replace(early, sharpness=0.2, lambda_max=3.0), replace(late, sharpness=0.4)]
    between = after_epochs(sharp, 3.0)
    assert between is not None
    assert (between.sharpness, between.lambda_max) == (pytest.approx(0.3), None)
