"""Make the soup of a session, by the method that its recipe names: a built-in one, or a function of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_soup.actors import metrics
from ray_soup.errors import RecipeError
from ray_soup.io.progress import ProgressCallback
from ray_soup.recipe import Recipe, own_function
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.methods.registry import maker_of
from ray_soup.soups.methods.results import Model, result_of
from ray_soup.soups.mixture import Mixture
from ray_soup.task.functions import call, import_function

if TYPE_CHECKING:
    from ray_soup.soups.session import Session as RunSession


def make(session: RunSession) -> Mixture | Model:
    """Make the soup that the session's recipe describes; a learning method resumes from `session.state_file`."""
    metrics.begin_soup(session.recipe.method)
    return _made(Session(session.recipe, session.inputs, session.subset, session.progress, session))


def make_without_data(recipe: Recipe, inputs: Inputs, progress: ProgressCallback) -> Mixture | Model:
    """Make the soup of a recipe whose method needs neither data nor actors. Raises NeedsDataError if it does."""
    return _made(Session(recipe, inputs, inputs.everything, progress))


def mix(session: RunSession) -> Mixture:
    """Make a soup that is a weighted sum of its ingredients. Raises RecipeError if the method returns another model."""
    made = make(session)
    if isinstance(made, Model):
        raise RecipeError(
            f"method: {session.recipe.method} returned a model; expected coefficients here. Use `ray-soup learn`."
        )
    return made


def _made(session: Session) -> Mixture | Model:
    method = session.recipe.method
    spec = own_function(method)
    if spec is None:
        return result_of(session, maker_of(method)(session))
    return result_of(session, call("method", spec, import_function(spec, "method"), session))
