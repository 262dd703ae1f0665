"""Files mapped into memory: opened as one version, checked for changes, released page by page, guarded against cuts.

A file that is cut while it is mapped makes the next read of it raise the signal SIGBUS, which would end the process with a
core dump. `guard` ends it with a sentence instead.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import re
import signal
import stat
import sys
import time
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError

DONTNEED = 4  # of madvise on Linux
PRIVATE = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)  # MAP_NORESERVE: a file may be larger than memory
SIGINFO = 4  # SA_SIGINFO on Linux
REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)")


class Version(NamedTuple):
    """A file at a moment: another version differs in at least one of these, apart from the last."""

    device: int
    """Number of the file system."""
    inode: int
    """Number of the file in it."""
    size: int
    """Bytes."""
    modified: int
    """Modification time in ns."""
    changed: int
    """Time of the last change of content, name or permissions in ns; nobody can set it."""

    def same(self, other: Version, in_use: bool) -> bool:
        """Return whether `other` is this version.

        A file system such as sshfs or gcsfuse may change the number of a file once it is not `in_use`; a file that replaced
        this one has another `changed`.
        """
        if self[:4] == other[:4]:
            return True
        return not in_use and (self.size, self.modified, self.changed) == (other.size, other.modified, other.changed)


def version_of(file: str | int) -> Version:
    """Return the version of a regular file, by path or file descriptor. Raises FileNotFoundError or IngredientError."""
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise IngredientError(f"{file} is not a regular file; expected a checkpoint. Exclude it.")
    return Version(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def opened(path: str) -> Iterator[tuple[str, int, Version]]:
    """Open a local file: yields a path that leads to this very file until the end, its descriptor, and its version.

    Libraries that take a path get this one: the file cannot be replaced between their opening it and our checking it, and
    its name need not be text. Raises IngredientError if this user may not read the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise IngredientError(
            f"{path} cannot be read ({error.strerror}). Allow this user to read it (chmod +r), or exclude it."
        ) from error
    try:
        version = version_of(descriptor)
        link = f"/proc/self/fd/{descriptor}"
        yield link if os.path.exists(link) else path, descriptor, version
    finally:
        os.close(descriptor)


def mapped(path: str, descriptor: int, size: int) -> NDArray[np.uint8]:
    """Map the open file at `path` into memory: uint8 [size]. A page that is written to becomes a private copy.

    Python's own `mmap` keeps a file descriptor for as long as the map exists; a soup may have more files than a process may
    have descriptors. Raises OSError.
    """
    if size == 0:
        return np.empty(0, np.uint8)
    library = _library()
    library.mmap.restype = ctypes.c_void_p
    protection, wanted = mmap.PROT_READ | mmap.PROT_WRITE, ctypes.c_size_t(size)
    address = library.mmap(None, wanted, protection, PRIVATE, descriptor, ctypes.c_long(0))
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, library.munmap, ctypes.c_void_p(address), wanted).atexit = False  # threads may still read
    return np.frombuffer(memoryview(memory), np.uint8)


def regions() -> Iterator[tuple[int, int, str]]:
    """Yield (first address, end, path) of each file that this process has mapped; nothing where the system does not say."""
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as file:
        for line in file:
            found = REGION.match(line)
            if found and found[3] != "0":
                yield int(found[1], 16), int(found[2], 16), found[4]


def release_pages(addresses: Sequence[int]) -> None:
    """Release the pages that this process has read of the mapped files with these addresses in them.

    The pages stay in the system's page cache. Memory that is not a file's is left alone.
    """
    wanted = sorted(addresses)
    for start, end, _ in regions():
        at = bisect_left(wanted, start)
        if at < len(wanted) and wanted[at] < end:
            _library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)


@lru_cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


class _SignalInfo(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("address", ctypes.c_size_t),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_SignalInfo), ctypes.c_void_p)


class _Action(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_ENDING = itertools.count()


def _end(_number: int, info: Any, _context: int | None) -> None:
    """End the process: the file at the address that could not be read has been cut, or its disk fails."""
    if next(_ENDING):  # another thread is ending the process
        time.sleep(60)
    path = "A file"
    with suppress(Exception):
        path = next((p for start, end, p in regions() if start <= info.contents.address < end), path)
    text = (
        f"\nError: {path} was cut while it was in use, or its disk cannot be read. Nothing was published. Leave the "
        "ingredients alone while a command runs, then rerun the same command to resume.\n"
    )
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))
    os._exit(1)


_HANDLER = _Handler(_end)  # kept for as long as it may be called


def guard() -> None:
    """End this process with a sentence and exit code 1 if a mapped file is cut.

    Replaces the system's default and Ray's traceback; has no effect where the user has asked Python for a traceback
    (PYTHONFAULTHANDLER, -X faulthandler), where another handler is installed, or where the system is not 64-bit Linux.
    """
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    asked = "PYTHONFAULTHANDLER" in os.environ or "faulthandler" in sys._xoptions or sys.flags.dev_mode
    address = ctypes.cast(_HANDLER, ctypes.c_void_p).value
    old = _Action()
    _library().sigaction(signal.SIGBUS, None, ctypes.byref(old))
    if old.handler == address or (old.handler and (asked or not faulthandler.is_enabled())):
        return
    action = _Action(handler=address, flags=SIGINFO)
    _library().sigaction(signal.SIGBUS, ctypes.byref(action), None)
