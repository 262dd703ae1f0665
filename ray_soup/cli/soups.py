"""The commands that make soups."""

from __future__ import annotations

from typing import Any

import click

from ray_soup.cli.group import (
    comparable,
    load_recipe,
    main,
    out_argument,
    overrides_argument,
    overwrite_option,
    recipe_argument,
    require_improvement_option,
)
from ray_soup.errors import RecipeError
from ray_soup.exits import check_improvement, common_options, run_task
from ray_soup.recipe import LEARNED, METHODS, SCHEDULES, method_info
from ray_soup.soups.report.marks import check_marks
from ray_soup.soups.report.terminal import ProgressBar, echo, print_comparison, print_soup, print_trials


@main.command()
@click.argument("out", default="ray-soup-demo", type=click.Path())
@overwrite_option
@common_options
def demo(out: str, overwrite: bool, as_json: bool) -> None:
    """Fine-tune 12 small models on digits and compare their soups.

    The data, checkpoints, recipe and soups are written to OUT. This takes several minutes on two cores.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.demo import demo as run_demo

        return run_demo(out, progress, overwrite)

    soup = run_task(task)
    print_comparison(soup, as_json)
    if not as_json:
        folder = str(soup.out).rpartition("/")[0]
        further = "" if "://" in folder else f" Try next: ray-soup learn {folder}/recipe.yaml my_soup"
        echo(f"Data, checkpoints and recipe are in {folder}.{further}")


def _soup_command(name: str, methods: tuple[str, ...], text: str) -> None:
    """Add a command that makes one soup, by one of some methods; if there are several, the recipe or --method chooses."""
    method = methods[0] if len(methods) == 1 else None

    @recipe_argument
    @out_argument
    @overrides_argument
    @overwrite_option
    @common_options
    def command(recipe: str, out: str, overrides: tuple[str, ...], overwrite: bool, as_json: bool, **options: Any) -> None:
        required = options.get("require_improvement", False)

        def task(progress: ProgressBar) -> Any:
            from ray_soup.soups.run import run

            loaded = comparable(load_recipe(recipe, overrides, method or options.get("method")), required)
            if loaded.method not in methods and not (name == "learn" and loaded.info.is_own):
                raise RecipeError(
                    f"`ray-soup {name}` supports the methods {', '.join(methods)}; the recipe has {loaded.method}. Run "
                    f"`ray-soup {_command_for(loaded.method)}`, or choose a method with --method."
                )
            return run(loaded, out, progress, overwrite=overwrite)

        soup = run_task(task)
        print_soup(soup, as_json)
        check_improvement(required, soup)

    if method is None or not METHODS[method].is_reference:
        command = require_improvement_option(command)
    if method is None:
        own = "|package.module:function" if name == "learn" else ""
        kind = {"metavar": f"[{'|'.join(methods)}{own}]"} if own else {"type": click.Choice(methods)}
        command = click.option("--method", **kind, help="Default: the method in the recipe.")(command)
    main.command(name, help=text)(command)


def _command_for(method: str) -> str:
    """Return the command that makes soups by a method."""
    if method in LEARNED or method_info(method).is_own:
        return "learn"
    return "schedule" if method in SCHEDULES else method.replace("_", "-")


_soup_command(
    "learn",
    LEARNED,
    "Learn the coefficients of a soup.\n\nUses MEHL-Soup, Learned-Soup, or a function of yours, as in method: "
    "package.module:function. Writes the soup to OUT.",
)
_soup_command(
    "schedule",
    SCHEDULES,
    "Mix the last checkpoints of one run.\n\nThe weights amount to a decay of the learning rate (WSM), or to a moving "
    "average. How many checkpoints are mixed is chosen on held-out data. Writes the soup to OUT.",
)
for _info in METHODS.values():
    if _info.kind == "selection":
        _soup_command(_command_for(_info.name), (_info.name,), f"{_info.description}\n\nThe result is written to OUT.")


def _integers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(",") if number)
    except ValueError:
        raise click.BadParameter(f"found {value!r}; expected integers separated by commas, as in 0,2,4.") from None


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@click.option("--seeds", default=1, show_default=True, help="Repeat with N seeds; show means and standard deviations.")
@click.option("--drop-top", default="", callback=_integers, metavar="N,...", help="Repeat without the N best ingredients.")
@click.option("--by-count", default="", callback=_integers, metavar="N,...", help="Repeat with only N ingredients.")
@click.option("--trained/--no-trained", default=True, help="Also train all weights on the same data, as a reference.")
@require_improvement_option
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--into", type=click.Path(), help="Write the tables into a file, between two lines <!-- ray-soup compare -->.")
@overwrite_option
@common_options
def compare(
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    seeds: int,
    drop_top: tuple[int, ...],
    by_count: tuple[int, ...],
    trained: bool,
    require_improvement: bool,
    markdown: bool,
    into: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make every soup and compare them in one table.

    The table lists the best single ingredient, the ensemble, and the soups uniform, greedy, learned(+) and mehl(+); mehl(+)
    is also made with model batches. If all ingredients are steps of one run, schedules and the last step are added. The row
    `trained` is no soup: all weights, trained on the same data from the uniform soup. OUT/report.html has the tables and
    figures. The soup that is best on select, by NLL unless select_by names another figure, is written to OUT. Test data is
    used for reporting only. Rerun it with more seeds, or another N, to add these to a finished comparison.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.soups.compare import compare as run_compare
        from ray_soup.soups.comparison import CompareOptions

        loaded = comparable(load_recipe(recipe, overrides), require_improvement)
        return run_compare(loaded, out, CompareOptions(seeds, drop_top, by_count, trained), progress, overwrite)

    if into:
        check_marks(into)
    soup = run_task(task)
    print_comparison(soup, as_json, markdown, into)
    check_improvement(require_improvement, soup)


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@require_improvement_option
@overwrite_option
@common_options
def search(
    recipe: str, out: str, overrides: tuple[str, ...], require_improvement: bool, overwrite: bool, as_json: bool
) -> None:
    """Search over recipe keys with Ray Tune.

    Varies learn.lr and learn.model_batch, or the keys in the section `search`, and writes the best soup to OUT.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.search import search as run_search

        return run_search(comparable(load_recipe(recipe, overrides), require_improvement), out, progress, overwrite)

    soup = run_task(task)
    if not as_json:
        print_trials(soup.record)
    print_soup(soup, as_json)
    check_improvement(require_improvement, soup)
