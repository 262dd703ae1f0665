"""The outer shell of the command: every way in which it can end, with its message, its exit code and its JSON.

A command raises; here the exception becomes a sentence on stderr, an object on stdout under --json, and an exit code. No
traceback is shown unless --traceback asks for it.
"""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ray_soup.errors import OutputClosed, RecipeError, Stopped, explain
from ray_soup.io.environment import check_environment, wants_traceback
from ray_soup.io.signals import catching_signals
from ray_soup.soups.report.console import LOG_FORMATS, as_said, flush, log_as, print_json, say, unwritable
from ray_soup.soups.report.json_log import json_log
from ray_soup.soups.report.progress_bar import ProgressBar
from ray_soup.soups.trackers import given_up

if TYPE_CHECKING:
    from ray_soup.soups.output import Soup

T = TypeVar("T")

F = TypeVar("F", bound=Callable[..., Any])

LOG_FORMAT = "--log-format"


def common_options(command: F) -> F:
    """Add --json, --log-format and --traceback, which `Shell` handles."""
    as_json = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line, even if the command fails."
    )
    with_traceback = click.option(
        "--traceback", is_flag=True, expose_value=False, help="Show the whole traceback of an error."
    )
    with_log_format = click.option(
        LOG_FORMAT,
        type=click.Choice(LOG_FORMATS),
        default=LOG_FORMATS[0],
        show_default=True,
        expose_value=False,
        help="Format of stderr: sentences, or one JSON object per line.",
    )
    return as_json(with_log_format(with_traceback(command)))


def run_task(task: Callable[[ProgressBar], T]) -> T:
    """Run the work of a command, and show its progress from its first moment on."""
    check_environment()
    with ProgressBar() as progress:
        progress("starting", 0, 1)  # importing Ray and torch takes seconds
        return task(progress)


def check_improvement(required: bool, soup: Soup) -> None:
    """End with exit code 4 if an improvement is required and the soup is not better than the best ingredient on select.

    Raises RecipeError if the finished soup was never compared with it.
    """
    if not required:
        return
    from ray_soup.soups.report.measures import measures_in

    change, measures = soup.record.get("improvement"), measures_in(soup.record)
    if not change:
        raise RecipeError(
            f"{soup.out}/run.json does not compare the soup with the best ingredient: an older ray_soup wrote it. Choose a "
            "new folder, or omit --require-improvement."
        )
    if not measures.improved(change):
        better = measures.better(measures.decisive(change))
        say(f"ray-soup: the soup does not have a {better} on select than the best single ingredient. Use that one.")
        click.get_current_context().exit(4)


class _Failure(click.ClickException):
    """Carries an exception of a command through Click, which would handle some of them itself."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("")
        self.error = error


class Shell(click.Group):
    """A group of commands whose process ends as the module describes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command of the arguments; raises SystemExit with its exit code if `standalone_mode`."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode, **extra)
        arguments = sys.argv[1:] if args is None else list(args)
        _open_standard_files()
        as_json = _json_log_wanted(arguments)
        log_as("json" if as_json else "text")
        with catching_signals(as_said), json_log() if as_json else nullcontext():
            try:
                code = super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra) or 0
                flush()
            except SystemExit as error:  # of Click, for shell completion and for a pipe that nobody reads
                code = error.code
            except OSError as error:  # of Click, which printed a help
                code = _report(unwritable(error), arguments)
            except BaseException as error:
                code = _report(error, arguments)
            with suppress(Exception):
                flush()
            if Stopped.signal is not None or given_up:
                os._exit(code)  # at once: everything is saved, and libraries would take their time
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command, and let its exceptions reach `main` unchanged."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:
            raise _Failure(error) from error


def end_process(code: Any) -> NoReturn:
    """End the process with the code of a SystemExit after all that its libraries want to do at its end.

    What is left out is to take the interpreter down object by object, which takes half a second with torch.
    """
    if not (code is None or isinstance(code, int)):
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined] # both as the interpreter does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code or 0)


def _open_standard_files() -> None:
    """Open what is closed of stdin, stdout and stderr: the next file that is opened would become the terminal."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in Latin-1 shows other characters as escapes
            stream.reconfigure(errors="backslashreplace")


def _report(error: BaseException, arguments: Sequence[str]) -> int:
    """Tell the user what went wrong, and return the exit code."""
    if isinstance(error, _Failure):
        error = error.error
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, click.ClickException):
        text, code, shown = error.format_message(), error.exit_code, io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip("\n"))
    else:
        text, code = explain(error)
        if not isinstance(error, OutputClosed):
            say(f"ray-soup: {text}")
    if _traceback_wanted(arguments):
        say("".join(traceback.format_exception(error)).rstrip("\n"))
    if "--json" in arguments and not isinstance(error, OutputClosed):
        with suppress(Exception):
            print_json({"error": text, "exit": code})
    return code


def _json_log_wanted(arguments: Sequence[str]) -> bool:
    """Return whether stderr is to have JSON objects, also if the arguments are wrong."""
    joined = " ".join(arguments)
    return f"{LOG_FORMAT} json" in joined or f"{LOG_FORMAT}=json" in joined


def _traceback_wanted(arguments: Sequence[str]) -> bool:
    try:
        return "--traceback" in arguments or wants_traceback()
    except Exception:
        return False  # the variable is wrong, which is the error that is reported
