import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser as made_up
import pytest
from browser import NASTY, NoFigures, come_to, press, until, write
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from tiny import recipe

from steppe.experiments.analysis.metric_verdicts import CONTROLS
from steppe.experiments.analysis.summary import summarize
from steppe.experiments.analysis.verdicts import read_flatness, read_lines
from steppe.experiments.config.recipe import Run
from steppe.experiments.errors import ExperimentError
from steppe.experiments.report import page as report
from steppe.experiments.report.figures import Figures
from steppe.experiments.storage.run_folder import RunFolder


def figures_of(folder: RunFolder) -> Figures:
    of, results = made_up.results(folder)
    return Figures(of, results, summarize(of, results), read_flatness(folder, of), read_lines(folder))


def change(folder: RunFolder, run: Run, **parts: dict[str, Any]) -> None:
    """Change parts of what was measured of a run."""
    file = folder.run(run) / "flatness.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {name: written[name] | part for name, part in parts.items()}))


class Page(HTMLParser):
    """What a reader of the page finds in it: tags, ids, and the text outside of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.json, self._inside = "", "", [""]
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append("json" if ("type", "application/json") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.append("")

    def handle_data(self, text: str) -> None:
        if self._inside[-1] == "json":
            self.json += text
        elif self._inside[-1] not in ("script", "style"):
            self.text += text


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    of = recipe(seeds=2, name="<b onclick=alert(1)>")
    folder = made_up.folder(tmp_path / "run", of, command=NASTY)
    notes = {"sharpness": NASTY, "loss": f"Another one: {NASTY}"}
    for run in of.runs():
        file = folder.run(run) / "flatness.json"
        measures = {name: {"value": 1.0, "note": note} for name, note in notes.items()}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"measures": measures}))
    page = Page(write(folder, ("gap_over", "landscapes")))  # the figures with texts of runs, and with a script
    assert page.tags.count("script") == 2, "the losses of the landscapes, and the page's own"
    assert "img" not in page.tags
    assert not set("<>&") & set(page.json)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(NASTY.strip()) >= 4, "the command and the notes, twice each, as they were written"
    assert "SGD, seed 0: 1, gap" in page.text


def test_notes_of_a_flatness_verdict_are_on_the_page(tmp_path: Path) -> None:
    of = recipe(seeds=3)
    folder = made_up.folder(tmp_path / "run", of)
    assert "minimum flatter" in Page(write(folder)).text
    for run in of.runs():
        if run.method.name == "sam":
            change(folder, run, measures={"loss": {"value": 100.0}, "normalized_sharpness": {"value": 100.0}})
    text = Page(write(folder)).text
    assert "flatness inconclusive" in text
    assert "cannot be distinguished here" in text


def test_flatness_verdict_is_that_of_the_summary_and_not_of_a_file(tmp_path: Path) -> None:
    of = recipe(seeds=3)
    folder = made_up.folder(tmp_path / "run", of)
    file = folder.path / "flatness.json"  # with verdicts in it
    old = {"verdicts": [{"method": "sam", "verdict": "sharper", "sentence": "An old sentence."}], "text": ["Old."]}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    text = Page(write(folder)).text
    assert "minimum flatter" in text
    assert "An old sentence." not in text
    change(folder, next(of.runs()), settings={"samples": 1})
    results = made_up.results(folder)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "Figures", NoFigures)
        report.write(folder, of, results, summarize(of, results))  # without a verdict, as the runs cannot be compared
    assert "flatness no verdict" in Page(folder.path / "report.html").text


def test_page_without_flatness_names_the_command_that_measures_it(tmp_path: Path) -> None:
    of = recipe(seeds=2, out=Path("runs/my own"))
    text = Page(write(made_up.folder(tmp_path / "run", of, measured=False))).text
    assert "Flatness has not been measured in this run folder." in text
    assert text.count("steppe measure 'runs/my own'") == 2
    assert "flatness not measured" in text
    assert "largest Hessian eigenvalue" not in text


def test_headline_states_the_verdicts_of_the_summary(tmp_path: Path) -> None:
    many = recipe(seeds=3, methods=("sgd", "sam", "asam"))
    folder = made_up.folder(tmp_path / "run", many)
    text = Page(write(folder)).text
    assert "SAM and ASAM against SGD: test accuracy and generalization gap better; minima flatter." in text
    for sentence in json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]:
        assert re.sub(r"-(?=\d)", "−", sentence) in text
    sgd, sam, _ = (made_up.results(folder)[1][run] for run in list(many.runs())[:3])
    folder = made_up.folder(tmp_path / "same", recipe(seeds=2), measured=False)
    for run in recipe(seeds=2).runs():  # two methods of which each is better once
        best = (run.method.name == "sam") == (run.seed == 0)
        (folder.run(run) / "metrics.jsonl").write_text(json.dumps((sam if best else sgd)[-1].to_json()) + "\n")
    text = Page(write(folder)).text
    assert "SAM against SGD: test accuracy and generalization gap not distinguishable; flatness not measured." in text
    assert "better" not in text.partition("Training")[0]


def test_headline_has_no_verdict_on_the_gap_where_labels_are_wrong(tmp_path: Path) -> None:
    text = Page(write(made_up.folder(tmp_path / "run", recipe(seeds=3, label_noise=0.4)))).text
    assert "SAM against SGD: test accuracy better; minimum flatter." in text
    assert "There is no verdict on the gap" in text


def test_note_of_several_measures_is_once_below_the_table(tmp_path: Path) -> None:
    of = recipe(seeds=2)
    folder = made_up.folder(tmp_path / "run", of)
    note = "lower bound: the best of 2 ascents"
    for run, apart in zip(
        of.runs(), ("", ", which differ by up to 9%", ", which differ by up to 12%", ""), strict=True
    ):
        measures = {name: {"value": 1.0, "note": note + apart} for name in ("sharpness", "adaptive_sharpness")}
        change(folder, run, measures=measures)
    text = Page(write(folder)).text
    assert text.count(note) == 1
    assert f"1 {note}, which differ by up to 12%." in text
    assert "worst-direction sharpness S(w)1" in text
    assert "adaptive sharpness (ASAM)1" in text
    assert "m-sharpness1" not in text


def test_robustness_is_on_the_page_with_the_words_of_the_summary(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe(seeds=3), robust=True)
    top, _, below = Page(write(folder)).text.partition("The trained networks again")
    assert (
        "SAM against SGD: accuracy under corruptions better, calibration error better, accuracy at 4 bits better."
        in top
    )
    text = below.partition("Is it SAM, or would less have done?")[0]
    found = json.loads((folder.path / "summary.json").read_text())["robustness"]
    labels = ("all corrupted", "gaussian noise", "blur", "calibration error", "4-bit weights", "3-bit weights")
    assert all(label in text for label in labels)
    assert len(found) == len(made_up.ROBUSTNESS)
    assert text.count("better") == len(found) + 1 + text.count("is better") + text.count("called better")
    low, high = found[0]["comparisons"][0]["difference"]["interval_95"]
    cell = text.partition("all corrupted")[2].partition("[")[2].partition("]")[0].split(", ")
    assert [float(end) for end in cell] == pytest.approx([low, high], abs=0.01)
    without = Page(write(made_up.folder(tmp_path / "without", recipe(seeds=3)))).text
    assert "Robustness" not in without


def test_forgetting_is_on_the_page_with_the_words_of_the_summary(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe(seeds=3, then="inverted"), measured=False)
    page = Page(write(folder))
    contents, _, section = page.text.partition("Forgetting")  # once in the contents, once as a heading
    assert contents.rstrip().endswith("Verdict")
    text = section.partition("Forgetting")[2].partition("Lines are means")[0]
    found = json.loads((folder.path / "summary.json").read_text())["forgetting"]
    assert [verdict["verdict"] for verdict in found] == ["better", "better", "not distinguishable"]
    assert "SAM is better than SGD at equal compute (test accuracy forgotten −" in text
    assert "black and white exchanged" in text
    assert all(heading in text for heading in ("first task, before %", "first task, after %", "forgotten, points"))
    ids = [value for name, value in page.attributes if name == "id"]
    links = [value for name, value in page.attributes if name == "href" and (value or "").startswith("#")]
    assert {(link or "")[1:] for link in links} <= set(ids)
    assert "#forgetting" in links
    without = Page(write(made_up.folder(tmp_path / "without", recipe(), measured=False)))
    assert "Forgetting" not in without.text


@pytest.mark.slow
def test_one_run_has_no_verdict_and_no_spread(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe())
    text = Page(write(folder)).text
    assert "One run of each method gives no verdict" in text
    assert "±" not in text.partition("Flat is not one thing")[2].partition("Mean ±")[0], "no spread in the table"
    figures = figures_of(folder)
    assert not any("±" in one.svg for one in figures.curves())
    assert not any(axes.collections for axes in figures.saved["overview"].figure.axes), "no bands"
    bars = [bar for axes in figures.saved["pareto"].figure.axes for point in axes.containers for bar in point.lines[2]]
    assert bars == []


def test_empty_run_folder_has_a_page(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(recipe(), 1)
    assert "Nothing has been measured yet." in Page(write(folder, Figures.SECTIONS)).text


def test_surface_has_a_hole_where_the_loss_is_nan(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe())
    run, (i, j) = next(recipe().runs()), made_up.HOLE
    losses = json.loads((folder.run(run) / "flatness.json").read_text())["landscape"]["losses"]
    losses[i][j] = float("nan")  # as another JSON writer might
    change(folder, run, landscape={"losses": losses})
    payload = json.loads(Page(write(folder, ["landscapes"])).json)
    rows = payload["landscapes"]["landscape"]["0"]["methods"]["sgd"]["losses"]
    assert [(a, b) for a, row in enumerate(rows) for b, value in enumerate(row) if value is None] == [(i, j)]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "steppe flatness, version 9"}'])
def test_damaged_file_is_named_and_the_old_page_stays(tmp_path: Path, content: str) -> None:
    folder = made_up.folder(tmp_path / "run", recipe())
    before = write(folder).read_bytes()
    file = folder.run(next(recipe().runs())) / "flatness.json"
    file.write_text(content)
    with pytest.raises(ExperimentError, match=f"{re.escape(str(file))} is damaged.*steppe measure"):
        of, results = made_up.results(folder)
        report.write(folder, of, results, summarize(of, results))
    assert (folder.path / "report.html").read_bytes() == before


# Everything below uses one page, and one browser: see conftest.py.
in_browser = pytest.mark.xdist_group("browser")


@in_browser
@pytest.mark.slow
def test_same_folder_gives_same_bytes(page: Path, tmp_path: Path) -> None:
    moved = RunFolder(Path(shutil.copytree(page.parent, tmp_path / "moved")))
    assert page == page.parent / "report.html"
    assert write(moved, Figures.SECTIONS).read_bytes() == page.read_bytes()
    before = write(moved, ["spectra"]).read_bytes()
    made_up.measure(moved, moved.recipe(), size=0.7)
    assert write(moved, ["spectra"]).read_bytes() != before


@in_browser
def test_page_requests_nothing_from_a_network(page: Path) -> None:
    read = Page(page)
    assert {"link", "script", "meta"} <= set(read.tags)
    sources = [value for name, value in read.attributes if name in ("src", "srcset", "data", "poster", "action")]
    assert sources == []
    links = [value or "" for name, value in read.attributes if name.endswith("href")]
    assert {link[:5] for link in links} == {"data:", "https"} | {link[:5] for link in links if link.startswith("#")}
    assert all(link.startswith("https://arxiv.org/") for link in links if link.startswith("http"))
    (policy,) = (value or "" for name, value in read.attributes if name == "content" and "default-src" in (value or ""))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


@in_browser
def test_figures_have_text_alternatives_and_ids_of_their_own(page: Path) -> None:
    read = Page(page)
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    pictures = re.findall(r"<svg [^>]*viewBox[^>]*>", page.read_text().partition('<script type="application/json"')[0])
    assert len(pictures) > 30
    assert all('aria-hidden="true"' in svg or ('role="img"' in svg and 'aria-label="' in svg) for svg in pictures)


def severe(chrome: Chrome) -> list[dict[str, Any]]:
    return [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]


PLOTS = ("gap", "pareto-gap", "gap-over", "spectrum", "eigenvalues", "profile", "lines-training", "lines-test")
SURFACES = tuple(f"canvas[data-surface={method}]" for method in ("sgd", "sam"))
DRAWN = f"return {list(SURFACES)}.map((selector) => document.querySelector(selector).toDataURL())"


def drawn_again(chrome: Chrome, before: list[str]) -> list[str]:
    """Wait until every surface is another picture than before."""

    def again(chrome: Chrome) -> list[str] | None:
        now = chrome.execute_script(DRAWN)
        return now if all(a != b for a, b in zip(now, before, strict=True)) else None

    return WebDriverWait(chrome, made_up.PATIENCE).until(again)  # type: ignore[return-value]


def pixel(chrome: Chrome, selector: str, place: tuple[float, float, float]) -> list[int]:
    """The color of a surface's canvas at a place of the box from -1 to 1 that its axes span."""
    script = """const canvas = document.querySelector(arguments[0]), [x, y] = projection().at(...arguments[1]);
        return [...canvas.getContext('2d').getImageData(x * SCALE, y * SCALE, 1, 1).data]"""
    return chrome.execute_script(script, selector, place)  # type: ignore[no-any-return]


