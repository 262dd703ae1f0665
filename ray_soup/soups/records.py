"""Typed records of the files that a run writes about itself, each with a version, one writer and one reader.

Version 1 is what ray_soup 0.1 wrote: the same keys without a `version`. Readers accept it; writers write the version below.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from ray_soup import __version__
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.disk import json_text, json_value, read_json, write_json, write_text
from ray_soup.io.hashing import sha256_file

RUN_VERSION = 3  # with a seal; 2: without
RESULTS_VERSION = 3  # with kinds, names, means and series; 2: without
BEGUN_VERSION = 2
RESOLVED_VERSION = 2
ENTRY_VERSION = 2

START_OVER = "Choose a new folder, or empty this one."
"""What to do about a damaged record that the rest of the folder depends on."""


RUN_REMEDY = "Restore it from a copy, or remove it and rerun the command that creates it."
"""What to do about a damaged run.json."""


def plain_name(name: str) -> str:
    """Return a name of a file. Raises ValueError if it is a path, which could lead out of its folder."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"found {name!r}; expected the name of a file, not a path")
    return name


FileName = Annotated[str, AfterValidator(plain_name)]
"""The name of a file in the output folder."""
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{1,64}$")]
"""SHA-256 in hexadecimal digits."""
Positive = Annotated[int, Field(gt=0)]

ResultRow = dict[str, Any]
"""A line of results.jsonl: `kind`, `name`, `model_name`, costs, and a key for each split and metric: `test_accuracy`."""


class MeshRecord(TypedDict):
    """The mesh in run.json."""

    replicas: Positive
    shards: Positive
    cpus: float


class IngredientRecord(TypedDict):
    """An ingredient in run.json; metrics only if it comes from a sweep, hyperparameters also if its file states them."""

    name: str
    path: str
    sha256: Digest
    hyperparameters: NotRequired[dict[str, Any]]
    metrics: NotRequired[dict[str, Any]]


class FunctionRecord(TypedDict):
    """A function of the user's in run.json; `returned` of a method: coefficients, or model."""

    function: str
    sha256: NotRequired[Digest]
    returned: NotRequired[str]


class RunRecord(TypedDict, total=False):
    """run.json. A failed run has only `exit` and `error`; figures of the method (steps, curve, ...) are extra keys."""

    version: int
    results_version: int
    method: str
    objective: str
    unit: str
    select_by: str
    loss: str
    inputs: str
    dtype: str
    evaluate: FunctionRecord
    own_method: FunctionRecord
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
    preprocessing: dict[str, Any]
    notes: list[str]
    files: dict[FileName, Digest]
    load: str
    chosen: str
    improvement: dict[str, float]
    seeds: list[int]
    table: list[ResultRow]
    tests: list[dict[str, Any]]
    eliminations: list[dict[str, Any]]
    counts: list[dict[str, Any]]
    search: dict[str, Any]
    base: dict[str, str]
    trajectory: dict[str, Any]
    polish: dict[str, Any]
    trained: dict[str, Any]
    compare: list[Any]


class BegunRecord(TypedDict, total=False):
    """state/begun.json: the recipe, ingredients and options that the folder was started with; `start` is a digest.

    `adopted` are options of the model that files of the ingredients state and the recipe does not, `folder` is the current
    folder of the command, `source` the soup that `bake` rebuilds there, and `token` names the run.
    """

    version: int
    recipe: str
    ingredients: list[list[list[str | int] | str]]
    compare: list[Any]
    kind: str
    start: str
    rows: dict[str, Any]
    adopted: dict[str, str]
    folder: str
    source: str
    token: str


class ResolvedRecord(TypedDict, total=False):
    """state/resolved.json: what every `auto` of `actors` meant when the run was started."""

    version: int
    mesh: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    cpus: Annotated[float, Field(gt=0)]
    model_batch: Positive
    actors: dict[str, Any]
    seal: str


class EntryRecord(TypedDict, total=False):
    """state/soups/NAME.json: how one soup of a comparison was made, and the digests of the soup's other files."""

    version: int
    name: str
    files: dict[FileName, Digest]
    figures: dict[str, Any]
    notes: list[str]
    seal: str


_RUN = TypeAdapter(RunRecord)
_BEGUN = TypeAdapter(BegunRecord)
_RESOLVED = TypeAdapter(ResolvedRecord)
_ENTRY = TypeAdapter(EntryRecord)


