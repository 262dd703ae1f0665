"""The commands for what a soup is made of: checkpoints and estimates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_soup.cli.group import (
    load_recipe,
    main,
    out_argument,
    overrides_argument,
    overwrite_option,
    recipe_argument,
)
from ray_soup.exits import common_options, run_task
from ray_soup.soups.report.terminal import ProgressBar, echo, print_ingredients, print_json, print_table, say
from ray_soup.soups.report.zoo import print_zoo

if TYPE_CHECKING:
    from ray_soup.recipe import Recipe


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

    def task(progress: ProgressBar) -> tuple[Any, bool]:
        from ray_soup.io import storage
        from ray_soup.tune.finetune import finetune as run_finetune

        was_complete = not overwrite and storage.isfile(storage.join(_expanded(out), "manifest.json"))
        return run_finetune(load_recipe(recipe, overrides), out, progress, overwrite), was_complete

    entries, was_complete = run_task(task)
    show_zoo(entries, out, was_complete, as_json)


def _expanded(out: str) -> str:
    """Return OUT with `~` as in a shell, if it is a folder."""
    return out if "://" in out else os.path.expanduser(out)


def show_zoo(entries: Any, out: str, was_complete: bool, as_json: bool) -> None:
    """Print the fine-tuned checkpoints in OUT, and whether this command made them."""
    from ray_soup.io import storage
    from ray_soup.io.lease import state_folder
    from ray_soup.tune.records import read_failures, read_notes

    if was_complete:
        say(f"{out} is complete; nothing was run.")
    for note in read_notes(_expanded(out)):
        say(note)
    if as_json:
        print_json({"out": out, "ingredients": entries})
        return

    failures = read_failures(storage.join(state_folder(_expanded(out)), "failures.json"))
    print_zoo(entries, failures, out, was_complete)


@main.command()
@recipe_argument
@overrides_argument
@click.option("--cluster", help="Plan for a cluster of such nodes: '8 x H100-80GB, 100 Gbit', '4 x CPU' or here.")
@click.option("--nodes", default="1", show_default=True, help="Numbers of nodes, as in 1,2,4,8. Needs --cluster.")
@click.option("--price", type=click.FloatRange(min=0), help="Price of a node per hour. Needs --cluster.")
@click.option("--ingredients", type=click.IntRange(1), help="Plan for this many checkpoints, without them. Needs --cluster.")
@click.option("--examples", type=click.IntRange(1), help="Plan for this many examples of each source, without them.")
@common_options
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    nodes: str,
    price: float | None,
    ingredients: int | None,
    examples: int | None,
    as_json: bool,
) -> None:
    """Estimate the memory, traffic and time of `learn`.

    Reads headers and measures for a few seconds on the cluster. Also shows the mesh: the number of replicas and shards.

    With --cluster, estimates a run on a cluster that need not exist: from published figures of its devices, or, for CPU and
    here, from what is measured on this machine. With --ingredients and --examples, it needs neither checkpoints nor data.
    """
    loaded = load_recipe(recipe, overrides)
    if cluster is not None:
        _plan_cluster(loaded, cluster, _numbers(nodes), (price, ingredients, examples), as_json)
        return
    needing = {"--nodes": nodes != "1", "--price": price, "--ingredients": ingredients, "--examples": examples}
    given = [name for name, value in needing.items() if value]
    if given:
        raise click.UsageError(f"{given[0]} is for the plan of another cluster. Add --cluster, or omit it.")

    def task(progress: ProgressBar) -> tuple[dict[str, Any], list[list[str]]]:
        from ray_soup.soups.plan import lines
        from ray_soup.soups.plan import plan as run_plan

        found = run_plan(loaded, progress)
        return found, lines(found)

    found, lines = run_task(task)
    if as_json:
        print_json(found)
        return
    for name, text in lines:
        echo(f"{name:<15} {text}")


def _numbers(text: str) -> list[int]:
    """Read numbers of nodes, separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"found {text!r}; expected whole numbers, as in 1,2,4,8.", param_hint="--nodes") from None


def _plan_cluster(
    recipe: Recipe, cluster: str, nodes: list[int], stated: tuple[float | None, int | None, int | None], as_json: bool
) -> None:
    """Print the plan for a cluster; `stated` are the price of a node, and the numbers of ingredients and of examples."""

    def task(progress: ProgressBar) -> dict[str, Any]:
        from ray_soup.soups.cluster_plan.predict import plan_cluster

        return plan_cluster(recipe, cluster, nodes, *stated, progress)

    found = run_task(task)
    if as_json:
        print_json(found)
        return
    from ray_soup.soups.cluster_plan.text import closing, lines, table

    for name, text in lines(found):
        echo(f"{name:<15} {text}")
    print_table(*table(found))
    for sentence in closing(found):
        echo(sentence)
