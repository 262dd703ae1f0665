"""The `ray-soup` command: each subcommand is a thin shell around one function of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ray_soup import __version__
from ray_soup.errors import RecipeError
from ray_soup.exits import Shell, check_improvement, common_options, run_task
from ray_soup.recipe import LEARNED, METHODS, RESERVED_NAMES, SCHEDULES, Recipe, load_recipe
from ray_soup.soups.report.terminal import (
    ProgressBar,
    echo,
    print_comparison,
    print_evaluation,
    print_ingredients,
    print_json,
    print_soup,
    print_trials,
    print_zoo,
    say,
)

require_improvement_option = click.option(
    "--require-improvement", is_flag=True, help="Exit with code 4 if the soup does not beat the best ingredient on select."
)
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
recipe_argument = click.argument("recipe", type=click.Path())
out_argument = click.argument("out", type=click.Path())


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


@main.command()
@click.argument("out", default="ray-soup-demo", type=click.Path())
@common_options
def demo(out: str, as_json: bool) -> None:
    """Fine-tune 12 small models on digits and compare their soups.

    The data, checkpoints, recipe and soups are written to OUT. This takes several minutes on two cores.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.demo import demo as run_demo

        return run_demo(out, progress)

    soup = run_task(task)
    print_comparison(soup, as_json)
    if not as_json:
        folder = soup.out.parent
        echo(f"Data, checkpoints and recipe are in {folder}. Try next: ray-soup learn {folder}/recipe.yaml my_soup")


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
    from ray_soup.io.check import left_out_notes
    from ray_soup.io.find import find_sweeps, open_ingredients
    from ray_soup.task.adapters import bound_to

    spec: Any = list(ingredients) if len(ingredients) > 1 else ingredients[0]
    notes: list[str] = []
    found = open_ingredients(spec, RESERVED_NAMES, notes)
    notes += [note for sweep in find_sweeps(spec) if (note := sweep.note())]
    bound, names = bound_to(found, model)
    print_ingredients(bound, names, as_json)
    for note in (*notes, *left_out_notes(bound)):
        say(note)


def _comparable(recipe: Recipe, required: bool) -> Recipe:
    """Return the recipe. Raises RecipeError if an improvement is required and there is nothing to measure it with."""
    if required and (recipe.data.fit is None or recipe.baseline == "none"):
        lacks = "no data.fit, held-out data to compare on" if recipe.data.fit is None else "baseline: none"
        raise RecipeError(
            f"--require-improvement compares the soup with the best ingredient on select, but the recipe has {lacks}. "
            "Change the recipe, or omit the option."
        )
    return recipe


