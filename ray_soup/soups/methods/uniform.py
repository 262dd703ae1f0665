"""The uniform soup: the plain mean of all ingredients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ray_soup.soups.methods.interface import Session


def uniform(session: Session) -> NDArray[np.float64]:
    """Average all ingredients."""
    count = len(session.names)
    return np.full(count, 1 / count)
