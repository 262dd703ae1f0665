"""The uniform soup: the plain mean of all ingredients."""

from __future__ import annotations

from ray_soup.soups.mixture import Mixture, mean_of, on_whole_model
from ray_soup.soups.session import Session


def uniform(session: Session) -> Mixture:
    """Average all ingredients."""
    return Mixture(on_whole_model(session, mean_of(range(len(session.subset)), len(session.subset))))
