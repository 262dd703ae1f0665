"""The recipe keys from the schema itself, until the package has ray_soup.recipe.keys."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic_core import PydanticUndefined

from ray_soup.recipe import Recipe, Section
from ray_soup.recipe.explain import expected_by, section_in


@dataclass(frozen=True)
class KeyInfo:
    """One key of a recipe."""

    name: str
    type: str
    default: str
    meaning: str
    example: str


def keys(section: type[Section] = Recipe, prefix: str = "") -> list[KeyInfo]:
    """Return every key of a section and below it."""
    return list(_keys(section, prefix))


def _keys(section: type[Section], prefix: str) -> Iterator[KeyInfo]:
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None:
            value = field.default
            default = "required" if value is PydanticUndefined else json.dumps(value)
            yield KeyInfo(f"{prefix}{name}", expected_by(field), default, field.description or "", "")
        else:
            meaning = field.description or inspect.getdoc(inner) or ""
            yield KeyInfo(f"{prefix}{name}", "", "", meaning, "")
            yield from _keys(inner, f"{prefix}{name}.")
