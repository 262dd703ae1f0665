"""The environment variables of ray_soup, read when they are used and checked when a command starts."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ray_soup.errors import RecipeError

CACHE = "RAY_SOUP_CACHE"
CACHE_GB = "RAY_SOUP_CACHE_GB"
DEADLINE = "RAY_SOUP_DEADLINE_S"
TRACEBACK = "RAY_SOUP_TRACEBACK"


def deadline_s() -> float:
    """Return the seconds that one answer of an actor, or one heartbeat of a stream, may take. Raises RecipeError."""
    return _positive(DEADLINE, "seconds") or 600.0


def cache_bytes() -> float | None:
    """Return the largest size of the cache in bytes; None if RAY_SOUP_CACHE_GB is not set. Raises RecipeError."""
    size = _positive(CACHE_GB, "gigabytes")
    return None if size is None else size * 1e9


def wants_traceback() -> bool:
    """Return whether errors are shown with their traceback. Raises RecipeError."""
    value = os.environ.get(TRACEBACK) or "0"
    if value not in ("0", "1"):
        raise RecipeError(f"The environment variable {TRACEBACK} is {value!r}; expected 1 or 0. Fix it, or unset it.")
    return value == "1"


def cache_folder() -> Path:
    """Return the absolute path of the cache folder. Raises RecipeError if this user has no home folder."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).absolute()
    try:
        return (Path.home() / ".cache" / "ray_soup").absolute()
    except RuntimeError as error:
        raise RecipeError(
            f"This user has no home folder, and {CACHE} is not set. Set it to a folder for the cache."
        ) from error


def check_environment() -> None:
    """Check all variables, and that the cache folder can be written. Raises RecipeError that names the variable."""
    deadline_s()
    cache_bytes()
    wants_traceback()
    check_cache(cache_folder())


def check_cache(folder: Path) -> None:
    """Create the cache folder. Raises RecipeError if it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
        reason = "Permission denied"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
    raise RecipeError(
        f"The cache folder {folder} cannot be used: {reason}. Set the environment variable {CACHE} to a folder that can be "
        "written."
    )


def _positive(name: str, unit: str) -> float | None:
    """Return the positive number in a variable; None if it is not set or empty. Raises RecipeError."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise RecipeError(
            f"The environment variable {name} is {text[:80]!r}; expected a positive number of {unit}, as in {name}=600. Fix "
            "it, or unset it."
        )
    return number