def _soup_command(name: str, methods: tuple[str, ...], text: str) -> None:
    """Add a command that makes one soup, by one of some methods; if there are several, the recipe or --method chooses."""
    method = methods[0] if len(methods) == 1 else None

    @recipe_argument
    @out_argument
    @overrides_argument
    @common_options
    def command(recipe: str, out: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
        required = options.get("require_improvement", False)

        def task(progress: ProgressBar) -> Any:
            from ray_soup.soups.run import run

            loaded = _comparable(load_recipe(recipe, overrides, method or options.get("method")), required)
            if loaded.method not in methods:
                raise RecipeError(
                    f"`ray-soup {name}` supports the methods {', '.join(methods)}; the recipe has {loaded.method}. Run "
                    f"`ray-soup {_command_for(loaded.method)}`, or choose a method with --method."
                )
            return run(loaded, out, progress)

        soup = run_task(task)
        print_soup(soup, as_json)
        check_improvement(required, soup)

    if method is None or not METHODS[method].is_reference:
        command = require_improvement_option(command)
    if method is None:
        command = click.option("--method", type=click.Choice(methods), help="Default: the method in the recipe.")(command)
    main.command(name, help=text)(command)


def _command_for(method: str) -> str:
    """Return the command that makes soups by a method."""
    return "learn" if method in LEARNED else "schedule" if method in SCHEDULES else method.replace("_", "-")


_soup_command(
    "learn", LEARNED, "Learn the coefficients of a soup.\n\nUses MEHL-Soup or Learned-Soup. Writes the soup to OUT."
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
    as_json: bool,
) -> None:
    """Make every soup and compare them in one table.

    The table lists the best single ingredient, the ensemble, and the soups uniform, greedy, learned(+) and mehl(+); mehl(+)
    is also made with model batches. If all ingredients are steps of one run, schedules and the last step are added. The row
    `trained` is no soup: all weights, trained on the same data from the uniform soup. OUT/report.html has the tables and
    figures. The soup that is best on select, by NLL unless select_by names another figure, is written to OUT. Test data is
    used for reporting only.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.soups.compare import compare as run_compare
        from ray_soup.soups.comparison import CompareOptions

        loaded = _comparable(load_recipe(recipe, overrides), require_improvement)
        return run_compare(loaded, out, CompareOptions(seeds, drop_top, by_count, trained), progress)

    soup = run_task(task)
    if soup.was_complete:
        say(f"{soup.out} is complete; nothing was run.")
    print_comparison(soup, as_json, markdown, into)
    check_improvement(require_improvement, soup)


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@common_options
def finetune(recipe: str, out: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Fine-tune checkpoints by random search (Ray Tune).

    The checkpoints, and manifest.json with their hyperparameters, are written to OUT.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.finetune import finetune as run_finetune

        return run_finetune(load_recipe(recipe, overrides), out, progress)

    entries = run_task(task)
    if as_json:
        print_json({"out": out, "ingredients": entries})
    else:
        from ray_soup.tune.records import read_failures

        print_zoo(entries, read_failures(Path(out) / "state" / "failures.json"), out)


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@require_improvement_option
@common_options
def search(recipe: str, out: str, overrides: tuple[str, ...], require_improvement: bool, as_json: bool) -> None:
    """Search over recipe keys with Ray Tune.

    Varies learn.lr and learn.model_batch, or the keys in the section `search`, and writes the best soup to OUT.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.search import search as run_search

        return run_search(_comparable(load_recipe(recipe, overrides), require_improvement), out, progress)

    soup = run_task(task)
    if not as_json:
        print_trials(soup.record)
    print_soup(soup, as_json)
    check_improvement(require_improvement, soup)


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


@main.command()
@recipe_argument
@click.argument("model", type=click.Path())
@overrides_argument
@click.option("--split", default="test", show_default=True, help="fit, select, test, or test_NAME.")
@common_options
def evaluate(recipe: str, model: str, overrides: tuple[str, ...], split: str, as_json: bool) -> None:
    """Evaluate a checkpoint or a soup on a split of the data.

    Prints the figures of MODEL, which is a checkpoint or the folder of a soup. If it is a folder, the recipe's function
    `evaluate` is called too.
    """

    def task(progress: ProgressBar) -> dict[str, Any]:
        from ray_soup.soups.finished import evaluate as run_evaluate

        return run_evaluate(load_recipe(recipe, overrides), model, split, progress)

    print_evaluation(run_task(task), as_json)


@main.command()
@out_argument
@click.argument("newout", type=click.Path())
@common_options
def bake(out: str, newout: str, as_json: bool) -> None:
    """Rebuild the soup in OUT and write it to NEWOUT.

    The model is computed from its coefficients and ingredients alone.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.soups.finished import bake_copy

        return bake_copy(out, newout, progress)

    print_soup(run_task(task), as_json)


@main.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), default="bash")
def completion(shell: str) -> None:
    """Print the script for tab completion.

    The script completes commands, options and files. For bash, add this line to ~/.bashrc:
    eval "$(ray-soup completion bash)". For zsh, add the same line with zsh instead of bash to ~/.zshrc. For fish, add to
    config.fish: ray-soup completion fish | source
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    echo(found(main, {}, "ray-soup", "_RAY_SOUP_COMPLETE").source())


@main.command()
@out_argument
@common_options
def verify(out: str, as_json: bool) -> None:
    """Check a finished soup.

    Compares the digests of the files in OUT and of the ingredients with run.json, and the model, bit for bit, with the one
    computed from its coefficients and ingredients. Checks that the coefficients of each block sum to 1.
    """

    def task(progress: ProgressBar) -> list[str]:
        from ray_soup.soups.finished import verify as run_verify

        return run_verify(out, progress)

    checked = run_task(task)
    if as_json:
        print_json({"out": out, "verified": checked})
        return
    for line in checked:
        echo(f"ok: {line}")


if __name__ == "__main__":
    main()
