"""The Pareto picture: its front, its points, and labels that can be read."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from tiny import recipe

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures.label_placement import place
from steppe.experiments.figures.pareto import after_epochs, common_epochs, draw, front
from steppe.experiments.figures.style import styles, use_style
from steppe.experiments.storage.records import Record
from steppe.experiments.storage.run_folder import Results

# few values, so that there are ties
coordinates = st.integers(0, 6).map(float)


def beaten(point: tuple[float, float], by: tuple[float, float]) -> bool:
    return by[0] <= point[0] and by[1] <= point[1] and by != point


@given(st.lists(st.tuples(coordinates, coordinates), max_size=12))
def test_front_holds_the_points_that_no_other_beats(points: list[tuple[float, float]]) -> None:
    found = front(points)
    assert sorted(found) == [i for i, p in enumerate(points) if not any(beaten(p, q) for q in points)]
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def measured(epochs: Sequence[float], passes: float, *, images: int = 72) -> list[Record]:
    """Made up: every field grows with the epochs."""
    return [
        Record(
            standardized_epoch=round(e * passes), epoch=e, steps=int(5 * e), passes=passes,
            gradient_evaluations=passes * e * images,
            measures={
                "train_loss": 1 / e, "train_accuracy": 80 + e, "test_loss": 1.0, "test_accuracy": 70 + e, "gap": 10.0
            },
            seconds=3 * e * passes, images_per_second=1.0,
        )
        for e in epochs
    ]  # fmt: skip


def made_up(of: Recipe) -> Results:
    def records(passes: float, grid: list[int]) -> list[Record]:
        return measured([point / passes for point in grid], passes)

    return {run: records(float(run.method.passes), run.grid) for run in of.runs()}


def test_common_epochs_are_those_of_the_most_expensive_method() -> None:
    ours = recipe(methods=("sgd", "looksam", "sam"), epochs=6, eval_every=1, extra_epochs=2)
    assert common_epochs(ours, made_up(ours)) == 3.0
    unfinished = {run: records[:2] if run.method.name == "sam" else records for run, records in made_up(ours).items()}
    assert common_epochs(ours, unfinished) == 5.0
    assert common_epochs(ours, {}) == 0.0


def test_records_between_two_measurements_are_interpolated() -> None:
    records = measured([1.0, 2.0, 4.0], 1.2)
    assert after_epochs(records, 2.0) is records[1]
    between = after_epochs(records, 2.5)
    assert between is not None
    assert (between["test_accuracy"], between.seconds) == pytest.approx((72.5, 9.0))
    assert (between.passes, between.gradient_evaluations) == pytest.approx((1.2, 1.2 * 2.5 * 72))
    assert after_epochs(records, 0.5) is None
    assert after_epochs(records, 4.5) is None


def test_interpolated_passes_are_the_average_so_far() -> None:
    plain_first = [*measured([4.0], 1.0), *measured([8.0], 1.5)]  # four epochs of one pass, then two passes
    between = after_epochs(plain_first, 6.0)
    assert between is not None
    assert between.passes == pytest.approx((4 + 2 * 2) / 6)


def test_panels_have_a_point_and_a_label_per_method_and_schedules_at_equal_compute_only() -> None:
    ours = recipe(methods=("sgd", "sam:rho=0.1", "late_sam"), epochs=6, eval_every=1, seeds=2)
    with use_style():
        figure = draw(ours, made_up(ours))
    panels = figure.axes
    assert len(panels) == 6
    texts = [{note.get_text() for note in axes.texts} - {"↖ better", "↙ better"} for axes in panels]
    assert texts == 2 * [{"SGD", "SAM\n(rho 0.1)"}, {"SGD", "SAM\n(rho 0.1)"}, {"SGD", "SAM\n(rho 0.1)", "Late SAM"}]
    assert "because a schedule spans the whole run: Late SAM" in figure.get_suptitle()
    drawn = [[line.get_xdata() for line in axes.lines] for axes in panels]
    points = [sorted(float(x[0]) for x in lines if len(x) == 1) for lines in drawn]
    assert points[0] == [1.0, 2.0]
    assert points[1] == [1.0, 2.0]  # seconds a step relative to SGD
    assert panels[2].get_title(loc="left") == "Same compute (6 standardized epochs)"


def test_filled_points_are_the_front_of_the_means() -> None:
    ours = recipe(methods=("sgd", "sam:rho=0.1", "late_sam"), epochs=6, eval_every=1, seeds=2)
    results = made_up(ours)
    epochs = common_epochs(ours, results)
    with use_style():
        figure = draw(ours, results)
    white = to_rgba("white")
    for index, axes in enumerate(figure.axes):
        points = [tuple(container[0].get_xydata()[0]) for container in axes.containers]
        better = -1 if index < 3 else 1  # accuracy above, gap below
        filled = [i for i, c in enumerate(axes.containers) if to_rgba(c[0].get_markerfacecolor()) != white]
        assert filled == sorted(front([(x, better * y) for x, y in points]))
    records = [after_epochs(results[run], epochs) for run in ours.runs() if run.method.name == "sam"]
    sam = figure.axes[0].containers[1][0].get_xydata()[0]
    assert sam[1] == pytest.approx(sum(r["test_accuracy"] for r in records if r is not None) / 2)


@pytest.mark.parametrize("n", [3, 12, 20])
@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_neither_each_other_nor_points(n: int, seed: int) -> None:
    chance = random.Random(seed)
    # most methods cost two passes: they lie above each other
    columns = [60.0, 180.0, 360.0, 360.0, 360.0]
    points = np.array([(chance.choice(columns), chance.uniform(20, 320)) for _ in range(n)])
    sizes = [(chance.uniform(25, 75), chance.choice([11.0, 23.0])) for _ in range(n)]
    inside = np.array([0.0, 0.0, 430.0, 340.0])
    centers = np.array(place(points, sizes, inside, np.empty((0, 4))))
    half = np.array(sizes) / 2
    low, high = centers - half, centers + half
    assert (low >= inside[:2]).all()
    assert (high <= inside[2:]).all()
    for i in range(n):
        for j in range(n):
            covers = (low[i] < high[j]).all() and (low[j] < high[i]).all()
            assert i == j or not covers
        assert not ((low[i] < points + 4) & (points - 4 < high[i])).all(axis=1).any()


def test_each_method_has_its_own_style_and_keeps_it() -> None:
    added = tuple(f"sam:rho={n}" for n in range(1, 19))
    few, more = recipe(methods=("sgd", "sam")), recipe(methods=("sgd", "sam", *added))
    assert {method: styles(more)[method] for method in few.comparison.methods} == styles(few)
    assert len({(style.line, style.color) for style in styles(more).values()}) == 20
