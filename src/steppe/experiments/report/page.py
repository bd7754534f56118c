"""report.html: one page of everything that a run folder holds, which needs neither a network nor the folder."""

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from steppe.experiments.analysis.metric_verdicts import controls_of
from steppe.experiments.analysis.robustness import READING
from steppe.experiments.analysis.summary import Summary, columns, setting
from steppe.experiments.analysis.verdicts import read_flatness, read_lines
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.figures import controls
from steppe.experiments.figures.drawing import color_variable, save_all, theme_css
from steppe.experiments.figures.landscapes import COLORMAP
from steppe.experiments.figures.style import styles
from steppe.experiments.report import content, robustness
from steppe.experiments.report.figures import Figures
from steppe.experiments.report.numbers import typographic
from steppe.experiments.storage.environment import read_sessions
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.run_folder import Results, RunFolder

FILE = "report.html"


def write(folder: RunFolder, recipe: Recipe, results: Results, summary: Summary) -> Path:
    """Draw everything that the folder holds: PNG and SVG files in figures/, and the page with the same drawings.

    The same folder gives the same bytes. Flatness is on the page once `steppe measure` has measured it.

    Raises:
        ExperimentError: a file of the folder is damaged.
        OSError: a file cannot be written.
    """
    found, sessions = read_flatness(folder, recipe), read_sessions(folder.path / "environment.json")
    figures = Figures(recipe, results, summary, found, read_lines(folder))
    save_all(figures.saved.values(), folder.figures)
    sections = {name: list(getattr(figures, name)()) for name in Figures.SECTIONS}
    script = "\n".join(_file(name) for name in ("page.js", *(["surfaces.js"] if figures.surfaces else [])))
    page = _template().render(
        recipe=recipe,
        setting=setting(recipe),
        summary=summary,
        styles=styles(recipe),
        headlines=content.headlines(summary, measured=bool(found)),
        details=content.details(summary),
        word_kinds=content.KINDS,
        columns=columns(summary.task),
        flatness=list(content.flatness_groups(recipe, summary, found)) if found else [],
        flatness_notes=content.footnotes(found),
        control_names=[control.phrase for control in controls_of(summary.verdicts_with_controls())],
        control_legend=controls.legend(summary.verdicts_with_controls()),
        control_rows=list(content.control_rows(recipe, summary)),
        robustness_headlines=robustness.headlines(summary.robustness) if summary.robustness else [],
        robustness_reading=READING if summary.robustness else "",
        robustness_groups=list(robustness.groups(recipe, summary, summary.robustness)) if summary.robustness else [],
        sections=sections,
        figures=figures,
        folder=shlex.quote(str(recipe.folder)),
        commands=list(dict.fromkeys(str(session["command"]) for session in sessions if session.get("command"))),
        sessions=sessions,
        versions=_versions(sessions),
        # only this script may run: a script inside of a text from outside cannot
        hash=Markup(_hash(script)),
        configuration=recipe.options(),
        payload={"colors": COLORMAP, "landscapes": figures.surfaces} if figures.surfaces else None,
        gradient=Markup(", ".join(f"{color} {100 * place:g}%" for place, color in COLORMAP)),
        light=Markup(theme_css(dark=False)),
        dark=Markup(theme_css(dark=True)),
        script=Markup(script),
    )
    path = folder.path / FILE
    write_atomically(path, page.encode())
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"typographic": typographic, "text": content.text, "color_variable": color_variable}
    return environment.get_template("page.html")


def _versions(sessions: Sequence[Mapping[str, Any]]) -> str:
    last = sessions[-1] if sessions else {}
    return ", ".join(f"{name} {last[name]}" for name in ("steppe", "torch", "numpy", "python") if last.get(name))


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _hash(script: str) -> str:
    """Return the source expression by which a Content-Security-Policy lets one script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
