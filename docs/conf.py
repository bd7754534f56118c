"""Builds the site of the documentation: `make docs` writes it to build/docs, and `make docs-links` checks its links."""

import os
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))
os.environ.setdefault("KERAS_BACKEND", "torch")  # the API pages import the integrations

project = "Steppe"
author = "The Steppe developers"
copyright = author
release = version = metadata.version("steppe")

extensions = [
    "myst_nb",  # Markdown, with MyST-Parser, and notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    # Of this repository, in docs/_extensions:
    "api_pages",
    "included_pages",
    "repository_links",
    "methods_table",
    "plain_pages",
]
exclude_patterns = ["_extensions", "_static"]
nitpicky = True

# The pages are plain Markdown, as GitHub shows them.
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "source": None}
myst_linkify_fuzzy_links = False
suppress_warnings = [
    "myst.header",  # the first heading of a card's section may skip a level
]

# Notebooks are committed without outputs, so the build runs them; a cell that fails ends it.
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell, on a busy machine
nb_merge_streams = True

default_role = "code"
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"

# Names of other projects become links where their index can be read. Without a network they are plain text.
ONLINE = os.environ.get("STEPPE_DOCS_ONLINE") == "1"
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }
    if ONLINE
    else {}
)
nitpick_ignore_regex = [
    # Types of Steppe that appear in signatures but are internal, and type variables.
    (r"py:.*", r"steppe\.(.*\.)?_.*"),
    (r"py:.*", r"steppe\.(experiments\.\w+|methods|_engine)\..*"),
    (r"py:exc", r"ExperimentError"),  # raised for its message, not to be caught
    # Names of other projects: links if STEPPE_DOCS_ONLINE=1, and never for those without an index above.
    (r"py:.*", r"(lightning|transformers|accelerate|keras|matplotlib)\..*"),
    *([] if ONLINE else [(r"py:.*", r"(torch|collections|contextlib|pathlib|numpy)\..*")]),
]

linkcheck_ignore = [r"source:.*"]
linkcheck_anchors = False
linkcheck_timeout = 20
linkcheck_retries = 2

html_theme = "furo"
html_title = "Steppe"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = [("table.js", {"defer": "defer"})]
highlight_language = "none"  # blocks without a language are formulas and commands of a shell, not Python
pygments_dark_style = "github-dark"
html_copy_source = False  # the plain Markdown of each page lies beside it: plain_pages
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e4f", "color-brand-content": "#0b6e4f"},
    "dark_css_variables": {"color-brand-primary": "#5cc8a1", "color-brand-content": "#5cc8a1"},
}
