"""The `ray-soup` command."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ray_soup import __version__
from ray_soup.errors import SoupError

METHODS = ("learned", "learned+", "mehl", "mehl+")


class Progress:
    """A bar on a terminal for what lasts; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bars: Any = None
        self._what = ""
        self._began = self._told = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self.stop()
            self._what, self._began, self._told = what, now, now
        if self._console.is_terminal:
            self._draw(what, done, total)
        elif now - self._told > 10:
            self._told = now
            self._console.print(f"{what}: {done} of {total} ({now - self._began:.0f} s)", highlight=False)

    def _draw(self, what: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._bars.start()
            self._task = self._bars.add_task(what, total=total)
        self._bars.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


@contextmanager
def _errors() -> Iterator[None]:
    """An error is a message and its exit code, never a traceback."""
    try:
        yield
    except SoupError as error:
        click.echo(f"ray-soup: {error}", err=True)
        context = click.get_current_context(silent=True)
        if context is not None and context.params.get("as_json"):
            click.echo(json.dumps({"error": str(error), "exit": error.exit_code}))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("ray-soup: interrupted. The same command goes on from here.", err=True)
        sys.exit(130)


def _work(task: Callable[[Progress], Any]) -> Any:
    with _errors():
        progress = Progress()
        try:
            progress("starting", 0, 1)  # Ray and the libraries take seconds to come up
            return task(progress)
        finally:
            progress.stop()


def _print_row(row: dict[str, Any]) -> None:
    """One model, a figure a line: side by side they do not fit into 80 columns."""
    from ray_soup.report import COST, quality, table

    (model, *names), ((name, *figures),) = table([row], [*quality([row]), *COST])
    _print_table([model, name], [list(line) for line in zip(names, figures, strict=True)])


def _print_table(head: list[str], cells: list[list[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*head, box=box.SIMPLE, padding=(0, 1, 0, 0))  # fits into 80 columns
    for number, column in enumerate(shown.columns):
        column.justify, column.no_wrap = ("right" if number else "left"), True
    for line in cells:
        shown.add_row(*line)
    Console().print(shown)


def _print_soup(soup: Any, as_json: bool) -> None:
    if soup.was_complete:
        click.echo(f"{soup.out} is complete; nothing was run. `ray-soup verify {soup.out}` checks it.", err=True)
    for note in soup.notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps({"out": str(soup.out), "results": soup.rows, "run": soup.record}))
        return
    _print_row(soup.rows[0])
    model = max((name for name in soup.record["files"] if name.startswith("model")), default="model.safetensors")
    click.echo(f"Wrote {soup.out}/{model}, its coefficients, and README.md, the model card.")


json_option = click.option("--json", "as_json", is_flag=True, help="Print one machine-readable object last, of errors too.")
overrides_argument = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
recipe_argument = click.argument("recipe", type=click.Path())
out_argument = click.argument("out", type=click.Path())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ray-soup")
def main() -> None:
    """Turn the checkpoints of a sweep into one model, better than the best of them.

    A recipe (YAML) names ingredients, model and held-out data; KEY=VALUE after it overrides a key, as in learn.lr=0.02.
    Running the same command again on the same OUT resumes it.
    Exit codes: 0 done, 1 failed, 2 usage, recipe or data, 3 ingredients, 4 no improvement where one was required, 130
    interrupted.
    """


@main.command()
@click.argument("out", default="ray-soup-demo", type=click.Path())
@json_option
def demo(out: str, as_json: bool) -> None:
    """Real digits, a zoo of 12 fine-tuned on the spot, every soup of it in one table. Minutes on two cores."""

    def task(progress: Progress) -> Any:
        from ray_soup.demo import demo as run_demo

        return run_demo(out, progress)

    soup = _work(task)
    _print_comparison(soup, False, None, as_json)
    if not as_json:
        click.echo(
            f"Digits, zoo and recipe lie in {soup.out.parent}. Next: ray-soup learn {soup.out.parent}/recipe.yaml my_soup"
        )


@main.command()
@click.argument("files", metavar="LIST", type=click.Path())
@out_argument
@json_option
def fetch(files: str, out: str, as_json: bool) -> None:
    """Fetch the files of LIST into the folder OUT, several at a time; what was cut off is gone on with.

    LIST has a line for each file, `URL [size in bytes] [SHA-256]`, or is model-soups: the 72 checkpoints of Wortsman et al.
    """

    def task(progress: Progress) -> Any:
        from ray_soup.fetch import fetch as run_fetch

        return run_fetch(files, out, progress)

    found = [{"file": file.name, "bytes": file.stat().st_size} for file in _work(task)]
    if as_json:
        click.echo(json.dumps({"out": out, "files": found}))
        return
    click.echo(f"{len(found)} files, {sum(f['bytes'] for f in found):,} bytes, are in {out}.")


@main.command()
@click.argument("ingredients", nargs=-1, required=True, type=click.Path())
@click.option("--model", help="Hold them against this model, as in a recipe.")
@json_option
def inspect(ingredients: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Keys, shapes, dtypes, bytes and faults of checkpoints; reads headers only."""
    with _errors():
        from ray_soup.checkpoints import check_floats, check_together, open_ingredients

        found = open_ingredients(list(ingredients) if len(ingredients) > 1 else ingredients[0])
        shapes, tied, parameters = None, None, ()
        if model:
            from ray_soup.models import describe

            layout = describe(model)
            shapes, tied, parameters = layout.state_shapes, layout.tied, layout.names
        names = check_together(found, shapes, tied)
        check_floats(found, parameters)
        first = found[0].tensors
        numbers = sum(first[name].numel for name in names)
        nbytes = sum(i.nbytes for i in found)
        if as_json:
            tensors = {name: [str(first[name].dtype).removeprefix("torch."), list(first[name].shape)] for name in names}
            listed = [{"name": i.name, "path": i.path, "bytes": i.nbytes} for i in found]
            click.echo(json.dumps({"ingredients": listed, "tensors": tensors, "numbers": numbers, "bytes": nbytes}))
            return
        for name in names:
            click.echo(f"{name:<60} {first[name]}")
        for ingredient in found:
            click.echo(f"{ingredient.name:<40} {ingredient.nbytes:>15,} bytes  {ingredient.path}")
        click.echo(
            f"{len(found)} ingredients fit together: {len(names)} tensors, {numbers:,} numbers each, {nbytes:,} bytes."
        )


def _soup_command(name: str, method: str | None, text: str) -> None:
    @recipe_argument
    @out_argument
    @overrides_argument
    @json_option
    def command(recipe: str, out: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
        chosen = method or options.get("method")

        def task(progress: Progress) -> Any:
            from ray_soup.errors import RecipeError
            from ray_soup.pipeline import LEARNED, run
            from ray_soup.recipe import load_recipe

            loaded = load_recipe(recipe, overrides, chosen)
            if method is None and loaded.method not in LEARNED:
                raise RecipeError(f"`learn` takes the methods {', '.join(LEARNED)}; the recipe says {loaded.method}.")
            return run(loaded, out, progress)

        _print_soup(_work(task), as_json)

    if method is None:
        command = click.option("--method", type=click.Choice(METHODS), help="Default: the recipe's.")(command)
    main.command(name, help=text)(command)


_soup_command("learn", None, "Learn a soup's coefficients (MEHL-Soup, Learned-Soup) and write the soup to OUT.")
_soup_command("uniform", "uniform", "The plain mean of all ingredients.")
_soup_command("greedy", "greedy", "The mean of those ingredients that, from the best down, do not lower its accuracy.")
_soup_command("best-single", "best_single", "The one ingredient that is most accurate on the held-out set.")


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(",") if number)
    except ValueError:
        raise click.BadParameter(f"{value!r} found; expected numbers, as in 0,2,4.") from None


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@click.option("--seeds", default=1, show_default=True, help="Redraw fit/select and the batches; give mean and spread.")
@click.option("--drop-top", default="", callback=_numbers, metavar="0,2,...", help="Also without as many of the best.")
@click.option("--by-count", default="", callback=_numbers, metavar="9,18,...", help="Also with only as many ingredients.")
@click.option("--require-improvement", is_flag=True, help="Exit with 4 if no soup beats the best single on select.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@click.option("--into", type=click.Path(), help="Write them between two lines <!-- ray-soup compare --> of this file.")
@json_option
def compare(
    recipe: str,
    out: str,
    overrides: tuple[str, ...],
    seeds: int,
    drop_top: tuple[int, ...],
    by_count: tuple[int, ...],
    require_improvement: bool,
    markdown: bool,
    into: str | None,
    as_json: bool,
) -> None:
    """Every soup and its references in one table; the best on select is written to OUT, with report.html.

    Best single, uniform, greedy, Learned-Soup(+), MEHL-Soup(+) with all ingredients and with model batches, and the logit
    ensemble. Test is only reported on.
    """

    def task(progress: Progress) -> Any:
        from ray_soup.compare import Options
        from ray_soup.compare import compare as run_compare
        from ray_soup.recipe import load_recipe

        return run_compare(load_recipe(recipe, overrides), out, Options(seeds, drop_top, by_count), progress)

    soup = _work(task)
    if soup.was_complete:
        click.echo(f"{soup.out} is complete; nothing was run.", err=True)
    with _errors():
        _print_comparison(soup, markdown, into, as_json)
    if require_improvement and soup.record["improvement"]["select_nll"] >= 0:
        click.echo("ray-soup: no improvement, and one was required.", err=True)
        sys.exit(4)


def _print_comparison(soup: Any, markdown: bool, into: str | None, as_json: bool) -> None:
    from ray_soup.outcomes import judged
    from ray_soup.report import AGAINST, COST, comparison_markdown, insert, quality, series_table, table, tests_table, titled

    record = soup.record
    if into:
        insert(comparison_markdown(record), into)
        click.echo(f"Wrote the tables into {into}.", err=True)
    if markdown:
        click.echo(comparison_markdown(record))
    for note in soup.notes:
        click.echo(note, err=True)
    if as_json:
        click.echo(json.dumps({"out": str(soup.out), "results": soup.rows, "run": record}))
    if markdown or as_json:
        return
    splits, rows = judged(record["examples"]), record["table"]
    columns = [c for c in quality(rows) if c[0] != "select_accuracy"]
    if len(splits) == 1:
        _print_table(*table(rows, columns))  # 80 columns
    else:
        _print_table(*table(rows, [columns[0], *(c for c in columns if c[0].endswith("_accuracy"))]))
        for figure in ("_metric", "_nll"):
            some = [c for c in columns if c[0].endswith(figure) and any(c[0] in row for row in rows)]
            if some:
                _print_table(*table(rows, [columns[0], *some]))
    _print_table(*table(rows, [*quality(rows)[:2], *COST]))
    for title, key, name in (("Without the best", "dropped", "eliminations"), ("By number", "count", "counts")):
        for split in splits if record[name] else ():
            click.echo(f"{title}, accuracy on {titled(split)} in percent:")
            _print_table(*series_table(record[name], key, split))
    for split in splits if record["tests"] else ():
        for other in AGAINST:
            click.echo(f"Paired tests against {other}, on {titled(split)}:")
            _print_table(*tests_table(record["tests"], other, split))
    click.echo(f"Wrote {soup.out}/report.html, the tables and figures, and model.safetensors: {record['chosen']}.")


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@json_option
def finetune(recipe: str, out: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Fine-tune a zoo of ingredients by random search (Ray Tune) and write it to OUT."""

    def task(progress: Progress) -> Any:
        from ray_soup.finetune import finetune as run_finetune
        from ray_soup.recipe import load_recipe

        return run_finetune(load_recipe(recipe, overrides), out, progress)

    entries = _work(task)
    if as_json:
        click.echo(json.dumps({"out": out, "ingredients": entries}))
        return
    for entry in entries:
        accuracy = f"  held-out accuracy {entry['accuracy']:.2%}" if "accuracy" in entry else ""
        click.echo(f"{entry['file']}  lr {entry['lr']:.1e}  epochs {entry['epochs']}{accuracy}")
    failures = json.loads((Path(out) / "state" / "failures.json").read_text())
    if failures:
        click.echo(f"{len(failures)} more failed ({out}/state/failures.json), the first: {failures[0]['error']}")
    click.echo(f"Wrote {len(entries)} checkpoints and manifest.json to {out}.")


@main.command()
@recipe_argument
@out_argument
@overrides_argument
@json_option
def search(recipe: str, out: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Ray Tune over learn.lr, learn.model_batch and other keys that `search:` names; the best soup is written to OUT."""

    def task(progress: Progress) -> Any:
        from ray_soup.recipe import load_recipe
        from ray_soup.search import search as run_search

        return run_search(load_recipe(recipe, overrides), out, progress)

    soup = _work(task)
    if not as_json:
        from ray_soup.report import trials_table

        found = soup.record["search"]
        for title, which in (("Trials", "trials"), ("Pareto front of NLL, memory and time", "pareto")):
            click.echo(f"{title}:")
            _print_table(*trials_table(found, which))
        click.echo(f"Best: trial {found['best']}.")
    _print_soup(soup, as_json)


@main.command()
@recipe_argument
@overrides_argument
@json_option
def plan(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Mesh, memory, traffic and time of `learn`, before it starts: from headers and a calibration of seconds."""

    def task(progress: Progress) -> Any:
        from ray_soup.plan import plan as run_plan
        from ray_soup.recipe import load_recipe

        return run_plan(load_recipe(recipe, overrides), progress)

    found = _work(task)
    if as_json:
        click.echo(json.dumps(found))
        return
    from ray_soup.plan import lines

    for name, text in lines(found):
        click.echo(f"{name:<15} {text}")


@main.command()
@recipe_argument
@click.argument("model", type=click.Path())
@overrides_argument
@click.option("--split", default="test", show_default=True, help="fit, select, test, or test_NAME.")
@json_option
def evaluate(recipe: str, model: str, overrides: tuple[str, ...], split: str, as_json: bool) -> None:
    """Accuracy and NLL of MODEL, a checkpoint or a soup's folder, on a split."""

    def task(progress: Progress) -> Any:
        from ray_soup.pipeline import evaluate as run_evaluate
        from ray_soup.recipe import load_recipe

        return run_evaluate(load_recipe(recipe, overrides), model, split, progress)

    row = _work(task)
    click.echo(json.dumps(row)) if as_json else _print_row(row)


@main.command()
@out_argument
@click.argument("newout", type=click.Path())
@json_option
def bake(out: str, newout: str, as_json: bool) -> None:
    """The model in OUT again, from its coefficients and ingredients alone, written to NEWOUT."""

    def task(progress: Progress) -> Any:
        from ray_soup.pipeline import bake_again

        return bake_again(out, newout, progress)

    _print_soup(_work(task), as_json)


@main.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), default="bash")
def completion(shell: str) -> None:
    """The script that lets the Tab key complete commands, options and files.

    Put into ~/.bashrc (or ~/.zshrc, with zsh): eval "$(ray-soup completion bash)". For fish, into config.fish:
    ray-soup completion fish | source
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "ray-soup", "_RAY_SOUP_COMPLETE").source())


@main.command()
@out_argument
@json_option
def verify(out: str, as_json: bool) -> None:
    """Check OUT: hashes, column sums, and the model against its coefficients, bit for bit."""

    def task(progress: Progress) -> Any:
        from ray_soup.pipeline import verify as run_verify

        return run_verify(out, progress)

    checked = _work(task)
    if as_json:
        click.echo(json.dumps({"out": out, "verified": checked}))
        return
    for line in checked:
        click.echo(f"ok: {line}")


if __name__ == "__main__":
    main()
