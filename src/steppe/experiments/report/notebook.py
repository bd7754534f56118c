"""Results as a notebook shows them."""

import base64
import io
from collections.abc import Iterable, Mapping
from html import escape

from matplotlib.figure import Figure

from steppe.experiments.analysis.tables import Table
from steppe.experiments.figures.drawing import Drawing


def draw_all(drawings: Iterable[Drawing]) -> dict[str, Figure]:
    """Draw the figures, by the names of their files."""
    return {drawing.stem: drawing.figure for drawing in drawings}


def as_html(table: Table, notes: Iterable[str], figures: Mapping[str, Figure]) -> str:
    """Return a table, notes and figures for a notebook."""
    title = escape(table.title)
    parts = [f"<p><b>{title}</b></p>{table.html()}<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"]
    for name, figure in figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=90)
        source = base64.b64encode(picture.getvalue()).decode()
        parts.append(f'<img alt="{escape(name)}: {title}" src="data:image/png;base64,{source}">')
    return "".join(parts)
