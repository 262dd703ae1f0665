"""The command that finishes an interrupted run, whichever command began it."""

from __future__ import annotations

from typing import Any

from ray_soup.cli.group import main, out_argument, overrides_argument
from ray_soup.cli.inputs import show_zoo
from ray_soup.exits import common_options, run_task
from ray_soup.soups.report.terminal import ProgressBar, print_comparison, print_soup, print_trials


@main.command()
@out_argument
@overrides_argument
@common_options
def resume(out: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Finish the run in OUT.

    Reruns the command that OUT was begun with, whichever it was, with the recipe and options in OUT/state. The result is
    bit-identical to that of an undisturbed run. KEY=VALUE may change keys of `actors`. A finished run is shown, and nothing
    is run.
    """

    def task(progress: ProgressBar) -> Any:
        from ray_soup.tune.resume import resume as run_resume

        return run_resume(out, overrides, progress)

    done = run_task(task)
    if done.soup is None:
        show_zoo(done.entries, out, done.was_complete, as_json)
    elif done.command == "compare":
        print_comparison(done.soup, as_json)
    else:
        if "search" in done.soup.record and not as_json:
            print_trials(done.soup.record)
        print_soup(done.soup, as_json)
