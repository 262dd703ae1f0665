"""The recipe key `model`, parsed, and the checks that the builders of model libraries share."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from ray_soup.errors import RecipeError

DTYPE = "dtype"
"""The option of `model` that is the dtype of the weights that a model of transformers computes with."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as a recipe names it: LIBRARY:NAME?OPTION=VALUE&OPTION=VALUE."""

    text: str
    """The whole value."""
    library: str
    """The part before the colon: a model library, or the module of a function."""
    name: str
    """The library's name for the architecture, or a folder."""
    options: dict[str, str]
    """The options after the question mark, by name."""

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Split the value of the key `model` into its parts."""
        library, _, rest = text.partition(":")
        name, _, query = rest.partition("?")
        return cls(text, library, name, dict(parse_qsl(query, keep_blank_values=True)))

    @property
    def in_bfloat16(self) -> bool:
        """Whether the weights are bfloat16, as the option `dtype` of transformers says."""
        return self.library == "transformers" and self.options.get(DTYPE) == "bfloat16"

    def import_library(self) -> Any:
        """Import the library. Raises RecipeError if it is not installed."""
        try:
            return importlib.import_module(self.library)
        except ImportError as error:
            raise RecipeError(
                f"model: {self.text} needs the library {self.library}, which cannot be imported ({error}). "
                f"Install it: pip install 'ray_soup[{self.library}]'"
            ) from error

    def check_options(self, known: Sequence[str], example: str) -> None:
        """Check that all options are in `known`. Raises RecipeError; its message shows `example`."""
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise RecipeError(
                f"model: {self.text!r} has the unknown option '{unknown[0]}'; known options: {', '.join(known)}. Write it "
                f"as in {example}."
            )

    def count(self, option: str, example: str, default: int | None = None) -> int:
        """Read an option that must be a positive integer. Raises RecipeError, also if it is missing without a default."""
        value = self.options.get(option, "" if default is None else str(default))
        if not re.fullmatch("[1-9][0-9]*", value):
            raise RecipeError(
                f"model: found {self.text!r}; expected a positive integer for the option '{option}'. Write it as in "
                f"{example}."
            )
        return int(value)

    def floats(self, option: str, count: int, example: str) -> tuple[float, ...] | None:
        """Read an option of `count` numbers separated by commas, or of one for all; None if it is missing.

        Raises RecipeError.
        """
        if option not in self.options:
            return None
        with contextlib.suppress(ValueError):
            values = tuple(float(part) for part in self.options[option].split(","))
            if all(math.isfinite(v) for v in values) and len(values) in (1, count) and (option != "std" or min(values) > 0):
                return values * count if len(values) == 1 else values
        what = "one positive number" if option in ("std", "crop_pct") else "one number"
        raise RecipeError(
            f"model: found {self.text!r}; expected {what} for the option '{option}'"
            f"{f', or {count} of them separated by commas' if count > 1 else ''}. Write it as in {example}&{option}=0.5."
        )

    def size(self, option: str, example: str) -> tuple[int, int] | None:
        """Read an option that is a size of images, N or HEIGHT,WIDTH; None if it is missing. Raises RecipeError."""
        if option not in self.options:
            return None
        if not re.fullmatch("[1-9][0-9]{0,4}(,[1-9][0-9]{0,4})?", self.options[option]):
            raise RecipeError(
                f"model: found {self.text!r}; expected N or HEIGHT,WIDTH in pixels for the option '{option}'. Write it as "
                f"in {example}&{option}=224."
            )
        numbers = [int(part) for part in self.options[option].split(",")]
        return numbers[0], numbers[-1]

    def choice(self, option: str, choices: Sequence[str]) -> str | None:
        """Read an option that is one of `choices`; None if it is missing. Raises RecipeError."""
        value = self.options.get(option)
        if value is not None and value not in choices:
            raise RecipeError(
                f"model: found {self.text!r}; expected {', '.join(choices[:-1])} or {choices[-1]} for the option "
                f"'{option}'. Fix it."
            )
        return value

    def with_options(self, options: Mapping[str, str]) -> str:
        """Return the text of this model with some options changed or added."""
        all_options = {**self.options, **options}
        query = "&".join(f"{name}={value}" for name, value in all_options.items())
        return f"{self.library}:{self.name}" + (f"?{query}" if query else "")

    def unknown_name(self, names: list[str]) -> RecipeError:
        """Return the error for a name that is not among the library's `names`, with suggestions."""
        near = difflib.get_close_matches(self.name, names, n=3)
        if near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = f"choose one of its {len(names)} models, such as {', '.join(names[:3])}."
        return RecipeError(f"model: {self.library} has no '{self.name}'; {hint}")


def in_bfloat16(text: str) -> bool:
    """Return whether the recipe key `model` asks for weights in bfloat16."""
    return ModelSpec.parse(text).in_bfloat16


@contextlib.contextmanager
def no_weight_warnings() -> Iterator[None]:
    """Silence warnings about missing pretrained weights, because the ingredients replace them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
