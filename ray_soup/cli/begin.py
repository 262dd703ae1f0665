"""The commands for the first hour: a recipe for a folder of checkpoints, the keys of a recipe, and what is installed."""

from __future__ import annotations

import os
import shlex
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_soup.cli.group import load_recipe, main, overrides_argument
from ray_soup.errors import RecipeError
from ray_soup.exits import common_options, run_task
from ray_soup.io.disk import write_text
from ray_soup.soups.report.terminal import ProgressBar, echo, print_json, say

if TYPE_CHECKING:
    from ray_soup.soups.first_recipe import FirstRecipe


@main.command()
@click.argument("ingredients", nargs=-1, required=True, type=click.Path())
@click.option("--data", type=click.Path(), help="Held-out data: a file, a folder, or a folder with one file for each split.")
@click.option("--test", type=click.Path(), help="Data that is only reported.")
@click.option("--model", help="The model, if you know it: as `model:` in a recipe.")
@click.option("--out", default="recipe.yaml", show_default=True, type=click.Path(), help="The recipe to write.")
@click.option("--overwrite", is_flag=True, help="Replace the recipe if it exists.")
@common_options
def init(
    ingredients: tuple[str, ...],
    data: str | None,
    test: str | None,
    model: str | None,
    out: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a recipe for a folder of checkpoints.

    Recognizes the model from what training scripts and libraries write, such as timm's arguments, a config.json, Lightning's
    hyperparameters, adapter_config.json or a Ray Tune experiment, otherwise from the names and shapes of tensors. Reads
    headers only. A comment in the recipe, and a line on stderr, name each line that is left to fill in.
    """
    if os.path.lexists(out) and not overwrite:
        raise RecipeError(f"{out} already exists. Name another file with --out, or add --overwrite to replace it.")

    def task(progress: ProgressBar) -> FirstRecipe:
        from ray_soup.soups.first_recipe import first_recipe

        progress("recognizing the model", 0, 1)
        return first_recipe(ingredients, data, test, out, model)

    made = run_task(task)
    write_text(Path(out), made.text)
    for note in made.notes:
        say(note)
    for gap in made.gaps:
        key = gap.partition(":")[0].rpartition(".")[2]
        number = next(n for n, line in enumerate(made.text.splitlines(), 1) if line.strip().startswith(f"{key}:"))
        say(f"ray-soup: {out}, line {number}: {gap}")
    if as_json:
        print_json({"recipe": out, "gaps": made.gaps, "notes": made.notes})
        return
    echo(f"Wrote {out}." if not made.gaps else f"Wrote {out}. Edit it where the lines above say so; then:")
    echo(f"  ray-soup plan {shlex.quote(out)}            # memory, disk and time, before anything runs")
    echo(f"  ray-soup compare {shlex.quote(out)} soups   # every soup in one table")


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


@main.command()
@click.argument("recipe", required=False, type=click.Path())
@overrides_argument
@common_options
def doctor(recipe: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what is installed, and what a recipe still needs.

    Shows versions, devices, free memory and disk, the address of Ray, and the names of credentials. With RECIPE, also
    checks its packages, ingredients, model and data, as a run would before it starts; exits with code 2 if something is
    missing.
    """
    loaded = None if recipe is None else load_recipe(recipe, overrides)

    from ray_soup.soups.doctor import as_json as values_of
    from ray_soup.soups.doctor import diagnose

    found = diagnose(loaded)
    if as_json:
        print_json(values_of(found))
    else:
        for name, text in found.rows.items():
            echo(f"{name:<15} {text}")
    for warning in found.warnings:
        say(f"note: {warning}")
    for missing in found.missing:
        say(f"missing: {missing}")
    if found.missing:
        click.get_current_context().exit(2)
    if recipe is not None and not as_json:
        echo(f"Nothing is missing for {recipe}.")
