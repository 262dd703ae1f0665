"""The commands for what a soup is made of: checkpoints and estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ray_soup.cli.group import main, out_argument, overrides_argument, overwrite_option, recipe_argument
from ray_soup.exits import common_options, run_task
from ray_soup.recipe import load_recipe
from ray_soup.soups.report.terminal import ProgressBar, echo, print_ingredients, print_json, say
from ray_soup.soups.report.zoo import print_zoo


@main.command()
@click.argument("files", metavar="LIST", type=click.Path())
@out_argument
@common_options
def fetch(files: str, out: str, as_json: bool) -> None:
    """Download the files of LIST into the folder OUT.

    Several files are downloaded at a time, and interrupted downloads resume. LIST is a file with one line
    `URL [size in bytes] [SHA-256]` per download, or the name model-soups: the 72 checkpoints of Wortsman et al. 2022.
    """

    def task(progress: ProgressBar) -> list[Path]:
        from ray_soup.io.fetch import fetch as run_fetch

        return run_fetch(files, out, progress)

    found = [(file.name, file.stat().st_size) for file in run_task(task)]
    if as_json:
        print_json({"out": out, "files": [{"file": name, "bytes": nbytes} for name, nbytes in found]})
    else:
        echo(f"All {len(found)} files of the list are in {out}, {sum(nbytes for _, nbytes in found):,} bytes.")


@main.command()
@click.argument("ingredients", nargs=-1, required=True, type=click.Path())
@click.option("--model", help="Check that the checkpoints match this model (same syntax as `model:` in a recipe).")
@common_options
def inspect(ingredients: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Check that checkpoints fit together, and show their tensors.

    Shows names, shapes, dtypes and sizes. Reads headers only.
    """
    from ray_soup.task.inspection import inspect as run_inspect

    print_ingredients(run_inspect(ingredients, model), as_json)


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@overwrite_option
@common_options
def finetune(recipe: str, out: str, overrides: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Fine-tune checkpoints by random search (Ray Tune).

    The checkpoints, and manifest.json with their hyperparameters, are written to OUT.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.finetune import finetune as run_finetune

        return run_finetune(load_recipe(recipe, overrides), out, progress, overwrite)

    was_complete = not overwrite and (Path(out).expanduser() / "manifest.json").exists()
    show_zoo(run_task(task), out, was_complete, as_json)


def show_zoo(entries: Any, out: str, was_complete: bool, as_json: bool) -> None:
    """Print the fine-tuned checkpoints in OUT, and whether this command made them."""
    if was_complete:
        say(f"{out} is complete; nothing was run.")
    if as_json:
        print_json({"out": out, "ingredients": entries})
        return
    from ray_soup.tune.records import read_failures

    print_zoo(entries, read_failures(Path(out).expanduser() / "state" / "failures.json"), out, was_complete)


@main.command()
@recipe_argument
@overrides_argument
@common_options
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Estimate the memory, traffic and time of `learn`.

    Reads headers and measures for a few seconds on the cluster. Also shows the mesh: the number of replicas and shards.
    """

    def task(progress: ProgressBar) -> tuple[dict[str, Any], list[list[str]]]:
        from ray_soup.soups.plan import lines
        from ray_soup.soups.plan import plan as run_plan

        found = run_plan(load_recipe(recipe, overrides), progress)
        return found, lines(found)

    found, lines = run_task(task)
    if as_json:
        print_json(found)
        return
    for name, text in lines:
        echo(f"{name:<15} {text}")
