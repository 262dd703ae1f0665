"""Write a soup as a distributed checkpoint of torch, which `torch.distributed.checkpoint.load` reads into any sharding.

The folder has a file `.metadata`, and files `__0_N.distcp` in which the tensors follow one another, each an archive as
torch.save writes it. Tensors are mixed range by range, as in bake.py, and written in order: memory does not grow with the
model.
"""

from __future__ import annotations

import math
import os
import pickle
import zipfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from io import BytesIO
from pathlib import Path
from struct import pack
from typing import IO, Any, NamedTuple, cast

from ray_soup.io.disk import reading_threads
from ray_soup.io.distributed import METADATA
from ray_soup.io.distributed_files import STORAGES
from ray_soup.io.formats import DISTRIBUTED_SUFFIX, dtype_of, itemsize
from ray_soup.io.ingredient import Ingredient, check_unchanged
from ray_soup.io.lazy import torch
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.mixing.bake import RANGE, check_copies, soup_buffer, soup_range, written_dtype
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.shard_files import Dtypes, Shapes, Values, bytes_of, in_shards, undone_on_error

ALIGNMENT = 64  # bytes; where values begin in a file, so that they can be memory-mapped
VERSION = b"3\n"  # of the format of torch.save
PADDING = 0x4246  # the kind of extra field that torch.save, too, fills with padding
ZIP64 = 20  # bytes of the extra field with sizes


class _Place(NamedTuple):
    file: str
    offset: int
    length: int


def bake_distributed(
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    folder: Path,
    threads: int | None = None,
    progress: CountCallback = no_count,
    out_dtype: str = "keep",
    shard_size: int | None = None,
) -> Path:
    """Write the soup as a distributed checkpoint, with the tensor names and dtypes of the ingredients.

    A tensor that the model ties to another is stored once and has both names. A partly written model is deleted if anything
    fails.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: the K ingredients, bound to the model and checked against each other.
        folder: the folder to write the files into.
        threads: number of threads that read and mix; None: as many as CPUs and memory allow.
        progress: called with the bytes read so far and in total.
        out_dtype: dtype of the floats, or `keep`.
        shard_size: maximum bytes of tensors per file; a larger tensor gets a file to itself. None: one file.

    Returns:
        The file that describes the others, `.metadata`.

    Raises SoupError if the files cannot be written, IngredientError if a value is not finite or an ingredient has changed.
    """
    shapes = {name: info.shape for name, info in ingredients[0].tensors.items()}
    dtypes = {name: written_dtype(ingredients, name, out_dtype) for name in shapes}
    files = {f"__0_{n}{DISTRIBUTED_SUFFIX}": names for n, names in enumerate(in_shards(shapes, dtypes, shard_size))}
    places: dict[str, _Place] = {}
    check_copies(ingredients)
    with _new_files(folder, [*files, METADATA], sum(math.prod(shapes[n]) * itemsize(dtypes[n]) for n in shapes)):
        try:
            with _Mixer(coefficients, ingredients, dtypes, threads, progress) as mixer:
                for file, names in files.items():
                    with open(folder / file, "xb") as stream:
                        for name in names:
                            offset = _aligned(stream)
                            _write_archive(stream, offset, shapes[name], dtypes[name], mixer.parts(name))
                            places[name] = _Place(file, offset, stream.tell() - offset)
                        stream.flush()
                        os.fsync(stream.fileno())
            check_unchanged(ingredients)
        finally:
            for ingredient in ingredients:
                ingredient.close()
        _write_metadata(folder / METADATA, shapes, dtypes, places, coefficients.tied or {})
    return folder / METADATA


def _new_files(folder: Path, names: Sequence[str], nbytes: int) -> AbstractContextManager[None]:
    """Remove old files of these names; remove the new ones if writing fails. Raises SoupError instead of OSError."""

    def remove() -> None:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)  # it may be a link

    remove()
    return undone_on_error(remove, folder / names[0], f"the model takes {nbytes:,} bytes")