def shown(name: str, method: str = "") -> str:
    """The selector of a figure in the view that the page's choices select."""
    return f"figure[data-figure={name}]:not([hidden])" + (f"[data-method={method}]" if method else "")


@in_browser
def test_page_opens_without_errors_and_its_surfaces_turn_together(chrome: Chrome, page: Path) -> None:
    press(chrome, "[data-choice=view] [data-value='3d']")
    for selector in (*map(shown, PLOTS), *SURFACES):
        come_to(chrome, selector)
    first = chrome.execute_script(DRAWN)
    assert first[0] != first[1]
    surface = come_to(chrome, SURFACES[0])
    ActionChains(chrome).move_to_element(surface).click_and_hold().move_by_offset(60, 25).release().perform()
    turned = drawn_again(chrome, first)
    chrome.find_element(By.CSS_SELECTOR, "[data-camera=turn]").send_keys(Keys.ARROW_LEFT)
    drawn_again(chrome, turned)

    assert severe(chrome) == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    requested = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


@in_browser
def test_surface_seen_from_above_has_a_hole_and_the_colors_of_its_losses(chrome: Chrome) -> None:
    press(chrome, "[data-choice=view] [data-value='3d']")
    chrome.execute_script("choose(document.querySelector('[data-choice=scale]'), 'linear'); turnTo(0, 90)")
    until(chrome, "return !waiting")
    i, j = made_up.HOLE
    axis = [-1 + 2 * k / (made_up.POINTS - 1) for k in range(made_up.POINTS)]
    losses = chrome.execute_script("return shownOn(document.querySelector(arguments[0])).losses", SURFACES[0])
    assert losses[i][j] is None
    assert pixel(chrome, SURFACES[0], (axis[i], axis[j], 0))[3] == 0, "nothing is drawn in the hole"
    assert pixel(chrome, SURFACES[0], (axis[j], axis[i], 0))[3] == 255, "the hole is not at the mirrored place"
    middle, right, corner = (
        pixel(chrome, SURFACES[0], (0.98 * axis[a], 0.98 * axis[b], 0))[0] for a, b in ((5, 4), (7, 4), (8, 8))
    )
    assert middle < right < corner, "the higher the loss, the brighter"
    chrome.execute_script("turnTo(40, 28)")


