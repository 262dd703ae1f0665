"""Standard error with one JSON object per line, whatever in Python writes to it. Does not import torch."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ray_soup.soups.report.console import log, log_to


class _Records(logging.Handler):
    """Prints the warnings and errors of libraries, with their level and the name of their logger."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log({"level": record.levelname.lower(), "logger": record.name, "message": self.format(record).strip()})
        except Exception:  # a malformed call of a library must not end the run
            self.handleError(record)


class _Lines(io.TextIOBase):
    """Takes the place of sys.stderr, and prints each line that a library writes there as an object."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun = stream, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream below."""
        return self._stream.encoding

    def fileno(self) -> int:
        """Return the descriptor of the stream below."""
        return self._stream.fileno()

    def flush(self) -> None:
        """Flush the stream below."""
        self._stream.flush()

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Print the lines that are complete, and keep the rest."""
        *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
        for line in filter(str.strip, lines):
            log({"message": line})
        return len(text)


@contextmanager
def json_log() -> Iterator[None]:
    """Within this context, everything that this process writes to sys.stderr is printed as JSON objects.

    That includes Python's warnings and the loggers of libraries. Not included is what is not written in
    Python: the core of Ray, and programs that this process starts.
    """
    stream, handler = sys.stderr, _Records(logging.WARNING)
    lines = _Lines(stream)
    logging.captureWarnings(True)
    logging.getLogger().addHandler(handler)
    log_to(stream)
    sys.stderr = lines
    try:
        yield
    finally:
        lines.write("\n")
        sys.stderr = stream
        log_to(None)
        logging.getLogger().removeHandler(handler)
        logging.captureWarnings(False)
