"""Single values in the files of training scripts and libraries, each read on its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_soup.recipe.plain import shown

STATABLE = re.compile(r"(?!.*(?<![.\d])\d{5})[\w.,:/-]+")
"""Values from files that may be options of the key `model`; no number of layers that takes long to create is one."""
Settings = dict[str, str]
"""Values as a recipe writes them, by the name of the option of the key `model`."""


@dataclass
class Found:
    """What a script's arguments or a library's configuration file say."""

    settings: Settings = field(default_factory=dict)
    """Values by the name of the option of the recipe key `model`."""
    unstatable: dict[str, str] = field(default_factory=dict)
    """Arguments that change what the model computes, and that no option states."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys with values that are not understood, as in `mean 'imagenet'`, by the option that they would be."""
    unknown: str = ""
    """The name of the trained model, if the library does not have it, or not its tag, which stands for preprocessing."""
    other_model: str = ""
    """The library's name of the trained model, if it has another structure than the recipe's."""
    whole: bool = False
    """Whether all arguments are listed that the model was created with."""
    remark: str = ""
    """What a user should know about the training, as the end of a sentence that begins with the file."""


Reader = tuple[str, Callable[[Any], Any]]
"""The option that an argument is, and the function that reads its value, or raises ValueError or TypeError."""


def read_values(values: Mapping[str, Any], readers: Mapping[str, Reader], found: Found) -> dict[str, Any]:
    """Return the values that are given, by their keys; add the others to `found.unread`."""
    read = {}
    for key, (option, reader) in readers.items():
        value = values.get(key)
        if value is None or value in ("", []):
            continue
        try:
            read[key] = reader(value)
        except (ValueError, TypeError, OverflowError):
            found.unread[option] = f"{key} {shown(value)}"
    return read


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping; an empty one in place of another value."""
    return value if isinstance(value, Mapping) else {}


def one_of(choices: Collection[str]) -> Callable[[Any], str]:
    """Return a function that reads one of `choices`. It raises ValueError."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError("not a choice")
        return str(value)

    return read


def numbers(values: Iterable[float]) -> str:
    """Write numbers as a recipe does."""
    return ",".join(f"{value:.9g}" for value in floats(list(values)))


def floats(value: Any) -> list[float]:
    """Read one number or several. Raises ValueError or TypeError."""
    numbers = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def count(value: Any) -> int:
    """Read a positive integer, perhaps as text. Raises ValueError or TypeError."""
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError("not a positive integer")
    return int(value)


def word(value: Any) -> str:
    """Read a text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def pair(size: Any) -> tuple[int, int]:
    """Read a size of images: one number of pixels, or height and width. Raises ValueError or TypeError."""
    values = [count(v) for v in (size if isinstance(size, (list, tuple)) else [size])]
    if len(values) not in (1, 2):
        raise ValueError("not height and width")
    return values[0], values[-1]


def channels_and_size(size: Any) -> tuple[int, int, int]:
    """Read a size of images, perhaps with the number of channels, which is otherwise 0, in front."""
    whole = isinstance(size, (list, tuple)) and len(size) == 3
    return (count(size[0]) if whole else 0, *pair(size[1:] if whole else size))


def size_text(pair: Iterable[int]) -> str:
    """Write height and width as a recipe does: as one number if they are equal."""
    height, width = pair
    return str(height) if height == width else f"{height},{width}"


def same_value(one: str, other: str) -> bool:
    """Return whether two values of an option are equal: numbers up to rounding, a single one for all channels."""
    ones, others = one.split(","), other.split(",")
    length = max(len(ones), len(others))
    ones, others = (values * length if len(values) == 1 else values for values in (ones, others))
    try:
        return len(ones) == len(others) and all(
            math.isclose(float(a), float(b), rel_tol=1e-5) for a, b in zip(ones, others, strict=True)
        )
    except ValueError:
        return ones == others
