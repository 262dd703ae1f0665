"""Make the soup of a session, by the method that its recipe names."""

from __future__ import annotations

from ray_soup.soups.methods.registry import MAKERS
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.session import Session


def make(session: Session) -> Mixture:
    """Make the soup that the session's recipe describes; a learning method resumes from `session.state_file`."""
    return MAKERS[session.recipe.method](session)
