"""The group of commands, and the arguments and options that several of them have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ray_soup import __version__
from ray_soup.errors import RecipeError
from ray_soup.exits import Shell

if TYPE_CHECKING:
    from ray_soup.recipe import Recipe

require_improvement_option = click.option(
    "--require-improvement", is_flag=True, help="Exit with code 4 if the soup does not beat the best ingredient on select."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what an earlier run of ray_soup wrote in OUT; other files are never deleted."
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
recipe_argument = click.argument("recipe", type=click.Path())
out_argument = click.argument("out", type=click.Path())


def load_recipe(path: str, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Load a recipe. What checks recipes is imported here, once a command needs it, and not for its help."""
    from ray_soup.recipe import load_recipe as load

    return load(path, overrides, method)


def comparable(recipe: Recipe, required: bool) -> Recipe:
    """Return the recipe. Raises RecipeError if an improvement is required and there is nothing to measure it with."""
    if required and (recipe.data.fit is None or recipe.baseline == "none"):
        lacks = "no data.fit, held-out data to compare on" if recipe.data.fit is None else "baseline: none"
        raise RecipeError(
            f"--require-improvement compares the soup with the best ingredient on select, but the recipe has {lacks}. "
            "Change the recipe, or omit the option."
        )
    return recipe


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ray-soup")
def main() -> None:
    """Mix the checkpoints of a sweep into one model, a model soup.

    A recipe (YAML) names the checkpoints, the model and the held-out data. KEY=VALUE after the other arguments overrides a
    key of the recipe, as in learn.lr=0.02. Rerun a command with the same OUT to resume it.

    Exit codes: 0 done; 1 failed while running; 2 wrong usage, recipe or data; 3 an ingredient is broken, or the ingredients
    do not fit together; 4 no improvement although one was required; 129 terminal closed; 130 interrupted; 141 output closed;
    143 terminated.
    """
