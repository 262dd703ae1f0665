"""Files of tensors, each described as its own library describes it; what an ingredient is made of.

    TorchFile           `torch.load`, memory-mapped (torch_files.py)
    SafetensorsFile     checked by `safetensors.safe_open`, memory-mapped
    RemoteSafetensors   byte ranges of a file in remote storage
    DistributedFile     pieces of `torch.distributed.checkpoint`, memory-mapped (distributed_files.py)
    RankFile            shards that one process of FSDP saved, memory-mapped (rank_files.py)

A file describes its tensors with TensorInfo, and reads elements of one by its TensorInfo. To add a format, add a class here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.distributed_files import DistributedFile
from ray_soup.io.formats import (
    DISTRIBUTED_SUFFIX,
    SAFETENSORS_DTYPES,
    SAFETENSORS_SUFFIX,
    TensorInfo,
    check_dtype,
    name_of,
    safetensors_header,
)
from ray_soup.io.lazy import torch
from ray_soup.io.mapped import Version, guard, mapped, opened
from ray_soup.io.pieces import elements
from ray_soup.io.progress import drain
from ray_soup.io.rank_files import RankFile, is_rank_file
from ray_soup.io.storage import RemoteFile

Described = dict[str, dict[str, TensorInfo]]
"""The tensors of a file, by the key of their state dict ("" for the top level) and by name."""


class TensorFile(Protocol):
    """An open file of tensors."""

    metadata: Mapping[str, Any]
    """Plain values stored beside the tensors."""
    version: Version | None
    """The version of the local file that is open; None for a file in remote storage, and for the copy of one."""

    def describe(self, number: int) -> Described:
        """Return the file's tensors; `number` is the index of the file among the ingredient's files."""

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a tensor, counted row by row: [stop - start], contiguous and aligned, not to be written to."""

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor in its shape: where possible a view of the file, of which only what is used is read."""

    def addresses(self) -> list[int]:
        """Return an address in each memory map that the file is read through."""


class TorchFile:
    """A torch file on a local disk, or the copy in the cache of a remote one."""

    def __init__(self, path: str, key: str = "") -> None:
        """Load the file; `key` names a state dict to look for. Raises IngredientError as `load_torch` does."""
        from ray_soup.io.torch_files import load_torch, plain_values, state_dicts

        loaded, version = load_torch(path, drain(storage.local_copy(path)))
        self._containers = state_dicts(path, loaded, key)
        self.metadata: Mapping[str, Any] = plain_values({k: v for k, v in loaded.items() if k not in self._containers})
        self.version: Version | None = None if storage.is_remote(path) else version

    def describe(self, number: int) -> Described:
        """Return the file's tensors, as in TensorFile."""
        found = {}
        for container, tensors in self._containers.items():
            order = {name: rank for rank, name in enumerate(sorted(tensors, key=lambda name: tensors[name].data_ptr()))}
            found[container] = {
                name: TensorInfo(name_of(tensor.dtype), tuple(tensor.shape), number, order[name], (container, name))
                for name, tensor in tensors.items()
            }
        return found

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a tensor, as in TensorFile."""
        return elements(self.tensor(info), start, stop)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a view of a tensor, as in TensorFile."""
        return self._containers[info.stored[0]][info.stored[1]]

    def addresses(self) -> list[int]:
        """Return an address in the memory map."""
        tensors = [t for tensors in self._containers.values() for t in tensors.values() if t.numel()]
        return [t.data_ptr() for t in tensors]


