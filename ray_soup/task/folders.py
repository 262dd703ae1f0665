"""Find the files of a data folder: links are followed once, hidden files are left out, and special files are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ray_soup.task.raw_examples import Source

JUNK = ("__pycache__", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN")
"""Folders that operating systems and tools create, besides those that begin with a dot."""


@dataclass
class FoundFiles:
    """The files below a folder that have one of the wanted suffixes."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    """Files by the subfolder of the top level that they are in, empty lists included; those directly in the folder: ""."""
    notes: list[str] = field(default_factory=list)
    """What was left out."""

    def everything(self, suffix: str) -> list[Path]:
        """Return all files with this suffix, sorted."""
        return sorted(file for files in self.files.values() for file in files if file.name.lower().endswith(suffix))


def find_files(source: Source, folder: Path, suffixes: tuple[str, ...], first_only: bool = False) -> FoundFiles:
    """Find the files below a folder whose lower-case names end with one of the suffixes.

    The files of a subfolder are in the order of their folders' paths, then of their names. A folder that is reached twice,
    or linked into itself, counts once.

    Args:
        source: the source, for errors.
        folder: the folder.
        suffixes: such as ".png".
        first_only: stop after the first file of each subfolder.

    Raises RecipeError if a wanted file is a broken link or not a regular file, if a folder cannot be listed, or if two
    subfolders contain the same folder.
    """
    return _Walk(source, folder, suffixes, first_only).found()


class _Walk:
    def __init__(self, source: Source, folder: Path, suffixes: tuple[str, ...], first_only: bool) -> None:
        self.source, self.folder, self.suffixes, self.first_only = source, folder, suffixes, first_only
        here = folder.resolve()
        self.above = {_id(path) for path in (here, *here.parents)}
        self.owner: dict[tuple[int, int], str] = {}
        self.hidden: list[str] = []
        self.cyclic: list[str] = []

    def found(self) -> FoundFiles:
        folders, names = self._listed(str(self.folder))
        result = FoundFiles({"": [self.folder / name for name in names]})
        for entry in folders:
            if self._enters(entry.path, entry.name):
                result.files[entry.name] = []
        for name in sorted(result.files):
            if name:
                result.files[name] = list(self._below(str(self.folder / name), name))
        what = {"hidden files and folders": self.hidden, "links to a folder that contains them, or was read already":
                self.cyclic}  # fmt: skip
        for kind, paths in what.items():
            if paths:
                shown = ", ".join(sorted(paths)[:4]) + (", ..." if len(paths) > 4 else "")
                result.notes.append(f"{self.source.key}: {kind} in {self.source.spec} were ignored ({len(paths)}): {shown}.")
        return result

    def _below(self, top: str, name: str) -> Iterator[Path]:
        """Yield the files below a subfolder of the top level, sorted by folder and name."""
        found: dict[str, list[str]] = {}
        ways, links = [top], list[str]()
        while ways or links:
            path = ways.pop() if ways else links.pop(0)  # links last, so that real paths name the files
            if os.path.islink(path) and path != top and not self._enters(path, name):
                continue
            folders, found[path] = self._listed(path)
            if self.first_only and found[path]:
                break
            links += [entry.path for entry in folders if entry.is_symlink()]
            ways += [entry.path for entry in folders if not entry.is_symlink() and self._enters(entry.path, name)]
        for path in sorted(found):
            yield from (Path(path, file) for file in found[path])

    def _enters(self, path: str, name: str) -> bool:
        """Return whether a folder is new; it then belongs to the subfolder `name` of the top level."""
        number = _id(path)
        if number in self.above or self.owner.get(number) == name:
            self.cyclic.append(os.path.relpath(path, self.folder))
            return False
        if number in self.owner:
            raise self.source.error(
                f"{path} and a part of the folder {self.owner[number]} are the same folder, by a link. Remove the link: "
                "every file counts once."
            )
        self.owner[number] = name
        return True

    def _listed(self, path: str) -> tuple[list[os.DirEntry[str]], list[str]]:
        """Return the folders and the names of the wanted files in a folder, sorted by name."""
        folders, names = [], []
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                wanted = entry.name.lower().endswith(self.suffixes)
                if entry.is_dir():
                    if entry.name.startswith(".") or entry.name in JUNK:
                        self.hidden.append(os.path.relpath(entry.path, self.folder))
                    else:
                        folders.append(entry)
                elif wanted and entry.name.startswith("."):
                    self.hidden.append(os.path.relpath(entry.path, self.folder))
                elif wanted and entry.is_file():
                    names.append(entry.name)
                elif wanted or (entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path)):
                    kind = "a link to nothing" if entry.is_symlink() else "a FIFO, socket or device"
                    raise self.source.error(f"{entry.path} is {kind}; expected a file or folder. Remove or replace it.")
        except OSError as error:
            raise self.source.error(
                f"{path} cannot be listed ({error.strerror}). Change its permissions, or remove it."
            ) from error
        return folders, names


def _id(path: str | Path) -> tuple[int, int]:
    """Return the device and inode of a folder, which links to it share."""
    found = os.stat(path)
    return found.st_dev, found.st_ino
