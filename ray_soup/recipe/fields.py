"""Types of recipe keys with their bounds, and the base class of sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ray_soup.errors import RecipeError
from ray_soup.recipe.explain import below, expected_by, members
from ray_soup.recipe.paths import is_function

MOST_TRIALS = 10_000  # Tune keeps a folder and a record for each
MOST_ACTORS = 10_000  # one placement group has a bundle for each


def _clean(text: str) -> str:
    """Check a path or URI. Raises ValueError."""
    if not text or len(text) > 20_000 or re.search("[\0\ud800-\udfff]", text):
        raise ValueError("Expected 1 to 20,000 characters, without NUL and in valid UTF-8. Rename it.")
    return text


def _each_once(names: list[str]) -> list[str]:
    """Check a list of names. Raises ValueError."""
    if len(set(names)) < len(names):
        raise ValueError("Expected each of them once. Remove one.")
    return names


def line(text: str) -> str:
    """Check a name, a model or a prompt. Raises ValueError."""
    if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029]", _clean(text)) or not text.strip():
        raise ValueError("Expected one line of text without control characters. Remove them.")
    return text


def share(amount: float) -> float:
    """Check an amount of a Ray resource. Raises ValueError."""
    if abs(amount * 10_000 - round(amount * 10_000)) > 1e-6:
        raise ValueError("Expected a multiple of 0.0001, the smallest amount that Ray counts. Round it.")
    return amount


def _function(spec: str) -> str:
    """Check the form of `package.module:function`. Raises ValueError."""
    if not is_function(line(spec)):
        raise ValueError("Expected package.module:function.")
    return spec


Auto = Literal["auto"]
Examples = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=100_000)]
ActorCount = Annotated[int, Field(ge=1, le=MOST_ACTORS)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch and JSON readers take
PathText = Annotated[str, AfterValidator(_clean)]
Line = Annotated[str, AfterValidator(line)]
Function = Annotated[str, AfterValidator(_function)]
Loggers = Annotated[list[Literal["wandb", "mlflow"]], AfterValidator(_each_once)]


class Section(BaseModel):
    """A frozen group of keys. The string under a key is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _read_whole_numbers(cls, values: Any) -> Any:
        """Turn 5.0 into 5 where a key is an integer, and a section without keys into an empty one."""
        if not isinstance(values, dict):
            return {} if values is None else values
        return {key: _whole(value, below(cls, key)) if isinstance(key, str) else value for key, value in values.items()}


def _whole(value: Any, annotation: Any) -> Any:
    if not (isinstance(value, float) and value.is_integer() and abs(value) <= 2**53):
        return value
    found = members(annotation) if annotation is not None else set()
    return int(value) if int in found and float not in found else value


def refusal(section: type[Section], values: dict[str, Any], key: str) -> str | None:
    """Return what a key expects if it refuses the value in `values`; None if it accepts the value."""
    try:
        section.model_validate(values)
    except (ValidationError, RecipeError):
        last: Any = section
        for part in key.split("."):
            info, last = last.model_fields[part], below(last, part)
        return expected_by(info)
    return None
