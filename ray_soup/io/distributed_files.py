"""The files of `torch.distributed.checkpoint`: in each, pieces of tensors follow one another, each an archive of torch.save.

Only the pickle of a piece is interpreted; its values are a view of the file, which is memory-mapped.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import IO, Any, cast

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.formats import DTYPE_NAMES, TensorInfo, name_of
from ray_soup.io.inert_pickle import Inert, read_pickle
from ray_soup.io.lazy import torch
from ray_soup.io.mapped import Version
from ray_soup.io.pieces import elements
from ray_soup.io.progress import drain
from ray_soup.io.storage import LocalFile
from ray_soup.io.torch_archive import open_archive
from ray_soup.io.torch_pickle import TooLarge, Unreadable, Unsafe

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
        "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
}  # fmt: skip
"""Torch's name of the dtype of a storage in a pickle, by its class."""
REBUILD, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
PICKLED = {*STORAGES, REBUILD, PARAMETER, "collections.OrderedDict"}
"""The names in the pickle of a dense tensor."""


class DistributedFile:
    """A file of pieces on a local disk, or the copy in the cache of a remote one. See TensorFile."""

    def __init__(self, path: str) -> None:
        """Map the file. Raises IngredientError if it cannot be read."""
        self._path = path
        self._file = LocalFile(drain(storage.local_copy(path)))
        self._tensors: dict[int, torch.Tensor] = {}
        self.metadata: Mapping[str, Any] = {}
        self.version: Version | None = None if storage.is_remote(path) else self._file.version

    def describe(self, number: int) -> dict[str, dict[str, TensorInfo]]:
        """Return nothing: the file `.metadata` describes the pieces (distributed.py)."""
        return {}

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a piece, as in TensorFile."""
        return elements(self.tensor(info), start, stop)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a view of a piece.

        Raises IngredientError if the file holds something else there than `.metadata` says.
        """
        if info.place not in self._tensors:
            length = getattr(info, "length", 0)
            found = tensor_in(self._file.read(info.place, length), f"{self._path}: {info.stored[1]} at byte {info.place:,}")
            if found.dtype != info.dtype or tuple(found.shape) != info.shape:
                it = TensorInfo(name_of(found.dtype), tuple(found.shape), 0, 0)
                raise IngredientError(
                    f"{self._path}: the piece of {info.stored[1]} at byte {info.place:,} is {it}, but .metadata says "
                    f"{info}: the files belong to different checkpoints, or are damaged. Copy all of them again."
                )
            self._tensors[info.place] = found
        return self._tensors[info.place]

    def addresses(self) -> list[int]:
        """Return an address in the memory map."""
        return [found.data_ptr() for found in self._tensors.values() if found.numel()][:1]


class _Window(io.RawIOBase):
    """Part of a memory map as a file."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def window(view: memoryview) -> IO[bytes]:
    """Return bytes of a memory map as a file."""
    return cast(IO[bytes], io.BufferedReader(_Window(view)))


def tensor_in(view: memoryview, what: str) -> torch.Tensor:
    """Return the tensor in an archive of torch.save, as a view of it.

    Args:
        view: the bytes of the archive.
        what: the file and the tensor, for messages.

    Raises IngredientError if it is damaged, or not an archive of one dense tensor.
    """
    try:
        records, pickled = open_archive(window(view))
        made = read_pickle(pickled, PICKLED)
        if isinstance(made, Inert) and made.name == PARAMETER:
            made = made.arguments[0]
        return tensor_of(made, records, view)
    except (Unreadable, TooLarge) as error:
        raise IngredientError(f"{what} is damaged: {error}. Copy all files of this checkpoint again.") from error
    except Unsafe as error:
        raise IngredientError(
            f"{what} holds {str(error)!r}; expected a dense tensor. Save the model's state dict with "
            "torch.distributed.checkpoint.save."
        ) from error


def tensor_of(made: Any, records: Mapping[str, tuple[int, int]], view: memoryview) -> torch.Tensor:
    """Return a dense tensor in a pickle as a view of the archive that it lies in.

    Args:
        made: the inert value of the tensor.
        records: offset and size of the archive's records, by name.
        view: the bytes of the archive.

    Raises Unreadable if it is another value, or outside its storage.
    """
    if not isinstance(made, Inert) or made.name != REBUILD or len(made.arguments) not in (6, 7) or any(made.arguments[6:]):
        raise Unreadable("it is not a dense tensor")
    stored, first, size, stride = made.arguments[:4]
    if not isinstance(stored, Inert) or not isinstance(stored.arguments, tuple) or len(stored.arguments) != 5:
        raise Unreadable("its storage is not described")
    named, key, count = STORAGES.get(str(stored.arguments[1])), stored.arguments[2], stored.arguments[4]
    numbers = (first, count, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if named not in DTYPE_NAMES or any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers):
        raise Unreadable("its storage, shape or strides are not those of a tensor")
    dtype: torch.dtype = getattr(torch, named)
    offset, nbytes = records.get(f"data/{key}", (0, 0))
    last = first + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
    if len(size) != len(stride) or last >= count or count * dtype.itemsize > nbytes:
        raise Unreadable("its shape and strides lead out of its storage")
    if last < 0:
        return torch.empty(size, dtype=dtype)
    values = torch.frombuffer(view[offset : offset + count * dtype.itemsize], dtype=dtype)
    return values.as_strided(size, stride, first)
