"""The commands for a finished soup, and the script for tab completion."""

from __future__ import annotations

from typing import Any

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
from ray_soup.soups.report.terminal import ProgressBar, echo, print_evaluation, print_json, print_soup


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
@overwrite_option
@common_options
def bake(out: str, newout: str, overwrite: bool, as_json: bool) -> None:
    """Rebuild the soup in OUT and write it to NEWOUT.

    The model is computed from its coefficients and ingredients alone.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.soups.finished import bake_copy

        return bake_copy(out, newout, progress, overwrite)

    print_soup(run_task(task), as_json)


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
