"""The last step of one training run."""

from __future__ import annotations

from ray_soup.soups.mixture import Mixture, mean_of, on_whole_model, order_in
from ray_soup.soups.session import Session


def last(session: Session) -> Mixture:
    """Take the last step of one run."""
    return Mixture(on_whole_model(session, mean_of(order_in(session)[-1:], len(session.subset))))