@in_browser
def test_pointer_over_a_surface_shows_the_loss(chrome: Chrome) -> None:
    press(chrome, "[data-choice=view] [data-value='3d']")
    chrome.execute_script("turnTo(0, 90)")  # from above, the middle of the canvas is that of the grid
    ActionChains(chrome).move_to_element(come_to(chrome, SURFACES[1])).perform()
    reading = "return document.querySelector(arguments[0]).closest('figure').querySelector('.reading').textContent"
    assert re.fullmatch(r"loss [\d.]+ at −?[\d.]+, −?[\d.]+", chrome.execute_script(reading, SURFACES[1]))
    chrome.execute_script("turnTo(40, 28)")


@in_browser
def test_surfaces_follow_the_choices_of_seed_and_directions_and_contours_that_of_directions(chrome: Chrome) -> None:
    press(chrome, "[data-choice=view] [data-value='3d']")
    before = chrome.execute_script(DRAWN)
    for choice in ("[data-choice=seed] [data-value='1']", "[data-value^=eigen]"):
        press(chrome, choice)
        before = drawn_again(chrome, before)
    press(chrome, "[data-choice=view] [data-value='2d']")
    drawings = []
    for choice in ("[data-value^=eigen]", "[data-value=landscape]"):
        press(chrome, choice)
        (contour,) = chrome.find_elements(By.CSS_SELECTOR, shown("contour", "sgd"))
        drawings.append(contour.get_attribute("innerHTML"))
    assert len(set(drawings)) == 2
    assert not any(surface.is_displayed() for surface in chrome.find_elements(By.CSS_SELECTOR, "canvas"))
    assert not chrome.find_element(By.CSS_SELECTOR, "[data-choice=seed]").is_displayed(), (
        "contours are of the first run"
    )
    press(chrome, "[data-choice=seed] [data-value='0']")


