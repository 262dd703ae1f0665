"""Conventions of the Hugging Face Hub and of the library `datasets`: splits, configurations and names of classes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_soup.task.raw_examples import Source, check_regular, reason

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The words that name a split in the names of files and folders, and the split."""
MOST = 1 << 26
"""Maximum size in bytes of a JSON file of a dataset."""


def split_of(path: str) -> str:
    """Return the split that a file belongs to by its path relative to the dataset's folder; empty if it names none.

    The rules are those of `datasets`: SPLIT-00000-of-00002.parquet, or a word of SPLITS in the path.
    """
    sharded = re.search(r"([\w.]+)-\d{5}-of-\d{5}", path)
    if sharded:
        return SPLITS.get(sharded[1].lower(), sharded[1])
    words = re.split(r"[-._ 0-9/]+", path.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def one_split(source: Source, folder: Path, files: Sequence[Path], at: str) -> None:
    """Check that Parquet files belong to one split and one configuration.

    Args:
        source: the source.
        folder: the folder that the files are in or below.
        files: the files.
        at: the folder as the user would write it.

    Raises RecipeError, which says how to choose.
    """
    names = [str(file.relative_to(folder)) for file in files]
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(split_of(name), []).append(name)
    if len(splits) > 1:
        listed = ", ".join(
            f"{split or '(none)'} ({len(found)} file{'s' if len(found) > 1 else ''})"
            for split, found in sorted(splits.items())
        )
        raise source.error(
            f"contains several splits: {listed}. Choose one, as in {os.path.join(at, pattern(list(splits.values())[-1]))}."
        )
    configurations = _configurations(folder / "README.md")
    if len(configurations) > 1 and len({os.path.dirname(name) for name in names}) > 1:
        raise source.error(
            f"contains the configurations {', '.join(configurations[:10])}. Choose one, as in "
            f"{os.path.join(at, os.path.dirname(names[0]))}."
        )


def pattern(names: Sequence[str]) -> str:
    """Return the name of one file, or a glob pattern for several."""
    return names[0] if len(names) == 1 else f"{os.path.commonprefix(names)}*.parquet"  # noqa: RUF071 - a prefix of the text is meant


def _configurations(readme: Path) -> list[str]:
    """List the configurations that the front matter of a dataset card names."""
    if not readme.is_file():
        return []
    try:
        with open(readme, encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return []
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    return re.findall(r"^\s*-?\s*config_name:\s*(\S+)", front, re.MULTILINE)


def read_json(source: Source, file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RecipeError if the file is missing, damaged or not an object."""
    try:
        size = check_regular(source, file).st_size
        if size > MOST:
            raise ValueError(f"{size:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise source.error(f"{file.name} cannot be read as JSON ({reason(error)}). Save the dataset again.") from error
    if not isinstance(found, dict):
        raise source.error(f"{file.name} is a {type(found).__name__}; expected a JSON object. Save the dataset again.")
    return found


def listed_files(source: Source, folder: Path) -> list[Path]:
    """Return the Arrow files that state.json of a saved dataset lists. Raises RecipeError."""
    state = read_json(source, folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise source.error("is a selection of the rows of its files. Save the dataset again after `flatten_indices()`.")
    listed = state.get("_data_files")
    listed = listed if isinstance(listed, list) else []
    names = [str(file["filename"]) for file in listed if isinstance(file, dict) and isinstance(file.get("filename"), str)]
    if not names or len(names) != len(listed):
        raise source.error("state.json names no data files. Save the dataset again.")
    for name in names:
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise source.error(f"state.json names the file {name}, which is not in its folder. Save the dataset again.")
        if names.count(name) > 1:
            raise source.error(f"state.json names the file {name} twice. Save the dataset again.")
    return [folder / name for name in names]


def class_names(features: Any, column: str) -> tuple[str, ...]:
    """Return the names of a ClassLabel column, or one of lists of them, from the features of a dataset; empty if none."""
    feature = features.get(column) if isinstance(features, dict) else None
    while isinstance(feature, (dict, list)) and "names" not in feature:  # a list of labels, one for each word
        feature = feature.get("feature") if isinstance(feature, dict) else next(iter(feature), None)
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    valid = isinstance(names, list) and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    return tuple(names) if valid and names else ()


def features_of(metadata: dict[bytes, bytes] | None) -> Any:
    """Return the features that `datasets` writes into the metadata of an Arrow schema; None if there are none."""
    try:
        found = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return found["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def lfs_hint(file: Path) -> str:
    """Return a remark if a file is only the pointer that git leaves for a large file."""
    try:
        with open(file, "rb") as opened:
            pointer = opened.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return ""
    return " It is a Git LFS pointer: run `git lfs pull`." if pointer else ""