class SafetensorsFile:
    """A safetensors file on a local disk. It is described, and its float32 and float64 are read, without torch."""

    def __init__(self, path: str, headers_only: bool = False) -> None:
        """Open the file to read its tensors, or with `headers_only` to describe them.

        Raises IngredientError if it is damaged, truncated or not a safetensors file.
        """
        guard()
        self._path = path
        with opened(path) as (link, descriptor, version):
            try:
                file: Any = safe_open(link, framework="np")
            except (SafetensorError, RuntimeError, OSError, ValueError) as error:
                _explain(path, version.size, error)
            size = 0 if headers_only else version.size
            self._bytes = mapped(path, descriptor, size)
        self.metadata: Mapping[str, Any] = file.metadata() or {}
        self.version: Version | None = version
        self._size = version.size
        self._file: Any = file if headers_only else None  # it has a map of its own

    def describe(self, number: int) -> Described:
        """Return the file's tensors, as in TensorFile."""
        if not hasattr(self._file, "offset_keys"):  # before safetensors 0.5
            return {"": safetensors_header(self._path, number, self._size)[0]}
        found = {}
        for place, name in enumerate(self._file.offset_keys()):
            part = self._file.get_slice(name)
            dtype = part.get_dtype()
            check_dtype(self._path, name, dtype)
            found[name] = TensorInfo(SAFETENSORS_DTYPES[dtype], tuple(part.get_shape()), number, place, ("", name))
        begin = self._size - sum(info.nbytes for info in found.values())  # the library has checked that tensors fill
        for name, info in found.items():  # the file up to its end without gaps
            found[name] = replace(info, offset=begin)
            begin += info.nbytes
        return {"": found}

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a tensor, as in TensorFile."""
        return elements(self.tensor(info), start, stop)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a view of a tensor, as in TensorFile."""
        assert info.offset is not None
        data = self._bytes[info.offset : info.offset + info.nbytes]
        return torch.from_numpy(data).view(info.dtype).reshape(info.shape)

    def array(self, info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Read elements of a tensor of float32 or float64: [stop - start], not to be written to, not always aligned."""
        assert info.offset is not None
        return np.frombuffer(self._bytes, info.dtype_name, stop - start, info.offset + start * info.itemsize)

    def addresses(self) -> list[int]:
        """Return an address in the memory map."""
        return [self._bytes.ctypes.data]


def _explain(path: str, size: int, error: Exception) -> None:
    """Raise the IngredientError that says what is wrong with a file that safetensors does not open."""
    if size == 0:
        raise IngredientError(f"{path} is empty (0 bytes). Copy it again.") from error
    safetensors_header(path, 0, size)
    raise IngredientError(f"{path} cannot be read as safetensors: {error}. Copy it again.") from error


class RemoteSafetensors:
    """A safetensors file in remote storage."""

    version: Version | None = None

    def __init__(self, uri: str, size: int) -> None:
        """Open the file. Raises IngredientError if it is damaged, truncated or not a safetensors file."""
        self._uri, self._size = uri, size
        self._file = RemoteFile(uri, size)
        self.metadata: Mapping[str, Any] = {}

    def describe(self, number: int) -> Described:
        """Return the file's tensors, as in TensorFile."""
        tensors, self.metadata = safetensors_header(self._uri, number, self._size)
        return {"": tensors}

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a tensor, as in TensorFile."""
        assert info.offset is not None
        data = self._file.read(info.offset + start * info.itemsize, (stop - start) * info.itemsize)
        return elements(torch.frombuffer(bytearray(data), dtype=info.dtype), 0, stop - start)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Read a whole tensor, as in TensorFile."""
        return self.read(info, 0, info.numel).reshape(info.shape)

    def addresses(self) -> list[int]:
        """Return nothing: no memory map is used."""
        return []


def open_tensors(path: str, size: int, key: str = "", headers_only: bool = False) -> TensorFile:
    """Open a file of tensors at a path or URI.

    Args:
        path: path or URI.
        size: size of the file in bytes.
        key: a state dict of a torch file to look for.
        headers_only: the tensors will be described and not read.

    Raises IngredientError if the file is damaged, or can only be read by running code from it.
    """
    if size == 0:
        raise IngredientError(f"{path} is empty (0 bytes). Copy it again.")
    if path.endswith(DISTRIBUTED_SUFFIX):
        return DistributedFile(path)
    if is_rank_file(path):
        return RankFile(path)
    if not path.endswith(SAFETENSORS_SUFFIX):
        return TorchFile(path, key)
    return RemoteSafetensors(path, size) if storage.is_remote(path) else SafetensorsFile(path, headers_only)
