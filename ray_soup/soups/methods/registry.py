"""Which function makes a soup by which method.

To add a method, write a module here, and add a row to MAKERS and one to METHODS in ray_soup/recipe/methods.py, with kind,
description and defaults.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ray_soup.recipe import SCHEDULES
from ray_soup.soups.methods.best_single import best_single
from ray_soup.soups.methods.greedy import greedy_soup
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.methods.last import last
from ray_soup.soups.methods.learned import learned
from ray_soup.soups.methods.scheduled import scheduled
from ray_soup.soups.methods.uniform import uniform
from ray_soup.soups.mixture import Mixture

MAKERS: dict[str, Callable[[Session], NDArray[np.float64] | Mixture]] = {
    "best_single": best_single,
    "uniform": uniform,
    "greedy": greedy_soup,
    "learned": learned,
    "learned+": learned,
    "mehl": learned,
    "mehl+": learned,
    "last": last,
    **dict.fromkeys(SCHEDULES, scheduled),
}