@in_browser
def test_hidden_method_is_hidden_in_all_figures(chrome: Chrome) -> None:
    visible = """return [...arguments[0].querySelectorAll("[data-method~=sam]")]
        .filter((part) => getComputedStyle(part).display !== 'none').length"""
    press(chrome, "[data-choice=view] [data-value='2d']")
    come_to(chrome, shown("contour", "sam"))
    press(chrome, "[data-chip=sam]")
    assert not [plot for plot in PLOTS if chrome.execute_script(visible, come_to(chrome, shown(plot)))]
    assert not chrome.find_element(By.CSS_SELECTOR, shown("contour", "sam")).is_displayed()
    assert "off" in str(chrome.find_element(By.CSS_SELECTOR, "tr[data-method=sam]").get_attribute("class"))
    assert chrome.find_element(By.CSS_SELECTOR, "[data-chip=sam]").get_attribute("aria-pressed") == "false"
    press(chrome, "[data-choice=view] [data-value='3d']")
    assert not chrome.find_element(By.CSS_SELECTOR, SURFACES[1]).is_displayed()
    press(chrome, "[data-chip=sam]")
    come_to(chrome, SURFACES[1])
    assert all(chrome.execute_script(visible, come_to(chrome, shown(plot))) for plot in PLOTS)


