"""The paths of a recipe without the folders of the machine, for what others read: the model card and the report."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from ray_soup.recipe import Recipe
from ray_soup.recipe.plain import texts_in

START = r"(?:(?<![\w./~-])|(?<=\bfile://))"
"""Matches where a path may begin: not within another path or URI."""


def shortener(recipe: Recipe) -> Callable[[str], str]:
    """Return a function that removes folders from the local paths in a text, as far as the recipe names them.

    The folder that all paths have in common is removed; if it is `/` or the one above the home folders, the whole folder of
    each path is. The home folder becomes `~` wherever else it occurs.
    """
    in_model = re.findall(r"[:=](/[^/&?][^&?]*)", recipe.model)
    paths = [*in_model, *(text for text in texts_in(recipe.model_dump(mode="json")) if text.startswith("/"))]
    folders = {os.path.dirname(re.split(r"[*?[]", path)[0]).rstrip("/") for path in paths} - {""}
    common = os.path.commonpath(folders).rstrip("/") if folders else ""
    home = os.path.expanduser("~").rstrip("/")
    if home.startswith(f"{common}/"):  # what is left would begin with a user's name
        common = ""
    removed = [common] if common else sorted(folders, key=len, reverse=True)

    def shorten(text: str) -> str:
        for folder in removed:
            text = re.sub(rf"{START}{re.escape(folder)}/", "", text)
        return re.sub(rf"{START}{re.escape(home)}(?![\w.-])", "~", text) if home else text

    return shorten
