"""Examples in an `.npz` file: the arrays `images` and `labels`, or others."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ray_soup.errors import RecipeError
from ray_soup.io.cache import cached, content_key
from ray_soup.task.raw_examples import (
    Arrays,
    RawExamples,
    Source,
    check_finite,
    check_inputs,
    check_targets,
    identity_of,
    reason,
)

TARGETS = ("labels", "targets")
"""The array that holds the targets."""
CHUNK = 1 << 24
"""Bytes read at a time."""


@dataclass(frozen=True)
class _Member:
    """An array in a zip file, as its header describes it."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    column_major: bool
    header: int
    """Bytes before the first element."""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=object))


def read_npz(source: Source, path: str) -> Generator[tuple[int, int], None, RawExamples]:
    """Read an .npz file; uncompressed images are memory-mapped, so that the actors of a node share their pages.

    The first time, the images are compared with their checksum and searched for NaN. Yields (bytes checked, total). Raises
    RecipeError if the file is damaged, or if its arrays are not labeled examples.
    """
    identity = (identity_of(source, [Path(path)]),)
    raw = check_npz(source, path)
    try:
        with zipfile.ZipFile(path) as archive:
            names, _ = _inputs_and_target(source, archive)
            members = {name: _header(archive, name) for name in names}
            inputs = {name: _loaded(source, archive, path, name, member) for name, member in members.items()}
    except RecipeError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise almost anything for a damaged file
        raise _unreadable(source, error) from error
    for name, array in inputs.items():
        if isinstance(array, np.memmap):
            key = content_key("npz", identity, *([] if name == "images" else [name]))
            hold = yield from cached("checked", key, 0, partial(_checked, source, path, members[name], array))
            hold.close()
        else:
            check_finite(source, array)
    return RawExamples(source, raw.labels, _positional(inputs), identity=identity)


def _loaded(source: Source, archive: zipfile.ZipFile, path: str, name: str, member: _Member) -> np.ndarray:
    """Map an array into memory, or read it."""
    found = _mapped(archive, path, member)
    if found is None:
        _check_memory(source, member)
        with np.load(path, allow_pickle=False) as arrays:
            found = arrays[name]
    return found if found.dtype.isnative else found.astype(found.dtype.newbyteorder("="))


def _positional(inputs: dict[str, np.ndarray]) -> Arrays:
    """Return the only array, which is the model's first argument whatever its name; several stay named."""
    return next(iter(inputs.values())) if len(inputs) == 1 else inputs


def _inputs_and_target(source: Source, archive: zipfile.ZipFile) -> tuple[list[str], str]:
    """Return the names of the arrays of inputs and of targets: `images` and `labels` if they exist. Raises RecipeError."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    targets = [name for name in TARGETS if name in names]
    inputs = ["images"] if "images" in names else [name for name in names if name not in TARGETS]
    if len(targets) != 1 or not inputs or any(names.count(name) != 1 for name in (*inputs, *targets)):
        raise source.error(
            f"found {names[:20]}; expected the arrays 'images' and 'labels', once each; or any names for inputs, and one of "
            f"{', '.join(TARGETS)} for targets. Save them under these names."
        )
    return inputs, targets[0]


def check_npz(source: Source, path: str) -> RawExamples:
    """Read the targets of an .npz file and the headers of its inputs; the inputs returned are zeros of their shapes.

    Raises RecipeError if the arrays are not labeled examples.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names, target = _inputs_and_target(source, archive)
            members = {name: _header(archive, name) for name in names}
            for member in members.values():
                check_inputs(source, np.broadcast_to(np.zeros((), member.dtype), member.shape))
            of_target = _header(archive, target)
            check_targets(source, np.broadcast_to(np.zeros((), of_target.dtype), of_target.shape))
        with np.load(path, allow_pickle=False) as arrays:
            found = arrays[target]
    except RecipeError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise almost anything for a damaged file
        raise _unreadable(source, error) from error
    zeros = {n: np.broadcast_to(np.zeros((), m.dtype.newbyteorder("=")), m.shape) for n, m in members.items()}
    return RawExamples(source, found, _positional(zeros))


def _unreadable(source: Source, error: Exception) -> RecipeError:
    return source.error(f"cannot be read as .npz ({reason(error)}). Save it again with numpy.savez.")


def _header(archive: zipfile.ZipFile, name: str) -> _Member:
    """Read the header of an array. Raises ValueError if it is damaged, or does not match the size of the member."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"the array '{name}' has format version {version[0]}.{version[1]}, which is for records")
        shape, column_major, dtype = read(file)
        member = _Member(info, shape, dtype, column_major, file.tell())
    if not dtype.hasobject and member.header + member.nbytes != info.file_size:
        raise ValueError(
            f"the array '{name}' has {info.file_size - member.header:,} bytes instead of {member.nbytes:,} for "
            f"{dtype} {list(shape)}"
        )
    return member


def _mapped(archive: zipfile.ZipFile, path: str, member: _Member) -> np.ndarray | None:
    """Memory-map an array; None if it is compressed, empty, or cannot be mapped."""
    info = member.info
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or not member.shape or 0 in member.shape:
        return None
    start = _data_offset(path, info) + member.header
    return np.memmap(path, member.dtype, "r", start, member.shape, "F" if member.column_major else "C")


def _data_offset(path: str, info: zipfile.ZipInfo) -> int:
    """Return the position of a member's first byte in the file. Raises ValueError if its local header is damaged."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    if local[:4] != b"PK\x03\x04":
        raise ValueError(f"'{info.filename}' is not at its place in the file")
    name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + 30 + name + extra


def _check_memory(source: Source, member: _Member) -> None:
    available = psutil.virtual_memory().available
    if member.nbytes > available:
        raise source.error(
            f"the compressed images need {member.nbytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are "
            "available. Save them uncompressed, with numpy.savez: then they are memory-mapped."
        )


def _checked(source: Source, path: str, member: _Member, images: np.ndarray, folder: Path) -> Iterator[tuple[int, int]]:
    """Compare a stored member with its CRC-32, and check that images are finite. Yields (bytes read, total)."""
    total, crc = member.info.file_size, 0
    try:
        with open(path, "rb") as file:
            file.seek(_data_offset(path, member.info))
            for done in range(0, total, CHUNK):
                crc = zlib.crc32(file.read(min(CHUNK, total - done)), crc)
                yield done, total
    except OSError as error:
        raise _unreadable(source, error) from error
    if crc != member.info.CRC:
        raise source.error("the images do not match their checksum: the file is damaged. Save or copy it again.")
    check_finite(source, images)
    yield total, total
