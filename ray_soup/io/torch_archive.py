"""Check the zip archive that `torch.save` writes before torch maps it into memory.

With a memory map, torch takes the bytes of a storage from where its record begins: it neither decompresses the record nor
compares its size, so that a record that is compressed or short would yield other numbers. What passes here has one reading.
"""

from __future__ import annotations

import os
import zipfile
from itertools import pairwise
from struct import unpack
from typing import IO

from ray_soup.io.torch_pickle import LONGEST_PICKLE, Storages, TooLarge, Unreadable, Unsafe

LONGEST_DIRECTORY = 16 << 20  # bytes of the list of records; 100,000 records take 8 MB
END, END64 = 22, 76  # bytes of the records at the end of an archive; the second one of large files, with its locator
ENCRYPTED_OR_PATCHED = 0x2061  # general purpose flags of a zip record
FOLDER = 0x10  # an external attribute: from such a record torch reads nothing, and the tensor has any numbers


def check_archive(file: IO[bytes]) -> None:
    """Check that a zip archive holds a pickle that is safe to load, and each storage of it in full, uncompressed.

    Args:
        file: a file that begins with a zip record; its position is moved.

    Raises Unreadable, TooLarge or Unsafe.
    """
    open_archive(file)


def open_archive(file: IO[bytes]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Return offset and size of the data of each record, by its name, and the pickle, checked as in `check_archive`."""
    records, data = archive_of(file)
    pickled = Storages(data)
    for key, nbytes in pickled.nbytes.items():
        found = records.get(f"data/{key}", (0, -1))[1]
        if found < nbytes:
            tensor = pickled.tensors.get(key)
            whose = f"the tensor {tensor}" if tensor else "a tensor"
            has = f"has {found:,} bytes" if found >= 0 else "is missing"
            raise Unreadable(f"the record data/{key} of {whose} {has}; expected {nbytes:,}")
    return records, data


def archive_of(file: IO[bytes]) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Return the same, without a check of the pickle. Raises Unreadable or TooLarge."""
    try:
        records = _records(file)
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError, OverflowError) as error:
        raise Unreadable(f"its list of records is damaged: {error}") from error
    if "data.pkl" not in records:
        raise Unreadable(f"it is a zip archive without a record data.pkl; its first records: {list(records)[:3]}")
    offset, size = records["data.pkl"]
    if size > LONGEST_PICKLE:
        raise TooLarge(f"it has {size:,} bytes without the tensors; expected at most {LONGEST_PICKLE:,}")
    order = _read(file, *records["byteorder"]) if "byteorder" in records else b"little"
    if order != b"little":
        raise Unreadable(f"its numbers are in the byte order {order[:20]!r}; expected b'little'. Save it on another machine")
    return records, _read(file, offset, size)


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _records(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Return offset and size of each record's data, by its name without the common folder. Raises ValueError and others."""
    size = file.seek(0, os.SEEK_END)
    directory = _directory(file, size)
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if not infos or infos[0].header_offset != 0:
        raise ValueError("it does not begin with its first record")
    folder = infos[0].filename.partition("/")[0] + "/"
    if any(info.filename == f"{folder}constants.pkl" for info in infos):
        raise Unsafe("TorchScript")
    records: dict[str, tuple[int, int]] = {}
    spans = []
    for info in infos:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name} is compressed; expected stored records")
        if info.flag_bits & ENCRYPTED_OR_PATCHED or info.orig_filename != name or not name.startswith(folder):
            raise ValueError(f"{name!r} is not a record of {folder!r}")
        if info.is_dir() or info.external_attr & FOLDER:
            raise ValueError(f"{name} is marked as a folder; expected a file")
        head = _read(file, info.header_offset, 30)
        if len(head) < 30 or not head.startswith(b"PK\3\4"):
            raise ValueError(f"{name} is not where the list of records says")
        offset = info.header_offset + 30 + sum(unpack("<HH", head[26:]))  # the name and the extra field
        spans.append((info.header_offset, offset + info.file_size))
        records[name.removeprefix(folder)] = (offset, info.file_size)
    if any(stop > start for (_, stop), (start, _) in pairwise([*spans, (directory, directory)])):
        raise ValueError("two records overlap")
    if len({name.lower() for name in records}) != len(infos):  # torch compares names without case
        raise ValueError("two records have one name")
    return records


def _directory(file: IO[bytes], size: int) -> int:
    """Return the offset of the list of records. Raises ValueError if its place is not unambiguous."""
    end = _read(file, max(0, size - END), END)
    if len(end) < END or not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0":
        raise ValueError("its end is missing")
    nbytes, offset = unpack("<LL", end[12:20])
    stop = size - END
    large = _read(file, max(0, stop - END64), END64)
    if large[-20:].startswith(b"PK\6\7"):
        stop -= END64
        if len(large) < END64 or not large.startswith(b"PK\6\6") or unpack("<Q", large[-12:-4])[0] != stop:
            raise ValueError("its end is damaged")
        nbytes, offset = unpack("<QQ", large[40:56])
    if nbytes > LONGEST_DIRECTORY or offset + nbytes != stop:
        raise ValueError("its list of records is not at its end")
    return int(offset)
