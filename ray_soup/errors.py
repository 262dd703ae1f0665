"""What can go wrong, and the exit code that each kind ends with.

A message names the file, what was found, what was expected and what to do; the class carries the exit code.
"""


class SoupError(Exception):
    """The run failed while it was running (exit code 1)."""

    exit_code = 1


class RecipeError(SoupError):
    """Usage, recipe or data are wrong (exit code 2)."""

    exit_code = 2


class IngredientError(SoupError):
    """An ingredient is broken, or the ingredients do not fit together (exit code 3)."""

    exit_code = 3