class _Mixer:
    """Mixes tensors range by range, some ranges ahead of the one that is being written."""

    def __init__(
        self,
        coefficients: Coefficients,
        ingredients: Sequence[Ingredient],
        dtypes: Dtypes,
        threads: int | None,
        progress: CountCallback,
    ) -> None:
        self._coefficients, self._ingredients, self._dtypes, self._progress = coefficients, ingredients, dtypes, progress
        self._used = [ingredients[k] for k in coefficients.used()]
        self._ahead = threads or reading_threads(8 * RANGE * len(ingredients))
        self._pool = ThreadPoolExecutor(self._ahead)
        self._total = sum(i.tensors[name].nbytes for i in ingredients for name in coefficients.block_of)
        self._done = 0

    def __enter__(self) -> _Mixer:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def parts(self, name: str) -> Iterator[Values]:
        """Yield the elements of a tensor of the soup in order, in the dtype of the file."""
        size, dtype = self._ingredients[0].tensors[name].numel, self._dtypes[name]
        if name not in self._coefficients.block_of:
            yield soup_buffer(self._coefficients, self._used, name).to(dtype_of(dtype)).contiguous()
            return
        width = sum(i.tensors[name].itemsize for i in self._ingredients)
        waiting: deque[Future[Values]] = deque()
        for start in range(0, size, RANGE):
            stop = min(start + RANGE, size)
            waiting.append(self._pool.submit(soup_range, self._coefficients, self._ingredients, name, start, stop, dtype))
            if len(waiting) > self._ahead or stop == size:
                for _ in range(len(waiting) if stop == size else 1):
                    part = waiting.popleft().result()
                    self._done += len(part) * width
                    self._progress(self._done, self._total)
                    yield part


# The archive of a tensor, and the description of all


class _Section:
    """The part of a file that an archive is written to, as a file of its own."""

    def __init__(self, stream: IO[bytes], begin: int) -> None:
        self._stream, self._begin = stream, begin

    def write(self, data: Any) -> int:
        return self._stream.write(data)

    def tell(self) -> int:
        return self._stream.tell() - self._begin

    def seek(self, offset: int) -> int:
        return self._stream.seek(self._begin + offset) - self._begin

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        self._stream.flush()


def _aligned(stream: IO[bytes]) -> int:
    """Write padding until the next value in a file would be aligned; return where that is."""
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    return stream.tell()


def _write_archive(stream: IO[bytes], begin: int, shape: tuple[int, ...], dtype: str, parts: Iterable[Values]) -> None:
    """Write a tensor as torch.save does, from byte `begin` of a file on; `parts` are its elements in order."""
    with zipfile.ZipFile(cast(IO[bytes], _Section(stream, begin)), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickled(shape, dtype))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        record = zipfile.ZipInfo("archive/data/0")
        values = stream.tell() - begin + 30 + len(record.filename) + ZIP64 + 4
        padding = -values % ALIGNMENT
        record.extra = pack("<HH", PADDING, padding) + bytes(padding)
        with archive.open(record, "w", force_zip64=True) as target:
            for part in parts:
                target.write(bytes_of(part).data)
        archive.writestr(zipfile.ZipInfo("archive/version"), VERSION)


class _Stored:
    """Stands for the storage of a tensor in its pickle."""


class _Tensor:
    """Stands for a tensor in its pickle."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def __init__(self, file: IO[bytes], stored: tuple[Any, ...]) -> None:
        super().__init__(file, protocol=2)
        self._stored = stored

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        return self._stored if isinstance(value, _Stored) else None


def _pickled(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the pickle of a contiguous tensor whose values are in the record data/0."""
    strides: list[int] = []
    size = 1
    for length in reversed(shape):
        strides.insert(0, size)
        size *= max(1, length)
    kind = next(name for name, found in STORAGES.items() if found == dtype).removeprefix("torch.")
    file = BytesIO()
    stored = ("storage", getattr(torch, kind), "0", "cpu", math.prod(shape))
    _Pickler(file, stored).dump(_Tensor(_Stored(), 0, shape, tuple(strides), False, OrderedDict()))
    return file.getvalue()


def _write_metadata(
    path: Path, shapes: Shapes, dtypes: Dtypes, places: Mapping[str, _Place], tied: Mapping[str, str]
) -> None:
    """Write the file that describes a checkpoint whose tensors are stored whole; a tied tensor has all its names."""
    from torch.distributed.checkpoint import filesystem, metadata

    names = {**{name: name for name in shapes}, **{alias: first for alias, first in tied.items() if first in shapes}}
    entries, stored = {}, {}
    for name, first in names.items():
        size, begin = torch.Size(shapes[first]), torch.Size([0] * len(shapes[first]))
        chunks = [metadata.ChunkStorageMetadata(begin, size)]
        entries[name] = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype_of(dtypes[first])), size, chunks)
        stored[metadata.MetadataIndex(name, begin)] = filesystem._StorageInfo(*places[first])
    paths = {name: (name,) for name in names}
    with open(path, "xb") as file:
        pickle.dump(metadata.Metadata(cast(Any, entries), paths, stored), file, protocol=4)
        file.flush()
        os.fsync(file.fileno())
