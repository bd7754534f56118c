"""A run folder with everything that the page can show, made up; its page; and a browser that asks no network."""

import dataclasses
import math
import random
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from tiny import image_record

from steppe.experiments.analysis.summary import Summary, summarize
from steppe.experiments.analysis.verdicts import read_flatness, verdicts
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.figures import spectra
from steppe.experiments.figures.spectra import measures_of
from steppe.experiments.report import figures as page_figures
from steppe.experiments.report import page as report
from steppe.experiments.report.figures import Figures
from steppe.experiments.storage.files import write_json, write_json_lines
from steppe.experiments.storage.records import AFTER, FORGOTTEN, ON_SECOND, Record
from steppe.experiments.storage.run_folder import METRICS, Results, RunFolder
from steppe.flatness import Density, Flatness, Landscape, Measure

NASTY = """steppe compare '</script><script>broken = 1</script><img src=x onerror=alert(1)>' "&amp;" """
MEASURES = {
    "sharpness": 0.04,
    "m_sharpness": 0.09,
    "average_sharpness": 0.002,
    "lambda_max": 24.0,
    "trace": 310.0,
    "gradient_norm": 0.5,
    "adaptive_sharpness": 0.2,
    "adaptive_lambda_max": 3.1,
    "adaptive_trace": 42.0,
    "relative_flatness": 900.0,
    "normalized_sharpness": 0.011,
    "loss": 0.3,
    "weight_norm": 17.0,
    "lambda_min": -1.2,
}
ROBUSTNESS = {
    "accuracy under gaussian_noise": 62.0,
    "accuracy under blur": 70.0,
    "accuracy under corruptions": 66.0,
    "calibration error": 8.0,
    "negative log-likelihood": 0.6,
    "Brier score": 0.3,
    "accuracy at 4 bits": 75.0,
    "accuracy at 3 bits": 40.0,
}
GAP_OVER = ("sharpness", "trace", "loss", "lambda_max")
POINTS = 9
PATIENCE = 200
"""Seconds: a browser on a machine that is busy may take long."""
HOLE = (2, 3)
"""Where in the landscape the loss is not finite: the third step of the first direction, the fourth of the second."""


class NoFigures:
    """Stands for `Figures` where a test reads the text only: to draw takes longer than all else."""

    SECTIONS = Figures.SECTIONS

    def __init__(self, *_: object) -> None:
        self.saved: dict[str, Any] = {}
        self.surfaces: dict[str, Any] = {}
        self.choices: dict[str, Any] = {}

    def __getattr__(self, section: str) -> Any:
        return lambda: []


def folder(
    path: Path, recipe: Recipe, *, measured: bool = True, robust: bool = False, command: str = "steppe compare demo"
) -> RunFolder:
    """Write what `steppe compare` and `steppe measure` leave, without training anything."""
    made = RunFolder(path)
    path.mkdir(parents=True)
    made.claim(recipe, 1)
    write_json(path / "environment.json", [{"date": "2026-01-01", "command": command, "torch": "2.13.0"}])
    for run in recipe.runs():
        write_json_lines(made.run(run) / METRICS, [record.to_json() for record in _records(run, robust=robust)])
    if measured:
        measure(made, recipe)
    return made


def measure(made: RunFolder, recipe: Recipe, size: float = 0.5) -> None:
    """Write flatness.json of every run, in which each method is flatter than the one before; and the lines."""
    for run in recipe.runs():
        write_json(made.run(run) / "flatness.json", flatness(run, size ** recipe.comparison.methods.index(run.method)))
    write_json(made.path / "flatness.json", _lines(recipe))


def flatness(run: Run, sharp: float) -> dict[str, Any]:
    """What one run's flatness.json holds; `sharp` scales all curvature."""
    draws = random.Random(run.name)
    noisy = {name: value * sharp * math.exp(draws.gauss(0, 0.03)) for name, value in MEASURES.items()}
    top = noisy["lambda_max"]
    nodes = [[-0.05 * top, 0.0, 0.03 * top, 0.2 * top, 0.45 * top, top] for _ in range(3)]
    weights = [[4e-3, 0.975, 1.9e-2, 1.2e-3, 6e-4, 2e-4] for _ in range(3)]
    axis = [-1 + 2 * i / (POINTS - 1) for i in range(POINTS)]

    def loss(a: float, b: float) -> float:
        b *= 1 + run.seed / 10
        bowl = sharp * (3.2 * a * a + 1.9 * b * b + 0.8 * a * b)
        return 0.25 + bowl + 0.35 * sharp * (1 - math.cos(5 * a)) * (1 + 0.4 * math.sin(4 * b)) + 0.9 * sharp * a**4

    def landscape(stretch: float) -> Landscape:
        grid = torch.tensor([[loss(a * stretch, b / stretch) for b in axis] for a in axis])
        return Landscape(torch.tensor(axis), grid, loss(0, 0), False, "made up")

    random_directions = landscape(1.0)
    random_directions.losses[HOLE] = math.nan
    values = [top * share for share in (1.0, 0.45, 0.21, 0.12, 0.08)]
    return Flatness(
        {"samples": 512, "split": "train", "batch_norm": "eval", "rho": 0.05},
        {name: Measure(value, None) for name, value in noisy.items()},
        torch.tensor(values),
        torch.full((5,), 1e-4),
        Density(torch.tensor(nodes), torch.tensor(weights), 11_000),
        random_directions,
        landscape(2.0),
        12.0,
    ).to_json()


