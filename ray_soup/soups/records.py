"""Typed records of the files that a run writes about itself, each with a version, one writer and one reader.

Version 1 is what ray_soup 0.1 wrote: the same keys without a `version`. Readers accept it; writers write the version below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from ray_soup.errors import RecipeError
from ray_soup.io.disk import write_text

RUN_VERSION = 2
RESULTS_VERSION = 2
BEGUN_VERSION = 2
RESOLVED_VERSION = 2
ENTRY_VERSION = 2

ResultRow = dict[str, Any]
"""A line of results.jsonl: `model_name`, then a key for each split and metric, as in `test_accuracy`, and costs."""


class MeshRecord(TypedDict):
    """The mesh in run.json."""

    replicas: int
    shards: int
    cpus: float


class IngredientRecord(TypedDict):
    """An ingredient in run.json; the last two keys only if it comes from a sweep."""

    name: str
    path: str
    sha256: str
    hyperparameters: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, Any]]


class RunRecord(TypedDict, total=False):
    """run.json. A failed run has only `exit` and `error`; figures of the method (steps, curve, ...) are extra keys."""

    version: int
    results_version: int
    method: str
    seed: int
    exit: int
    error: str
    mesh: MeshRecord
    model_batch: int | None
    examples: dict[str, int]
    parameters: int
    blocks: int
    peak_memory_bytes: float
    wall_s: float
    seconds: dict[str, float]
    versions: dict[str, str]
    ingredients: list[IngredientRecord]
    notes: list[str]
    files: dict[str, str]
    chosen: str
    improvement: dict[str, float]
    seeds: list[int]
    table: list[ResultRow]
    tests: list[dict[str, Any]]
    eliminations: list[dict[str, Any]]
    counts: list[dict[str, Any]]
    search: dict[str, Any]


class BegunRecord(TypedDict, total=False):
    """state/begun.json: the recipe, ingredients and options that the folder was started with."""

    version: int
    recipe: str
    ingredients: list[list[Any]]
    compare: list[Any]
    kind: str


class ResolvedRecord(TypedDict, total=False):
    """state/resolved.json: what every `auto` of `actors` meant when the run was started."""

    version: int
    mesh: list[int]
    cpus: float
    model_batch: int
    actors: dict[str, Any]


class EntryRecord(TypedDict, total=False):
    """state/soups/NAME.json: how one soup of a comparison was made."""

    version: int
    figures: dict[str, Any]
    notes: list[str]


_RUN = TypeAdapter(RunRecord)
_BEGUN = TypeAdapter(BegunRecord)
_RESOLVED = TypeAdapter(ResolvedRecord)
_ENTRY = TypeAdapter(EntryRecord)


def _read(file: Path, adapter: TypeAdapter[Any], version: int, required: Sequence[str] = ()) -> Any:
    """Read and check the JSON object in `file`. Raises RecipeError if it is damaged or of a newer version."""
    try:
        found = json.loads(file.read_text())
        adapter.validate_python(found, strict=True)
        missing = [key for key in required if key not in found]
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its content"
        raise RecipeError(_damaged(file, f"{where}: {fault['msg']}")) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(_damaged(file, str(error))) from error
    if missing:
        raise RecipeError(_damaged(file, f"no {missing[0]!r}"))
    check_version(found, version, file)
    return found


def check_version(record: Mapping[str, Any], known: int, file: object) -> None:
    """Check the version of a record, 1 if it has none. Raises RecipeError if a newer ray_soup wrote it."""
    found = record.get("version", 1)
    if found > known:
        raise RecipeError(
            f"{file} has version {found}; this ray_soup reads versions up to {known}. Upgrade ray_soup, or choose a new "
            "folder."
        )


def _damaged(file: Path, reason: str) -> str:
    return f"{file} is damaged ({reason}). Choose a new folder, or empty this one."


# run.json


def write_run_record(record: RunRecord, file: Path) -> None:
    """Write run.json atomically, and set the versions in `record`."""
    record["version"], record["results_version"] = RUN_VERSION, RESULTS_VERSION
    write_text(file, json.dumps(record, indent=1))


def read_run_record(out: Path) -> RunRecord | None:
    """Read run.json of an output folder.

    Returns None if the file is missing or is not a complete JSON object. Raises RecipeError if a key has the wrong type.
    """
    file = out / "run.json"
    try:
        whole = isinstance(json.loads(file.read_text()), dict)
    except (OSError, ValueError, RecursionError):
        return None
    record: RunRecord | None = _read(file, _RUN, RUN_VERSION) if whole else None
    return record


def finished_record(out: Path) -> RunRecord:
    """Read run.json of a run that finished. Raises RecipeError if there is none."""
    record = read_run_record(out)
    if record is None:
        raise RecipeError(f"{out} is not a finished soup: no run.json found. Rerun the command that creates it.")
    if record.get("exit") != 0 or not {"files", "ingredients"} <= set(record):
        raise RecipeError(
            f"{out} is not a finished soup: its run ended with exit code {record.get('exit')}. Rerun the command that "
            "creates it."
        )
    return record


# results.jsonl


def write_results(rows: Sequence[ResultRow], file: Path) -> None:
    """Write results.jsonl, one line for each model or soup."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_results(out: Path) -> list[ResultRow]:
    """Read results.jsonl of an output folder. Raises RecipeError if it is missing or damaged."""
    file = out / "results.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file} cannot be read ({error}). Rerun the command that creates it in a new folder.") from error
    wrong = next((n for n, row in enumerate(rows) if not isinstance(row, dict) or "model_name" not in row), None)
    if wrong is not None:
        raise RecipeError(_damaged(file, f"line {wrong + 1} has no 'model_name'"))
    return rows


# state/


def write_begun(record: BegunRecord, file: Path) -> None:
    """Write state/begun.json."""
    write_text(file, json.dumps({**record, "version": BEGUN_VERSION}))


def read_begun(file: Path) -> BegunRecord:
    """Read state/begun.json. Raises RecipeError if it is damaged."""
    record: BegunRecord = _read(file, _BEGUN, BEGUN_VERSION, ("recipe", "ingredients"))
    return record


def write_resolved(record: ResolvedRecord, file: Path) -> None:
    """Write state/resolved.json."""
    write_text(file, json.dumps({**record, "version": RESOLVED_VERSION}))


def read_resolved(file: Path) -> ResolvedRecord | None:
    """Read state/resolved.json; None if there is none. Raises RecipeError if it is damaged."""
    if not file.exists():
        return None
    record: ResolvedRecord = _read(file, _RESOLVED, RESOLVED_VERSION, ("mesh", "cpus", "model_batch", "actors"))
    return record


def write_entry(record: EntryRecord, file: Path) -> None:
    """Write how a soup of a comparison was made."""
    write_text(file, json.dumps({**record, "version": ENTRY_VERSION}))


def read_entry(file: Path) -> EntryRecord:
    """Read how a soup of a comparison was made. Raises RecipeError if the file is damaged."""
    record: EntryRecord = _read(file, _ENTRY, ENTRY_VERSION, ("figures", "notes"))
    return record
