"""Functions that a recipe names as `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ray_soup.errors import RecipeError

MOVED = {"ray_soup.demo:digits_vit": "ray_soup.tune.demo:digits_vit"}
"""Functions of this package that recipes of earlier versions name, and their current places."""


def look_in(folder: str) -> None:
    """Put a folder on the module search path: the working directory of a remote process may differ from the driver's."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_function(spec: str) -> Callable[..., Any]:
    """Import `package.module:function`; modules in the current folder are found too.

    Raises RecipeError if the module cannot be imported or has no such function.
    """
    module_name, _, name = MOVED.get(spec, spec).partition(":")
    look_in(os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise RecipeError(
            f"{spec}: the module {module_name} cannot be imported ({error}). Put it in the current folder or the job's "
            "working directory, or install it."
        ) from error
    except AttributeError:
        raise RecipeError(
            f"{spec}: the module {module_name} has no '{name}'. Define it there, or fix the name in the recipe."
        ) from None
    return function
