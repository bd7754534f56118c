"""The page: its skeleton, filled with what a run folder holds."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from steppe.experiments.analysis.summary import Summary, setting
from steppe.experiments.config.recipe import Recipe, Run
from steppe.experiments.measuring.measure import lines_of, measured
from steppe.experiments.report import tables, verdicts
from steppe.experiments.report.markup import Markup, element, join
from steppe.experiments.report.payload import dumps, payload, tracked
from steppe.experiments.storage.files import write_atomically
from steppe.experiments.storage.run_folder import Results, RunFolder
from steppe.flatness import Flatness

__all__ = ["FILE", "write"]

FILE = "report.html"

_SCRIPTS = ("page.js", "curves.js", "flatness.js", "lines.js", "landscapes.js", "start.js")
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E%3Cpath d='M2 6c2 24 7 24 10 6"
    "s5-3 6 4 8 9 12-6' fill='none' stroke='%232f6f62' stroke-width='3'/%3E%3C/svg%3E"
)


def write(folder: RunFolder, recipe: Recipe, results: Results, summary: Summary) -> Path:
    """Write RUN/report.html: everything that the folder holds, on one page that asks no network for anything.

    The same folder gives the same bytes. Flatness is on it where `steppe measure` has measured it.
    Raises ExperimentError when a file of the folder is damaged, and OSError as `open` does.
    """
    found, lines = measured(folder, recipe), lines_of(folder)
    path = folder.path / FILE
    write_atomically(path, _page(recipe, results, summary, found, lines, _sessions(folder)).encode())
    return path


def _page(
    recipe: Recipe,
    results: Results,
    summary: Summary,
    flatness: Mapping[Run, Flatness],
    lines: Sequence[Mapping[str, Any]],
    sessions: Sequence[Mapping[str, Any]],
) -> str:
    plotly, script = get_plotlyjs(), "\n".join(_file(name) for name in _SCRIPTS)
    hint = join("These are made with ", element("code", f"steppe measure {_folder(recipe)}"), ".")
    return Template(_file("page.html")).substitute(
        # only these two scripts may run: one that comes in as text cannot
        hashes=f"{_hash(plotly)} {_hash(script)}",
        icon=_ICON,
        title=join(f"{recipe.name}: flatness and generalization"),
        name=join(recipe.name),
        setting=join(setting(recipe)),
        css=_file("page.css"),
        plotly=plotly,
        script=script,
        payload=dumps(payload(recipe, results, flatness, lines)),
        chips=tables.chips(recipe),
        headlines=join(
            *(
                element("p", sentence, class_="headline")
                for sentence in verdicts.headlines(summary, measured=bool(flatness))
            )
        ),
        details=join(*(element("li", sentence) for sentence in verdicts.details(summary))),
        summary=tables.summary_table(recipe, summary),
        flatness=tables.flatness_table(recipe, summary, flatness) if flatness else "",
        unmeasured=element("p", "Flatness has not been measured in this run folder. ", hint, class_="empty"),
        measured_only="" if flatness else "hidden",
        unmeasured_only="hidden" if flatness else "",
        tracked_only="" if tracked(results) else "hidden",
        tracked=join(
            *(_figure(f"curve-{quantity.field}", quantity.title, quantity.run) for quantity in tracked(results))
        ),
        commands=_commands(recipe, sessions),
        configuration=tables.configuration(recipe),
        environment=tables.environment(sessions),
        versions=join(_versions(sessions, plotly)),
    )


def _figure(identity: str, title: str, run: str) -> Markup:
    caption = element("figcaption", element("b", title), " ", element("small", run))
    return element("figure", caption, element("div", id=identity, class_="plot", role="img", aria_label=title))


def _commands(recipe: Recipe, sessions: Sequence[Mapping[str, Any]]) -> Markup:
    """What made the folder, and what makes the rest of it again."""
    typed = dict.fromkeys(str(session["command"]) for session in sessions if session.get("command"))
    folder = _folder(recipe)
    steps = (
        ("Train what is missing, as it was typed:", [*typed]),
        ("Draw the figures, the summary and this page again, from the measurements alone:", [f"steppe plot {folder}"]),
        ("Measure flatness at the trained weights:", [f"steppe measure {folder}"]),
    )
    return join(
        *(
            join(element("p", why), element("pre", element("code", "\n".join(words)), tabindex="0"))
            for why, words in steps
            if words
        )
    )


def _versions(sessions: Sequence[Mapping[str, Any]], plotly: str) -> str:
    last = sessions[-1] if sessions else {}
    ours = (f"{name} {last[name]}" for name in ("steppe", "torch", "numpy", "python") if last.get(name))
    drawn = plotly.partition("plotly.js v")[2].split(maxsplit=1)[0]
    return ", ".join([*ours, f"plotly.js {drawn}"])


def _sessions(folder: RunFolder) -> list[Mapping[str, Any]]:
    """Read environment.json; it is only a record, so a damaged one is none."""
    try:
        found = json.loads((folder.path / "environment.json").read_text())
    except (FileNotFoundError, ValueError):
        return []
    return [session for session in found if isinstance(session, dict)] if isinstance(found, list) else []


def _folder(recipe: Recipe) -> str:
    return shlex.quote(str(recipe.folder))


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _hash(script: str) -> str:
    """The source expression by which a Content-Security-Policy lets one script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