@in_browser
def test_numbers_are_those_of_the_summary(chrome: Chrome, page: Path) -> None:
    summary = json.loads((page.parent / "summary.json").read_text())
    for row in summary["rows"]:
        for column, field in (("test accuracy", "test_accuracy"), ("gap", "gap"), ("train accuracy", "train_accuracy")):
            where = f"#summary-table [data-method='{row['method']}'] [data-column='{column}']"
            mean, _, sd = str(chrome.find_element(By.CSS_SELECTOR, where).get_attribute("textContent")).partition(" ± ")
            assert float(mean.replace("−", "-")) == pytest.approx(row[field]["mean"], abs=0.005)
            assert float(sd) == pytest.approx(row[field]["sd"], abs=0.005)
    tips = "return [...arguments[0].querySelectorAll('use title')].map((title) => title.textContent)"
    found = chrome.execute_script(tips, come_to(chrome, shown("gap")))
    for label, row in zip(("SGD", "SAM"), summary["rows"], strict=True):
        last = [tip for tip in found if tip.startswith(f"{label}: ")][-1]
        assert last == f"{label}: {row['gap']['mean']:.4g} ± {row['gap']['sd']:.2g}"
    sentence, *_ = summary["notes"]
    assert re.sub(r"-(?=\d)", "−", sentence) in chrome.find_element(By.CSS_SELECTOR, ".details").text


@in_browser
def test_curves_over_time_replace_those_over_compute(chrome: Chrome) -> None:
    x = """const uses = [...arguments[0].querySelectorAll('[data-method=sam] use')];
        return uses.filter((use) => use.querySelector('title')).map((use) => Number(use.getAttribute('x')))"""
    first, second, third = chrome.execute_script(x, come_to(chrome, shown("gap")))
    assert third - second == pytest.approx(second - first, abs=0.02), "epochs 2, 4 and 6"
    assert "standardized epochs" in chrome.find_element(By.CSS_SELECTOR, shown("gap")).text
    press(chrome, "[data-choice=extent] [data-value=seconds]")
    first, second, third = chrome.execute_script(x, come_to(chrome, shown("gap")))
    assert third - second != pytest.approx(second - first, abs=0.02)
    assert "training time in seconds" in chrome.find_element(By.CSS_SELECTOR, shown("gap")).text
    press(chrome, "[data-choice=extent] [data-value=standardized_epoch]")


