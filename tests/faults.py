"""A disk that fails: every call that writes below some folders is counted, and one of them fails."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = ("w", "a", "x", "+")


class FaultyDisk:
    """Counts the writes below `folders`; write number `fails_at` raises OSError, and so do the next `lasts - 1` ones.

    Counted are opening a file for writing, each write, flush and close of it, os.pwrite, os.fsync, os.replace, os.rename,
    os.mkdir and os.unlink: every place where a disk reports that it is full, broken or read-only.
    """

    def __init__(self, folders: list[Path], number: int = errno.ENOSPC, fails_at: int = -1, lasts: int = 1) -> None:
        self.count, self.calls = 0, list[str]()
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._number, self._failing = number, range(fails_at, fails_at + lasts)
        self._counting = threading.Lock()

    def concerns(self, path: Any) -> bool:
        """Return whether a path is below the folders."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        real = os.path.realpath(os.fspath(path))
        return any(real == folder or real.startswith(f"{folder}/") for folder in self._folders)

    def write(self, what: str, path: Any) -> None:
        """Count one write. Raises OSError if it is one that fails."""
        with self._counting:
            self.calls.append(f"{what} {path}")
            self.count += 1
            fails = self.count - 1 in self._failing
        if fails:
            named = what in ("open", "replace", "rename", "mkdir", "unlink", "link", "symlink")  # as the system does
            raise OSError(self._number, os.strerror(self._number), str(path) if named else None)


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
            if disk.concerns(path):
                disk.write(name, path)
            return function(path, *arguments, **options)

        return call

    names = ("pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate", "link", "symlink")
    kept = {name: getattr(os, name) for name in names}
    fast = shutil._USE_CP_SENDFILE  # type: ignore[attr-defined]
    try:
        builtins.open = io.open = open_counted  # type: ignore[assignment]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        for name in names:
            setattr(os, name, counted(name))
        yield disk
    finally:
        builtins.open = io.open = opened
        shutil._USE_CP_SENDFILE = fast  # type: ignore[attr-defined]
        for name, function in kept.items():
            setattr(os, name, function)
