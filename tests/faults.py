"""Faults on purpose: a disk on which one of the calls that write below some folders fails; a training that ends early."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tests import tiny

WRITING = ("w", "a", "x", "+")
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
WITH_PATH = ("open", "replace", "rename", "mkdir", "rmdir", "unlink", "remove", "link", "symlink", "utime", "chmod")
WITH_TWO = ("replace", "rename", "link", "symlink")
WITH_FILE = ("write", "pwrite", "fsync", "ftruncate")
PACKAGE = f"{Path(__file__).parent.parent}/ray_soup/"


class FaultyDisk:
    """Counts the writes below `folders`; write number `fails_at` raises OSError, and so do the next `lasts - 1` ones.

    Counted are opening a file for writing, each write, flush, truncation and close of it, and the calls of `os` in WITH_PATH
    and WITH_FILE: every place where a disk reports that it is full, broken or read-only.
    """

    def __init__(self, folders: list[Path], number: int = errno.ENOSPC, fails_at: int = -1, lasts: int = 1) -> None:
        self.count, self.calls, self.places = 0, list[str](), list[tuple[str, ...]]()
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._number, self._failing = number, range(fails_at, fails_at + lasts)
        self._counting = threading.Lock()

    def concerns(self, path: Any, dir_fd: int | None = None) -> bool:
        """Return whether a path is below the folders."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        real = os.path.realpath(os.fspath(path))
        return any(real == folder or real.startswith(f"{folder}/") for folder in self._folders)

    def write(self, what: str, path: Any) -> None:
        """Count one write. Raises OSError if it is one that fails."""
        with self._counting:
            self.calls.append(f"{what} {path}")
            self.places.append((what, *_lines()))
            self.count += 1
            fails = self.count - 1 in self._failing
        if fails:
            named = what in WITH_PATH  # as the system does
            raise OSError(self._number, os.strerror(self._number), str(path) if named else None)


def _lines() -> Iterator[str]:
    """Yield the lines of ray_soup that led to this call, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: FaultyDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        self._disk.write("write", self._file.name)
        written: int = self._file.write(data)
        return written

    def flush(self) -> None:
        self._disk.write("flush", self._file.name)
        self._file.flush()

    def truncate(self, size: int | None = None) -> int:
        self._disk.write("truncate", self._file.name)
        length: int = self._file.truncate(size)
        return length

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            self._disk.write("close", self._file.name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)


@contextmanager
def faulty(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """Let this process write to a disk that fails, within the context."""
    opened = builtins.open

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        watched = any(letter in mode for letter in WRITING) and not isinstance(file, int) and disk.concerns(file)
        if watched:
            disk.write("open", file)
        found = opened(file, mode, *arguments, **options)
        return _File(found, disk) if watched else found

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            reading = name == "open" and not (arguments[0] if arguments else options["flags"]) & FLAGS
            paths = (path, *arguments[:1]) if name in WITH_TWO else (path,)
            if not reading and any(disk.concerns(one, options.get("dir_fd")) for one in paths):
                disk.write(name, path)
            return function(path, *arguments, **options)

        return call

    kept = {name: getattr(os, name) for name in (*WITH_PATH, *WITH_FILE)}
    fast = shutil._USE_CP_SENDFILE  # type: ignore[attr-defined]
    try:
        builtins.open = io.open = open_counted  # type: ignore[assignment]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        for name in kept:
            setattr(os, name, counted(name))
        yield disk
    finally:
        builtins.open = io.open = opened
        shutil._USE_CP_SENDFILE = fast  # type: ignore[attr-defined]
        for name, function in kept.items():
            setattr(os, name, function)


# In the processes of Ray

WANTED = Path(os.environ.get("RAY_SOUP_CACHE", "/nowhere")).parent / "faults.json"
_STARTED = ExitStack()


@contextmanager
def faulty_workers(folder: Path, fails_at: int, lasts: int = 1, in_all: bool = True) -> Iterator[None]:
    """Let the processes that Ray starts write to a disk that is full, from the time when they call `build`.

    Args:
        folder: the faulty disk.
        fails_at: the number of the first write of a process that fails.
        lasts: how many of its writes fail.
        in_all: whether this happens in all processes, or in the first one that calls `build`.
    """
    values = {"driver": os.getpid(), "folder": str(folder), "fails_at": fails_at, "lasts": lasts, "in_all": in_all}
    try:
        WANTED.write_text(json.dumps(values))
        yield
    finally:
        WANTED.unlink()
        WANTED.with_suffix(".claimed").unlink(missing_ok=True)


def build() -> torch.nn.Module:
    """Build the tiny model, as a recipe's `model`; begin the faults that `faulty_workers` wants in this process."""
    _STARTED.close()
    with suppress(FileNotFoundError, FileExistsError):
        wanted = json.loads(WANTED.read_text())
        if os.getpid() != wanted["driver"]:
            if not wanted["in_all"]:
                WANTED.with_suffix(".claimed").touch(exist_ok=False)
            disk = FaultyDisk([Path(wanted["folder"])], errno.ENOSPC, wanted["fails_at"], wanted["lasts"])
            _STARTED.enter_context(faulty(disk))
    return tiny.build()


class Killed(Exception):
    """Ends a training run in the middle."""


def killing(at: int) -> Callable[[str, int, int], None]:
    """Report to this until step `at` of a training, which then raises Killed."""

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", at):
            raise Killed

    return progress
