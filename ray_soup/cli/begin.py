"""The commands for the first hour: a recipe for a folder of checkpoints, the keys of a recipe, and what is installed."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict

import click

from ray_soup.cli.group import main
from ray_soup.errors import RecipeError
from ray_soup.exits import common_options
from ray_soup.soups.report.terminal import echo, print_json


@main.command()
@click.argument("key", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a recipe, for editors.")
@common_options
def keys(key: str | None, schema: bool, as_json: bool) -> None:
    """List the keys of a recipe.

    Shows what each key expects, its default, an example and its meaning; with KEY, those of one key or section, such as
    learn.lr or learn.
    """
    from ray_soup.recipe.explain import unknown_key
    from ray_soup.recipe.keys import json_schema
    from ray_soup.recipe.keys import keys as every_key
    from ray_soup.recipe.schema import Recipe

    if schema:
        print_json(json_schema())
        return
    found = [one for one in every_key() if key is None or f"{one.name}.".startswith(f"{key}.")]
    if not found:
        raise RecipeError(f"{key}: {unknown_key(Recipe, str(key).split('.'))}")
    if as_json:
        print_json([asdict(one) for one in found])
        return
    width = min(100, max(40, shutil.get_terminal_size().columns))
    blocks = []
    for one in found:
        rows = {"expects": one.type, "default": one.default, "example": one.example}
        lines = [one.name, *(f"  {name}  {text}" for name, text in rows.items() if text)]
        blocks.append("\n".join([*lines, *textwrap.wrap(one.meaning, width, initial_indent="  ", subsequent_indent="  ")]))
    echo("\n\n".join(blocks))