def read_record(
    file: Path, adapter: TypeAdapter[Any], version: int, required: Sequence[str] = (), remedy: str = START_OVER
) -> Any:
    """Read and check a JSON file.

    Args:
        file: the file.
        adapter: the type of its content.
        version: the newest version of the record that is known here.
        required: keys that it must have.
        remedy: what to do if the file is damaged.

    Raises RecipeError if the file is missing, damaged, or of a newer version.
    """
    try:
        found = read_json(file)
        adapter.validate_python(found, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "its content"
        raise damaged(file, f"{where}: {fault['msg']}", remedy) from error
    except (OSError, ValueError) as error:
        raise damaged(file, getattr(error, "strerror", None) or str(error), remedy) from error
    if isinstance(found, dict):
        check_version(found, version, file)
        missing = [key for key in required if key not in found]
        if missing:
            raise damaged(file, f"no {missing[0]!r}", remedy)
    return found


def check_version(record: Mapping[str, Any], known: int, file: object) -> None:
    """Check the version of a record, 1 if it has none. Raises RecipeError if it is not one, or a newer ray_soup wrote it."""
    found = record.get("version", 1)
    if type(found) is not int or found < 1:
        raise damaged(file, f"version: found {found!r}; expected a whole number from 1 on")
    if found > known:
        raise RecipeError(
            f"{file} has version {found}; this ray_soup reads versions up to {known}. Upgrade ray_soup, or choose a new "
            "folder."
        )


def damaged(file: object, reason: str, remedy: str = START_OVER) -> RecipeError:
    """Return the error for a file of the output folder whose content cannot be right."""
    return RecipeError(f"{file} is damaged ({reason}). {remedy}")


def _sealed(record: Mapping[str, Any]) -> str:
    """Return the digest of a record's content, which makes a changed value noticeable."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_sealed(record: Mapping[str, Any], file: Path, indent: int | None = None) -> None:
    """Write a record with a digest of its content."""
    plain = json_value(json_text(record))  # as it will be read
    write_json(file, {**plain, "seal": _sealed(plain)}, indent)


def read_sealed(
    file: Path, adapter: TypeAdapter[Any], version: int, required: Sequence[str], remedy: str, since: int = 2
) -> Any:
    """Read a record that `write_sealed` wrote, or one of a version before `since`, without a seal. Raises RecipeError."""
    found = read_record(file, adapter, version, required, remedy)
    seal = found.pop("seal", None)
    if (seal is not None or found.get("version", 1) >= since) and seal != _sealed(found):
        raise damaged(file, "it is not as it was written", remedy)
    return found


# run.json


def write_run_record(record: RunRecord, file: Path) -> None:
    """Write run.json atomically, and set the versions in `record`."""
    record["version"], record["results_version"] = RUN_VERSION, RESULTS_VERSION
    write_sealed(record, file, indent=1)


def read_run_record(out: Path) -> RunRecord | None:
    """Read run.json of an output folder; None if there is none. Raises RecipeError if it is damaged."""
    file = out / "run.json"
    if not os.path.lexists(file):
        return None
    record: RunRecord = read_sealed(file, _RUN, RUN_VERSION, ("exit",), RUN_REMEDY, since=3)
    return record


def finished_record(out: Path) -> RunRecord:
    """Read run.json of a run that finished. Raises RecipeError if there is none."""
    try:
        record = read_run_record(out)
    except RecipeError as error:
        raise RecipeError(f"{out} is not a finished soup: {error}") from error
    if record is None:
        raise RecipeError(f"{out} is not a finished soup: no run.json found. Rerun the command that creates it.")
    if record["exit"] != 0 or not {"files", "ingredients"} <= set(record):
        raise RecipeError(
            f"{out} is not a finished soup: its run ended with exit code {record['exit']}. Rerun the command that creates "
            "it."
        )
    return record


def check_files(
    out: Path, record: RunRecord, names: Sequence[str] | None = None, error: type[SoupError] = RecipeError
) -> None:
    """Check files of a finished run against their digests in run.json.

    Args:
        out: the folder.
        record: its run.json.
        names: the files; None: all that run.json lists.
        error: what to raise if one is missing or was changed.

    Raises RecipeError if run.json does not list one.
    """
    for name in record["files"] if names is None else names:
        digest = record["files"].get(name)
        if digest is None:
            raise not_listed(out, name)
        found = sha256_file(str(out / name)) if (out / name).is_file() else "missing"
        if found != digest:
            raise error(
                f"{out / name} was changed: its SHA-256 is {found[:16]}, but run.json has {digest[:16]}. Restore the file, "
                "or rerun the command in a new folder."
            )


def not_listed(out: Path, name: str) -> RecipeError:
    """Return the error for a run.json whose list of files is too short."""
    return damaged(out / "run.json", f"it does not list {name}, which every finished soup has", RUN_REMEDY)


# results.jsonl


def write_results(rows: Sequence[ResultRow], file: Path) -> None:
    """Write results.jsonl, one line for each model or soup."""
    write_text(file, "".join(json_text(row) + "\n" for row in rows))


def read_results(out: Path) -> list[ResultRow]:
    """Read results.jsonl of an output folder. Raises RecipeError if it is missing or damaged."""
    file = out / "results.jsonl"
    try:
        lines = file.read_bytes().decode().splitlines()
        rows = [json_value(line) for line in lines]
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} cannot be read ({error}). Rerun the command that creates it in a new folder.") from error
    wrong = next(
        (n for n, row in enumerate(rows) if not isinstance(row, dict) or not isinstance(row.get("model_name"), str)), None
    )
    if wrong is not None:
        raise damaged(file, f"line {wrong + 1} has no 'model_name'")
    if not rows:
        raise damaged(file, "it has no lines")
    return rows


# state/


def write_begun(record: BegunRecord, file: Path) -> None:
    """Write state/begun.json."""
    write_json(file, {**record, "version": BEGUN_VERSION})


def rewrite_begun(record: BegunRecord, before: BegunRecord, file: Path) -> None:
    """Write state/begun.json for a run that was begun with the record `before`, and keeps its token."""
    seen = file.stat().st_mtime_ns
    record = {**record, "token": before["token"]} if "token" in before else record
    write_begun(record, file)
    os.utime(file, ns=(seen, seen))  # which stands for the token that earlier versions did not write


def read_begun(file: Path) -> BegunRecord:
    """Read state/begun.json. Raises RecipeError if it is damaged."""
    record: BegunRecord = read_record(file, _BEGUN, BEGUN_VERSION, ("recipe", "ingredients"))
    return record


def write_resolved(record: ResolvedRecord, file: Path) -> None:
    """Write state/resolved.json."""
    write_sealed({**record, "version": RESOLVED_VERSION}, file)


def read_resolved(file: Path) -> ResolvedRecord | None:
    """Read state/resolved.json; None if there is none. Raises RecipeError if it is damaged."""
    if not os.path.lexists(file):
        return None
    keys = ("mesh", "cpus", "model_batch", "actors")
    record: ResolvedRecord = read_sealed(file, _RESOLVED, RESOLVED_VERSION, keys, START_OVER)
    return record


def write_entry(record: EntryRecord, file: Path) -> None:
    """Write how a soup of a comparison was made, with the digests of its outcomes and coefficients beside `file`."""
    parts = [part for end in ("npz", "safetensors") if (part := file.with_name(f"{file.stem}.{end}")).exists()]
    files = {part.name: sha256_file(str(part)) for part in parts}
    write_sealed({**record, "name": file.name, "files": files, "version": ENTRY_VERSION}, file)


def read_entry(file: Path) -> EntryRecord:
    """Read how a soup of a comparison was made. Raises RecipeError if this file or one that it lists is damaged."""
    remedy = f"Remove {file} to compute this soup again."
    record: EntryRecord = read_sealed(file, _ENTRY, ENTRY_VERSION, ("figures", "notes"), remedy)
    if record.pop("name", file.name) != file.name:
        raise damaged(file, "it belongs to another soup", remedy)
    for name, digest in record.pop("files", {}).items():
        part = file.with_name(name)
        if not part.is_file() or sha256_file(str(part)) != digest:
            raise damaged(part, "it is missing, or not as it was written", remedy)
    return record


def versions() -> dict[str, str]:
    """Return the versions of ray_soup, Python and the libraries that this run used."""
    from importlib.metadata import version

    names = ["ray", "torch", "open_clip_torch", "numpy", "safetensors", "numba"]
    names += [name for name in ("timm", "torchvision", "transformers") if name in sys.modules]
    return {"ray_soup": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}
