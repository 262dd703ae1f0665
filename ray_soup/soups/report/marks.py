"""The place in a file of the user's where `compare --into` writes its tables."""

from __future__ import annotations

import os
from pathlib import Path

from ray_soup.errors import RecipeError
from ray_soup.io.disk import write_bytes

MARK = "<!-- ray-soup compare -->"
"""The line before and after the tables in a Markdown file."""


def insert(text: str, file: str) -> None:
    """Replace the text between the two lines MARK of a file.

    Raises RecipeError as `check_marks` does.
    """
    path = Path(file).resolve()  # a link stays a link
    before, _, after = check_marks(file)
    mode = path.stat().st_mode
    write_bytes(path, f"{before}{MARK}\n\n{text}\n\n{MARK}{after}".encode())
    path.chmod(mode)


def check_marks(file: str) -> list[str]:
    """Return the parts of a file before, between and after its two lines MARK.

    Raises RecipeError if the file cannot be read or written, or does not contain exactly two such lines.
    """
    path = Path(file).resolve()
    try:
        parts = path.read_bytes().decode().split(MARK)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. Use a text file with two lines {MARK}.") from error
    if len(parts) != 3:
        raise RecipeError(
            f"{file} has {len(parts) - 1} lines {MARK}; expected 2. Mark the place for the tables with one such line before "
            "and one after it."
        )
    if not os.access(path.parent, os.W_OK):
        raise RecipeError(f"{file} cannot be written: no permission for its folder {path.parent}. Choose another file.")
    return parts
