"""The exceptions that users see, each with its exit code.

A message states what is wrong and where, what was found and expected, and what to do.
"""


class SoupError(Exception):
    """A run failed after it had started (exit code 1); also the base class of the other exceptions."""

    exit_code = 1


class RecipeError(SoupError):
    """The usage, the recipe or the data is wrong (exit code 2)."""

    exit_code = 2


class IngredientError(SoupError):
    """An ingredient is broken, or the ingredients do not fit together (exit code 3)."""

    exit_code = 3
