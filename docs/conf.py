"""Settings of Sphinx: `sphinx-build -W --keep-going -n docs docs/_build` makes the site from this folder.

The lists of keys, commands, public names and error messages are generated from the code, before Sphinx reads the pages that
include them.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import generate

import ray_soup

generate.write(Path(__file__).parent / "generated")

project = "ray_soup"
author = "the authors of ray_soup"
copyright = "the authors of ray_soup, Apache 2.0"
release = version = ray_soup.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generated"]
myst_heading_anchors = 4  # as GitHub makes them
myst_enable_extensions = ["deflist"]
suppress_warnings = ["myst.header"]  # pages that are included begin at another level

smartquotes = False  # names and messages are copied
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures; the links between pages are MyST's own

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"ray_soup {release}"
html_show_sphinx = False
html_copy_source = False


def setup(app: Any) -> None:
    """Let Sphinx read docstrings as they are written: plain text with code in single backticks."""
    app.connect("autodoc-process-docstring", _escape, priority=1000)


def _escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what would be a link, as in `test_...`, outside doctests and fields."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...", ":")):
            lines[number] = re.sub(r"(?<=\w)_(?=\W|$)", r"\_", line)