def _records(run: Run, *, robust: bool) -> list[Record]:
    """A method later in the recipe trains slower, costs more and generalizes better; seeds differ a little."""
    place, draws = run.recipe.comparison.methods.index(run.method), random.Random(run.name)
    passes, records = 1.0 + place, []
    for epoch in run.grid:
        train, test = 96 - 30 / (epoch + 1) - 2 * place + draws.gauss(0, 0.1), 88 - 26 / (epoch + 1) + place
        test += draws.gauss(0, 0.2)
        own, seconds = epoch / passes, epoch * (2.0 + draws.random() / 10)
        records.append(
            image_record(
                *(epoch, own, int(9 * own), 144.0 * epoch, passes),
                *(2 - train / 50, train, 1.0, test, train - test, seconds, 144 * own / seconds),
            )
        )
    if robust:
        better = {name: 5.0 if name.startswith("accuracy") else -0.05 for name in ROBUSTNESS}
        found = {name: value + place * better[name] + draws.gauss(0, 0.01) for name, value in ROBUSTNESS.items()}
        measures = records[-1].measures | {f"test_{name}": value for name, value in found.items()}
        records[-1] = dataclasses.replace(records[-1], measures=measures)
    if run.recipe.forgetting.then:
        before, after = records[-1]["test_accuracy"], 40.0 + 5 * place + draws.gauss(0, 0.1)
        found = {AFTER: after, FORGOTTEN: before - after, ON_SECOND: 70.0}
        measures = records[-1].measures | {f"test_accuracy{suffix}": value for suffix, value in found.items()}
        records[-1] = dataclasses.replace(records[-1], measures=measures)
    return records


def _lines(recipe: Recipe) -> dict[str, Any]:
    reference, *others = map(str, recipe.comparison.methods)
    seeds = range(recipe.comparison.first_seed, recipe.comparison.first_seed + recipe.comparison.seeds)
    axis = [i / 20 for i in range(21)]
    barrier = [0.25 + 1.4 * math.sin(math.pi * a) ** 2 for a in axis]
    line = {"axis": axis, "train": barrier, "test": [v + 0.2 for v in barrier], "reestimated": True}
    return {"lines": [{"a": reference, "b": other, "seed": seed, **line} for other in others for seed in seeds]}


def results(made: RunFolder) -> tuple[Recipe, Results]:
    recipe = made.recipe()
    return recipe, made.results(recipe)


def summary_of(folder: RunFolder) -> tuple[Recipe, Any, Summary]:
    of, found = results(folder)
    return of, found, dataclasses.replace(summarize(of, found), flatness=verdicts(of, read_flatness(folder, of)))


def few_measures(groups: spectra.Groups) -> dict[str, str]:
    """The measures over which the gap is drawn: four of fourteen, each in a picture of its own."""
    return {name: label for name, label in measures_of(groups).items() if name in GAP_OVER}


def write(folder: RunFolder, drawn: Collection[str] = ()) -> Path:
    """Write the page and the summary, with the figures of the sections that are named."""
    of, found, summary = summary_of(folder)
    summary.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_figures, "_BANDWIDTHS", (page_figures.BANDWIDTH,))
        patch.setattr(report, "save_all", lambda drawings, folder: [])
        for module in (page_figures, spectra):
            patch.setattr(module, "measures_of", few_measures)
        for section in {*Figures.SECTIONS}.difference(drawn):
            patch.setattr(Figures, section, lambda figures: [])
        if not drawn:
            patch.setattr(report, "Figures", NoFigures)
        return report.write(folder, of, found, summary)


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """A browser without a window; skips the test where there is none."""
    binary, step_function = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or step_function is None:
        pytest.skip("the page is looked at in a browser: apt-get install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    off = ("quic", "background-networking", "component-update", "sync", "extensions", "default-apps", "dev-shm-usage")
    for word in (
        *("headless=new", "no-sandbox", "no-first-run", f"user-data-dir={profile}", "window-size=1000,700"),
        *("hide-scrollbars", "force-device-scale-factor=1", *(f"disable-{name}" for name in off)),
    ):
        options.add_argument(f"--{word}")
    browser = Chrome(options, ChromeService(step_function))
    browser.set_script_timeout(PATIENCE)
    browser.set_page_load_timeout(PATIENCE)
    try:
        yield browser
    finally:
        browser.quit()


def come_to(chrome: Chrome, selector: str) -> Any:
    """Scroll to an element."""
    found = chrome.find_element(By.CSS_SELECTOR, selector)
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
    return found


def until(chrome: Chrome, script: str, *arguments: Any) -> None:
    WebDriverWait(chrome, PATIENCE).until(lambda c: c.execute_script(script, *arguments))


def press(chrome: Chrome, selector: str) -> None:
    """Press a button, which may be far from the window."""
    chrome.execute_script("arguments[0].click()", chrome.find_element(By.CSS_SELECTOR, selector))
