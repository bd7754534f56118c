"""The table of all methods can be sorted and filtered in the site; pages of a folder are listed under its README."""

from docutils import nodes
from sphinx.application import Sphinx

PAGE = "methods/README"
_TREE = "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def list_folder(app: Sphinx, docname: str, source: list[str]) -> None:
    """Add the pages beside a README to the navigation; on GitHub the folder shows them."""
    if docname.endswith("/README"):
        source[0] += _TREE + ("\n```{toctree}\n:hidden:\n:glob:\n\ntasks/*\n```\n" if docname[:8] == "examples" else "")


def mark(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Mark the first table of the page, which _static/table.js looks for."""
    if docname == PAGE:
        next(doctree.findall(nodes.table))["classes"].append("sortable")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("source-read", list_folder, priority=900)
    app.connect("doctree-resolved", mark)
    return {"parallel_read_safe": True}
