"""Which function makes a soup by which method.

To add a method, write a module here, and add a row to MAKERS and one to METHODS in ray_soup/recipe/methods.py, with kind,
description and defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from ray_soup.recipe import SCHEDULES
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import Mixture

Maker = Callable[[Session], NDArray[np.float64] | Mixture]

MAKERS = {
    "best_single": "best_single:best_single",
    "uniform": "uniform:uniform",
    "greedy": "greedy:greedy_soup",
    "learned": "learned:learned",
    "learned+": "learned:learned",
    "mehl": "learned:learned",
    "mehl+": "learned:learned",
    "last": "last:last",
    **dict.fromkeys(SCHEDULES, "scheduled:scheduled"),
}
"""The function of each method, as module:function of this package; a module is imported when its method is used."""


def maker_of(method: str) -> Maker:
    """Return the function of a built-in method."""
    module, name = MAKERS[method].split(":")
    maker: Maker = getattr(import_module(f"{__package__}.{module}"), name)
    return maker
