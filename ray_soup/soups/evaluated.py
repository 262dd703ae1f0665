"""The record of what the recipe's function `evaluate` returned for a model."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from ray_soup.io.disk import writing
from ray_soup.soups.records import read_sealed, write_sealed

EVALUATED_VERSION = 2


class EvaluatedRecord(TypedDict, total=False):
    """state/evaluate/NAME.json: what the recipe's function `evaluate` returned for one model."""

    version: int
    identity: str
    values: dict[str, float]
    seal: str


_EVALUATED = TypeAdapter(EvaluatedRecord)


def write_evaluated(record: EvaluatedRecord, file: Path) -> None:
    """Write what the recipe's function `evaluate` returned for a model."""
    with writing(file.parent):
        file.parent.mkdir(exist_ok=True)
    write_sealed({**record, "version": EVALUATED_VERSION}, file)


def read_evaluated(file: Path, identity: str) -> dict[str, float] | None:
    """Read what `evaluate` returned for the model and the code that `identity` stands for; None if it was not called so.

    Raises RecipeError if the file is damaged.
    """
    if not os.path.lexists(file):
        return None
    remedy = f"Remove {file} to call the function again."
    record: EvaluatedRecord = read_sealed(file, _EVALUATED, EVALUATED_VERSION, ("identity", "values"), remedy)
    return record["values"] if record["identity"] == identity else None
