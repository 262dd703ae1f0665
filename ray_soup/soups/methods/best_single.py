"""The best single ingredient, which every soup is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import mean_of


def best_single(session: Session) -> NDArray[np.float64]:
    """Take the ingredient that is best on fit and select together."""
    best, names = session.ranked()[0], session.names
    session.figures |= {"held_out": dict(zip(names, session.held_out(), strict=True)), BEST_SINGLE: names[best]}
    session.notes.append(f"Best single ingredient on fit and select together: {names[best]}.")
    return mean_of([best], len(names))[:, 0]
