"""The command that takes results out of a finished soup."""

from __future__ import annotations

from pathlib import Path

import click

from ray_soup.cli.group import main, out_argument
from ray_soup.exits import common_options, run_task
from ray_soup.io.disk import write_bytes
from ray_soup.soups.report.terminal import ProgressBar, echo, print_json, say


@main.command()
@out_argument
@click.option("--csv", is_flag=True, help="All rows of results.jsonl, in full precision.")
@click.option("--latex", is_flag=True, help="The tables, for the package booktabs.")
@click.option("--markdown", is_flag=True, help="The tables with their legends.")
@click.option("--wandb", is_flag=True, help="Send figures, recipe and report to Weights & Biases.")
@click.option("--mlflow", is_flag=True, help="Send figures, recipe and report to MLflow.")
@click.option("--push", metavar="ORG/NAME", help="Push model and model card to the Hugging Face Hub.")
@click.option("--private", is_flag=True, help="With --push: if the repository is new, make it private.")
@click.option("--to", metavar="FILE", type=click.Path(), help="Write to FILE instead of the terminal; replaces FILE.")
@common_options
def export(out: str, push: str | None, private: bool, to: str | None, as_json: bool, **forms: bool) -> None:
    """Export the results of a finished soup.

    Prints the results in OUT as CSV, LaTeX or Markdown, sends them to a tracker, or pushes the soup to the Hugging Face Hub.
    The trackers and the Hub are set up by their own environment variables, such as WANDB_PROJECT, MLFLOW_TRACKING_URI and
    HF_TOKEN.
    """
    from ray_soup.soups.export import FORMS, export_text
    from ray_soup.soups.push import push as push_soup
    from ray_soup.soups.trackers import TRACKERS, send

    text = [name for name in FORMS if forms[name]]
    trackers = [name for name in TRACKERS if forms[name]]
    _check(text, trackers, push, private, to)
    done: dict[str, str] = {}

    def task(progress: ProgressBar) -> str:
        printed = export_text(out, text[0]) if text else ""
        for tracker in trackers:
            progress(f"sending to {tracker}", 0, 1)
            done[tracker] = send(out, tracker)
        if push:
            done["push"] = push_soup(out, push, private, progress)
        return printed

    printed = run_task(task)
    if to:
        write_bytes(Path(to).resolve(), printed.encode())
        done["file"] = to
    if as_json:
        return print_json({"out": out, **done, **({} if to else dict.fromkeys(text, printed))})
    if printed and not to:
        echo(printed.rstrip("\n"))
    for where in done.values():
        say(f"Exported to {where}.")
    return None


def _check(text: list[str], trackers: list[str], push: str | None, private: bool, to: str | None) -> None:
    """Check that the options fit together. Raises UsageError."""
    if not (text or trackers or push):
        raise click.UsageError("Nothing to export. Add --csv, --latex, --markdown, --wandb, --mlflow or --push ORG/NAME.")
    if len(text) > 1:
        raise click.UsageError(f"Found {' and '.join(f'--{name}' for name in text)}; expected one of them. Choose one.")
    if to and not text:
        raise click.UsageError("--to FILE needs --csv, --latex or --markdown. Add one of them.")
    if private and not push:
        raise click.UsageError("--private needs --push ORG/NAME. Add it.")
