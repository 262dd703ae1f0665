"""Plan and write the safetensors files of a model: headers, an index, and tensors range by range."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.disk import write_at, write_bytes
from ray_soup.io.formats import DTYPE_NAMES, itemsize
from ray_soup.io.hashing import remember_written
from ray_soup.io.lazy import torch

Values: TypeAlias = "torch.Tensor | NDArray[Any]"
"""Elements [n] of a tensor."""
Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, str]
"""Torch's name of the dtype of each tensor."""
WAITING_BYTES = 1 << 28
"""Bytes of a file that may wait for earlier ones to be hashed; beyond it, the file is hashed when it is complete."""
SYNC_BYTES = 1 << 25
"""Bytes written between the beginnings of two synchronizations with the disk."""


@dataclass(frozen=True)
class ShardFile:
    """A safetensors file before its tensors are written."""

    header: bytes
    """All bytes before the first tensor."""
    begins: dict[str, int]
    """Byte at which each tensor begins."""
    nbytes: int
    """Size of the file in bytes."""


@dataclass(frozen=True)
class ShardFiles:
    """The files of a model: one, or several shards with an index."""

    path: Path
    """The file of a model that is not sharded; shards are named after it."""
    files: dict[Path, ShardFile]
    """The files, in the order of the tensors."""
    tensor_bytes: int
    """Size of all tensors of the model in bytes."""
    dtypes: Dtypes
    """Torch's name of the dtype of each tensor of the model."""
    uri: str = ""
    """Where actors upload the files; empty: they write them in place."""

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.nbytes for file in self.files.values())

    def places(self) -> dict[str, tuple[Path, int]]:
        """Return the file of each tensor, and the byte at which the tensor begins in it."""
        return {name: (path, begin) for path, file in self.files.items() for name, begin in file.begins.items()}

    def part(self, first: int, stop: int) -> ShardFiles:
        """Return files number `first` to `stop` (excluded)."""
        return replace(self, files=dict(list(self.files.items())[first:stop]))

    def check_sizes(self) -> None:
        """Check that all files are there and complete. Raises SoupError for the first one that is not."""
        for path, file in self.files.items():
            place = storage.join(self.uri, path.name) if self.uri else str(path)
            found = storage.stat(place).size if storage.isfile(place) else None
            if found != file.nbytes:
                what = "is missing" if found is None else f"has {found:,} bytes"
                raise SoupError(
                    f"{place} {what}, although an actor has written it; expected {file.nbytes:,} bytes. Put OUT on a disk "
                    "that all nodes share, or in remote storage."
                )

    def write_stand_ins(self) -> dict[str, str]:
        """Create files with the sizes and headers of those at the URI, and return the SHA-256 of each of those."""
        with ShardWriter(self):
            pass
        return {path.name: storage.read_bytes(f"{self.uri}/{path.name}.sha256").decode() for path in self.files}

    def write_index(self) -> Path:
        """Write the index if there are several files; return the file to load the model from."""
        if self.path in self.files:
            return self.path
        index = self.path.with_name(f"{self.path.name}.index.json")
        places = self.places()
        weight_map = {name: places[name][0].name for name in sorted(places)}
        text = json.dumps({"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}, indent=2)
        write_bytes(index, text.encode())
        return index

    def removed_on_error(self) -> AbstractContextManager[None]:
        """Delete the files if this context ends with an error. An OSError becomes a SoupError that names the model."""
        return undone_on_error(self.remove, self.path, f"it takes {self.nbytes:,} bytes")

    def remove(self) -> None:
        """Delete the files, complete or not, and the index."""
        for path in (*self.files, self.path.with_name(f"{self.path.name}.index.json")):
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def undone_on_error(undo: Callable[[], None], path: Path, takes: str) -> Iterator[None]:
    """Call `undo` if this context ends with an error. An OSError becomes a SoupError that says what `path` takes."""
    try:
        yield
    except BaseException as error:
        undo()
        if isinstance(error, OSError):
            raise SoupError(
                f"{path} could not be written ({error.strerror or error}); {takes}. Free some space and rerun the same "
                "command."
            ) from error
        raise


def plan_files(shapes: Shapes, dtypes: Dtypes, path: Path, shard_size: int | None, tied: Mapping[str, str]) -> ShardFiles:
    """Distribute the tensors of a model over files.

    Args:
        shapes: shape of each tensor, in the order to write them.
        dtypes: torch's name of the dtype of each tensor.
        path: the file of a model that is not sharded.
        shard_size: maximum bytes of tensors per file; a larger tensor gets a file to itself. None: one file.
        tied: maps other names of a tensor to its first name; written into the metadata of every file.
    """
    parts = in_shards(shapes, dtypes, shard_size)
    paths = [path]
    if len(parts) > 1:
        paths = [path.with_name(f"{path.stem}-{n + 1:05d}-of-{len(parts):05d}{path.suffix}") for n in range(len(parts))]
    files = {
        file: _shard_file({name: shapes[name] for name in names}, dtypes, tied)
        for file, names in zip(paths, parts, strict=True)
    }
    return ShardFiles(path, files, sum(_nbytes(shapes[name], dtypes[name]) for name in shapes), dtypes)


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * itemsize(dtype)


def in_shards(shapes: Shapes, dtypes: Dtypes, shard_size: int | None) -> list[list[str]]:
    """Return the names of the tensors of each file, as `plan_files` distributes them."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(shape, dtypes[name])
        if shard_size is not None and parts[-1] and filled + nbytes > shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += nbytes
    return parts


def _shard_file(shapes: Shapes, dtypes: Dtypes, tied: Mapping[str, str]) -> ShardFile:
    """Lay out a file, widest dtypes first so that all tensors are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **tied}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(shapes, key=lambda n: -itemsize(dtypes[n])):
        begins[name] = end
        end += _nbytes(shapes[name], dtypes[name])
        entries[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardFile(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


class _HashInOrder:
    """SHA-256 of a file from ranges that arrive from several threads, about in the order of the file."""

    def __init__(self, begin: bytes) -> None:
        self._sha, self._front = hashlib.sha256(begin), len(begin)
        self._waiting: dict[int, memoryview] = {}
        self._hashing = Lock()
        self._gave_up = False

    def add(self, place: int, data: memoryview) -> None:
        """Add the bytes at `place`, and hash what follows without a gap on what was hashed, unless another thread does."""
        if self._gave_up or not data.nbytes:
            return
        if place < self._front:
            self._gave_up = True
        self._waiting[place] = data
        while self._front in self._waiting and self._hashing.acquire(blocking=False):
            try:
                while (part := self._waiting.pop(self._front, None)) is not None:
                    self._sha.update(part)
                    self._front += part.nbytes
            finally:
                self._hashing.release()
        if self._gave_up or sum(part.nbytes for part in self._waiting.copy().values()) > WAITING_BYTES:
            self._gave_up = True
            self._waiting.clear()

    def hexdigest(self, nbytes: int) -> str | None:
        """Return the hash of a file of `nbytes` bytes; None if not all of it was hashed."""
        return self._sha.hexdigest() if self._front == nbytes and not self._gave_up else None


def bytes_of(part: Values) -> NDArray[np.uint8]:
    """Return the memory of contiguous elements as bytes, without a copy."""
    if isinstance(part, np.ndarray):
        return part.view(np.uint8)
    found: NDArray[np.uint8] = part.view(torch.uint8).numpy()
    return found


class ShardWriter:
    """Writes tensors into the files of a model, range by range, from any thread.

    A thread brings what is written to the disk meanwhile, so that little is left for `sync` to wait for.
    """

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        self._places = files.places()
        self._streams: dict[Path, IO[bytes]] = {}
        self._stack = ExitStack()
        self._writing = Lock()  # one writer at a time: the kernel's own lock on a file makes waiting writers spin
        self._unsynced = 0  # bytes written since the last synchronization began
        self._hashes: dict[Path, _HashInOrder] = {}
        self._syncing: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        """Create the files at their full size and write their headers."""
        with ExitStack() as stack:
            for path, file in self._files.files.items():
                path.unlink(missing_ok=True)  # it may be a link
                self._streams[path] = stack.enter_context(open(path, "xb"))
                self._streams[path].write(file.header)
                self._streams[path].truncate(file.nbytes)
                self._streams[path].flush()
                self._hashes[path] = _HashInOrder(file.header)
            self._syncer = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, error: type[BaseException] | None, *more: object) -> None:
        """Close the files; remember the SHA-256 of those that are complete and were written about in order."""
        self._stack.close()
        for path, file in self._files.files.items():
            if error is None and (digest := self._hashes[path].hexdigest(file.nbytes)) is not None:
                remember_written(path, digest)

    def write(self, name: str, start: int, part: Values) -> None:
        """Write `part` [n], in the dtype of the file, into the tensor `name` from element `start` on."""
        path, begin = self._places[name]
        place, data = begin + start * part.dtype.itemsize, bytes_of(part)
        with self._writing:
            write_at(self._streams[path], data, place)
            self._unsynced += part.nbytes
            if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._finish_syncing()
                self._syncing, self._unsynced = self._syncer.submit(os.fdatasync, self._streams[path].fileno()), 0
        self._hashes[path].add(place, data.data)

    def _finish_syncing(self) -> None:
        """Wait for the last synchronization. Raises OSError if it failed: the system reports a failed write only once."""
        if self._syncing is not None:
            self._syncing.result()

    def sync(self) -> None:
        """Make sure that all files are on the disk."""
        self._finish_syncing()
        for stream in self._streams.values():
            os.fsync(stream.fileno())
