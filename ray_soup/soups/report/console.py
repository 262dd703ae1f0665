"""Standard output and standard error of the command. Does not import torch.

Everything goes through `echo`, `say` and `log`: without credentials, without terminal escapes, and in whatever encoding and
state the terminal is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

import click

from ray_soup.errors import OutputClosed, SoupError
from ray_soup.io.disk import json_text
from ray_soup.io.redact import printable, redact

if TYPE_CHECKING:
    from rich.console import Console

LOG_FORMATS = ("text", "json")
"""The formats of stderr: sentences, or one JSON object per line."""
NARROWEST = 20
"""Terminal columns below which a width cannot be true."""
LONGEST_NAME = 120
"""Terminal columns of the longest name that is shown whole."""

_log_format = "text"
_stderr: TextIO | None = None


def log_as(log_format: str) -> None:
    """Write stderr in one of LOG_FORMATS from now on."""
    global _log_format  # noqa: PLW0603 - a process has one stderr
    _log_format = log_format


def log_to(stream: TextIO | None) -> None:
    """Write to this stream instead of sys.stderr from now on; None: to sys.stderr again."""
    global _stderr  # noqa: PLW0603
    _stderr = stream


def logs_json() -> bool:
    """Return whether stderr has one JSON object per line."""
    return _log_format == "json"


def echo(text: str) -> None:
    """Print a text to stdout. Raises OutputClosed if its reader has ended, SoupError if it cannot be written."""
    try:
        click.echo(printable(redact(text)))
    except (OSError, ValueError) as error:
        raise unwritable(error) from error


def print_json(found: object) -> None:
    """Print one object as a line of valid JSON."""
    echo(json_text(found))


def unwritable(error: OSError | ValueError) -> SoupError:
    """Return the error to raise if stdout cannot be written; the rest of the output is dropped."""
    _redirect(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return OutputClosed("Nobody reads the standard output.")
    reason = getattr(error, "strerror", None) or error
    return SoupError(f"The standard output cannot be written: {reason}. Rerun the command with another output.")


def say(text: str) -> None:
    """Print a text to stderr, as the format of the log says; if that cannot be written, the run continues."""
    if logs_json():
        log({"message": text})
    else:
        _to_stderr(text)


def log(found: Mapping[str, Any]) -> None:
    """Print a JSON object to stderr on one line, with the time in front; if that cannot be written, the run continues."""
    _to_stderr(_json_line(found))


def as_said(text: str) -> str:
    """Return a text as `say` would print it, for who cannot wait for the lock of stderr."""
    return _json_line({"message": text.strip()}) if logs_json() else text


def _json_line(found: Mapping[str, Any]) -> str:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json_text({"time": now, **found})


def _to_stderr(text: str) -> None:
    try:
        click.echo(printable(redact(text)), _stderr, err=True)
    except (OSError, ValueError):
        _redirect(_stderr or sys.stderr)


def flush() -> None:
    """Flush stdout and stderr at the end of a command. Raises as `echo` does."""
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            _redirect(stream)
            if stream is sys.stdout:
                raise unwritable(error) from error


def _redirect(stream: TextIO) -> None:
    """Send what is left in the buffer of a broken stream to /dev/null: Python would complain about it at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def name_of(text: str, width: int = 0, longest: int = LONGEST_NAME) -> str:
    """Return a name on one line, padded to `width` terminal columns, and cut if it takes more than `longest`."""
    from rich.cells import cell_len, set_cell_size

    text = printable(redact(text)).replace("\n", "\\n").replace("\t", "\\t")
    if cell_len(text) > longest:
        text = set_cell_size(text, longest - 1).rstrip() + "…"
    return text + " " * (width - cell_len(text))


def make_console(**options: Any) -> Console:
    """Return a console of rich that raises BrokenPipeError instead of ending the process."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            """Raise what the caller can handle; by default, the console ends the process with exit code 1."""
            raise BrokenPipeError

    terminal = Terminal(**options)
    return terminal if terminal.width >= NARROWEST else Terminal(width=80, **options)  # as with COLUMNS=0