@in_browser
def test_choices_of_a_figure_show_one_view_at_a_time(chrome: Chrome) -> None:
    for name, choice, values in (
        ("pareto-gap", "cost", ("1", "2", "0")),
        ("gap-over", "measure", ("trace", "loss", "sharpness")),
        ("profile", "scale", ("linear", "log")),
    ):
        for value in values:
            choose = f"const group = document.querySelector('[data-choice={choice}]'); choose(group, '{value}')"
            chrome.execute_script(choose)
            (figure,) = chrome.find_elements(By.CSS_SELECTOR, shown(name))
            assert f"{choice}:{value}" in str(figure.get_attribute("data-when"))


@in_browser
def test_theme_of_the_page_is_that_of_the_figures(chrome: Chrome) -> None:
    colors = """const style = (selector) => getComputedStyle(arguments[0].querySelector(selector));
        const line = style('[data-method=sam] path[style*="fill: none"]').stroke;
        return [getComputedStyle(document.body).backgroundColor, style('text').fill, line]"""
    before = chrome.execute_script(colors, come_to(chrome, shown("gap")))
    press(chrome, "#theme")
    after = chrome.execute_script(colors, come_to(chrome, shown("gap")))
    assert all(a != b for a, b in zip(before, after, strict=True))
    press(chrome, "#theme")
    assert chrome.execute_script(colors, come_to(chrome, shown("gap"))) == before


@in_browser
def test_narrow_page_scrolls_vertically_only(chrome: Chrome) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for place in (
            *map(shown, ("gap", "spectrum", "lines-test")), "#flatness-table", "#surfaces", "#reproduce pre",
        ):  # fmt: skip
            come_to(chrome, place)
            until(chrome, "return innerWidth === 360")
            widest = "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
            assert chrome.execute_script(widest) == 360
    finally:
        chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@in_browser
def test_script_that_is_not_of_the_page_does_not_run(chrome: Chrome) -> None:
    assert severe(chrome) == []
    foreign = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.head.append(s)"
    chrome.execute_script(foreign)
    assert chrome.execute_script("return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in severe(chrome))


def test_controls_are_on_the_page_with_the_words_of_the_summary(tmp_path: Path) -> None:
    folder = made_up.folder(tmp_path / "run", recipe(seeds=3), robust=True)
    page = Page(write(folder))
    (verdict,) = json.loads((folder.path / "summary.json").read_text())["verdicts"]
    assert len(verdict["comparisons"]) > 1
    text = page.text.partition("Is it SAM, or would less have done?")[2].partition("Lines are means")[0]
    row = text.partition("SAM")[2].partition("accuracy under")[0]
    for each in verdict["comparisons"]:
        assert CONTROLS[each["control"]].phrase in text
        mean = f"{each['difference']['mean']:+.1f}".replace("-", "−")
        assert mean in row
        assert each["verdict"] in row
    assert ("href", "#controls") in page.attributes
    alone = Page(write(made_up.folder(tmp_path / "alone", recipe(seeds=1, methods=("sgd",)), measured=False)))
    assert "Controls" not in alone.text


def contrast(first: str, second: str) -> float:
    """The ratio of the luminances of two colors, as WCAG has it."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_enough_contrast_in_both_themes(tmp_path: Path) -> None:
    style = write(made_up.folder(tmp_path / "run", recipe(), measured=False)).read_text().partition("<style>")[2]
    themes = [block for block in re.findall(r"{([^{}]*)}", style) if "--paper: " in block and "--accent: " in block]
    assert len(themes) == 3, "light, dark by the device, dark by the switch"
    for theme in themes:
        color = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", theme))
        for text in ("ink", "soft", "accent", "good", "bad", "open"):
            for background in ("paper", "card"):
                assert contrast(color[text], color[background]) >= 4.5, (text, background, color)


@in_browser
def test_page_is_small_and_states_verdict_and_advice_before_all_figures(page: Path) -> None:
    assert page.stat().st_size < 2_000_000
    html = page.read_text()
    assert '<html lang="en">' in html
    assert html.index('id="verdict-h"') < html.index("<table") < html.index("<figure")
    order = [
        html.index(f'<section id="{name}"') for name in ("verdict", "robustness", "controls", "curves", "flatness")
    ]
    assert order == sorted(order)
    cells = re.findall(r"<th\b[^>]*>", html)
    assert cells
    assert all("scope=" in cell for cell in cells)
    assert "@media print" in html
    assert all("aria-label" in canvas for canvas in re.findall(r"<canvas[^>]*>", html))
