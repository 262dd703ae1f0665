"""Examples in a folder that has one folder of images per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.task.classes import Classes, in_order
from ray_soup.task.folders import FoundFiles, find_files
from ray_soup.task.hub import SPLITS
from ray_soup.task.raw_examples import KINDS, PART, RawExamples, Source, identity_of

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, those of torchvision's ImageFolder."""


def read_image_folder(source: Source, folder: Path, scan: FoundFiles, headers_only: bool = False) -> RawExamples:
    """Read CLASS/image files; a label is the position of CLASS among the folders that contain images.

    Folders whose names are all integers are in numeric order, others in the order of their names as text.

    Args:
        source: the source.
        folder: its folder.
        scan: the files in it.
        headers_only: leave out the identity, which takes a system call per image.

    Raises RecipeError if there are no images, or if the folder contains splits.
    """
    split = _only_split(source, folder, scan)
    if split:
        folder = folder / split
        scan = find_files(source, folder, IMAGES)
    found = {name: [file for file in files if file.name.lower().endswith(IMAGES)] for name, files in scan.files.items()}
    outside = found.pop("", [])
    classes = in_order(name for name, files in found.items() if files)
    files = [file for name in classes for file in found[name]]
    if not files:
        raise source.error(f"contains no supported data. Expected {KINDS}. Check the path.")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found[name]) for name in classes])
    identity = () if headers_only else ("folder", identity_of(source, files))

    def parts() -> Iterator[list[Any]]:
        return (list(files[first : first + PART]) for first in range(0, len(files), PART))

    def where(row: int) -> str:
        return f"row {row} ({files[row].relative_to(folder)})"

    notes = [f"{source.key}: {source.spec} was read from its only split, {split}."] if split else []
    notes += _notes(source, scan, [name for name, some in found.items() if not some], len(outside))
    if source.targets != "classes":
        raise source.error(
            "a folder of images has one class for each image, and this recipe's objective needs other targets. Use an .npz "
            "file, Parquet, or a function."
        )
    names = Classes(source.key, source.spec, classes, by_position=True)
    return RawExamples(source, labels, None, parts, identity, names, where, tuple(notes))


def peek_image_folder(source: Source, folder: Path) -> Classes | None:
    """Return the classes of a folder of images after listing as few files as possible; None if there are none."""
    scan = find_files(source, folder, IMAGES, first_only=True)
    split = _only_split(source, folder, scan)
    if split:
        scan = find_files(source, folder / split, IMAGES, first_only=True)
    names = in_order(name for name, files in scan.files.items() if name and files)
    return Classes(source.key, source.spec, names, by_position=True) if names else None


def _only_split(source: Source, folder: Path, scan: FoundFiles) -> str:
    """Return the only split in a folder; empty if the folder contains classes. Raises RecipeError for several splits."""
    tops = [name for name, files in scan.files.items() if name and files]
    named = [name for name in tops if name.lower() in SPLITS]
    nested = [name for name in named if any(file.parent != folder / name for file in scan.files[name])]
    if len(tops) == len(nested) == 1:
        return nested[0]
    if nested:
        raise source.error(
            f"contains the folders {', '.join(tops[:10])}, of which {', '.join(nested)} seem to be splits. Choose one, as "
            f"in {source.spec}/{nested[-1]}, or rename a folder that is a class."
        )
    if named and len(named) == len(tops):
        raise source.error(
            f"contains the folders {', '.join(tops)}: splits, but without a folder per class. Expected "
            f"{named[-1]}/CLASS/image files. Sort the images into class folders, or rename the folders if they are classes."
        )
    return ""


def _notes(source: Source, scan: FoundFiles, empty: list[str], outside: int) -> list[str]:
    """Describe what was left out."""
    notes = list(scan.notes)
    if empty:
        shown = ", ".join(empty[:10]) + (", ..." if len(empty) > 10 else "")
        notes.append(f"{source.key}: folders without images in {source.spec} are not classes ({len(empty)}): {shown}.")
    if outside:
        notes.append(f"{source.key}: images in {source.spec} that are in no class folder were ignored ({outside}).")
    return notes
