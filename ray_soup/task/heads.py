"""New heads on a base: adapters of classifiers and taggers whose base is, say, a causal language model.

`model: transformers:BASE?task=classification` or `task=token_classification` says what the adapters were trained for. Each
weight of the head must be in the base or in every adapter: none is random.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_soup.errors import IngredientError
from ray_soup.io.adapters import AdapterIngredient, adapters_among
from ray_soup.io.find import open_ingredients
from ray_soup.io.hugging_face import pinned_recipe
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout
from ray_soup.recipe import Recipe, with_changes
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import describe
from ray_soup.task.transformers_models import TASK

TRIED = (5, 7)
"""Numbers of classes by which the tensors are found whose size is that number."""


def resolved_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the commits that its revisions name now, and the number of classes of a new head.

    Adapters know that number if `model` has the option `task` and not `classes`. Raises RecipeError or IngredientError.
    """
    recipe = pinned_recipe(recipe)
    options = ModelSpec.parse(recipe.model).options
    if TASK not in options or "classes" in options or recipe.ingredients is None:
        return recipe
    model = with_classes(recipe.model, adapters_among(open_ingredients(recipe.ingredients, (), [])))
    return recipe if model == recipe.model else with_changes(recipe, {"model": model})


def with_classes(model: str, adapters: Sequence[AdapterIngredient]) -> str:
    """Return the recipe key `model` with the number of classes of the adapters' heads, if it has `task` and no `classes`.

    Raises IngredientError if the heads differ.
    """
    spec = ModelSpec.parse(model)
    if TASK not in spec.options or "classes" in spec.options or not adapters:
        return model
    few, more = (describe(spec.with_options({"classes": str(n)})).state_shapes for n in TRIED)
    found = {
        a.tensors[a.whole[name]].shape[0]: a for name in few if few[name] != more[name] for a in adapters if name in a.whole
    }
    if len(found) > 1:
        (first, one), (second, other) = list(found.items())[:2]
        raise IngredientError(
            f"{one.path} has a head for {first} classes and {other.path} one for {second}; expected the same classes. "
            "Exclude one kind."
        )
    return spec.with_options({"classes": str(next(iter(found)))}) if found else model


def other_head(spec: str, layout: Layout) -> list[str]:
    """Return the tensors of the base that the option `task` leaves out: the head for its own task."""
    parsed = ModelSpec.parse(spec)
    if TASK not in parsed.options:
        return []
    own = ModelSpec("", parsed.library, parsed.name, {}).with_options({})
    return [name for name in describe(own).state_shapes if name not in layout.state_shapes and name not in layout.tied]


def check_heads(spec: str, missing: Sequence[str], base: Ingredient, adapters: Sequence[AdapterIngredient]) -> None:
    """Check that the option `task` adds no weights that neither the base nor every adapter contains.

    Raises IngredientError.
    """
    if TASK in ModelSpec.parse(spec).options and missing:
        lacking = next(a for a in adapters if missing[0] not in a.whole)
        raise IngredientError(
            f"{base.path} lacks {missing[0]} of the model with a new head ({len(missing)} such tensors), and so does the "
            f"adapter {lacking.path}: its training started from random values there, which were not saved. Train with "
            "modules_to_save for these modules, use a base that has them, or exclude the adapter."
        )
