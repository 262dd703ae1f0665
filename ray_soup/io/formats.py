"""Headers of checkpoint files: names, dtypes, shapes and byte offsets of their tensors, without reading the data.

A safetensors file begins with its header. A torch file is unpickled (always with `weights_only=True`) without its data. To
add a format, add one function here that returns a TensorInfo for each tensor.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
from argparse import Namespace
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.progress import drain

SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
CONTAINERS = ("state_dict", "model", "module", "model_state_dict", "ema_state_dict", "state_dict_ema", "model_ema")
"""Keys of a torch file under which training scripts store a state dict."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADER = 1 << 16  # bytes in the first read of a file
LONGEST_HEADER = 100_000_000  # bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and place of a tensor in the files of an ingredient."""

    dtype: torch.dtype
    """One of SAFETENSORS_DTYPES."""
    shape: tuple[int, ...]
    """Shape as in the model; () for a scalar."""
    file: int
    """Index of the file among the ingredient's files."""
    offset: int
    """Where the tensor's data begins in that file, in bytes."""
    stride: tuple[int, ...] | None = None
    """Strides in elements; None if the tensor is contiguous in row-major order."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def safetensors_header(path: str, file: int, size: int) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Args:
        path: path or URI.
        file: index of the file among the ingredient's files.
        size: size of the file in bytes.

    Raises IngredientError if the file is damaged, truncated or not a safetensors file.
    """
    source = storage.open_file(path, size)
    begin = bytes(source.read(0, min(size, HEADER)))
    _refuse_text(path, begin)
    length = struct.unpack("<Q", begin.ljust(8, b"\0")[:8])[0]
    if len(begin) < 8 or length > size - 8 or length > LONGEST_HEADER:
        raise IngredientError(
            f"{path} is not a safetensors file, or is truncated: its header should take {length} bytes, but the file has "
            f"{size}. Copy it again."
        )
    try:
        header = json.loads(begin[8 : 8 + length] if length <= HEADER - 8 else bytes(source.read(8, length)))
        header.pop("__metadata__", None)
        tensors = {name: _safetensors_info(path, file, 8 + length, name, entry) for name, entry in header.items()}
        end = _checked_end(tensors, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IngredientError(f"{path} has a damaged safetensors header ({error}). Copy it again.") from error
    if end > size:
        raise IngredientError(
            f"{path} is truncated: it has {size:,} bytes, but its header describes {end:,}. Copy it again."
        )
    return tensors


def _safetensors_info(path: str, file: int, data: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    """Parse one entry of a header whose tensors begin at byte `data`."""
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise IngredientError(
            f"{path}: the tensor {name} has dtype {entry['dtype']}; expected one of {', '.join(SAFETENSORS_DTYPES)}. Save "
            "it in one of these dtypes."
        )
    start, stop = entry["data_offsets"]
    info = TensorInfo(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), file, data + start)
    if any(type(n) is not int or n < 0 for n in (start, stop, *info.shape)):
        raise ValueError(f"{name} has the shape {entry['shape']} and the offsets {[start, stop]}")
    if stop - start != info.nbytes:
        raise IngredientError(
            f"{path}: the tensor {name} takes {stop - start} bytes; {info} should take {info.nbytes}. The file is damaged: "
            "copy it again."
        )
    return info


def _checked_end(tensors: dict[str, TensorInfo], data: int) -> int:
    """Return the byte at which the last tensor ends. Raises ValueError if two tensors overlap."""
    spans = sorted((info.offset, info.offset + info.nbytes, name) for name, info in tensors.items() if info.nbytes)
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(f"{name} and {other} overlap")
    return spans[-1][1] if spans else data


def _refuse_text(path: str, begin: bytes) -> None:
    """Refuse the text that a failed download leaves in place of a checkpoint. Raises IngredientError."""
    if begin.startswith(b"version https://git-lfs"):
        raise IngredientError(f"{path} is a Git LFS pointer, not the checkpoint itself. Run `git lfs pull` in its folder.")
    if begin.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise IngredientError(
            f"{path} is a web page, not a checkpoint: the server answered the download with an error or a login page. Open "
            "it to see which, then download the checkpoint again."
        )


def torch_containers(path: str, file: int, key: str = "") -> dict[str, dict[str, TensorInfo]]:
    """Find the state dicts in a file written by `torch.save`, by the names of their containers.

    The name "" stands for the top level. A remote file is first copied into the cache.

    Args:
        path: path or URI.
        file: index of the file among the ingredient's files.
        key: another container to look for, in addition to CONTAINERS.

    Raises IngredientError if the file is damaged, contains no tensors, or can only be unpickled by running code from it.
    """
    loaded = _load_without_data(path)
    if isinstance(loaded, dict) and {"state", "param_groups"} <= set(loaded):
        raise IngredientError(
            f"{path} is the state of an optimizer, not a model. Exclude it (with a glob such as model*.pt)."
        )
    if not isinstance(loaded, dict):
        raise IngredientError(f"{path} contains a {type(loaded).__name__}; expected a state dict. Save that instead.")
    containers: dict[str, dict[str, TensorInfo]] = {}
    for container, values in [("", loaded), *((name, loaded.get(name)) for name in (*CONTAINERS, key))]:
        if isinstance(values, dict):
            tensors = {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
            if tensors:
                containers[container] = {k: _torch_info(path, file, k, v) for k, v in tensors.items()}
    if not containers:
        raise IngredientError(
            f"{path} contains no tensors: found {sorted(map(str, loaded))[:8]}; expected a state dict, or one under one of "
            f"{', '.join(CONTAINERS)}. Specify its key, as in {path}?key=NAME."
        )
    return containers


def _load_without_data(path: str) -> Any:
    """Unpickle a file without its data; each tensor only knows the offset of its data in the file."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    local = drain(storage.local_copy(path))
    with open(local, "rb") as stream:
        _refuse_text(path, stream.read(512))
    try:  # Namespace: the options that training scripts save with the weights
        with FakeTensorMode(), torch.serialization.safe_globals([Namespace]):
            return torch.load(local, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        what = f"it holds '{found.group(1).strip('.')}'" if found else "it holds more than tensors and plain values"
        raise IngredientError(
            f"{path} was not opened: {what}, and unpickling that would run code from the file. Save the state dict "
            "alone: torch.save(model.state_dict(), path). If you trust the file, this command extracts it: "
            f"{_conversion(path)}"
        ) from error
    except Exception as error:  # on a file that is not a pickle, the unpickler can raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise IngredientError(
            f"{path} cannot be read as a torch checkpoint: it is damaged or truncated ({storage.stat(path).size:,} "
            f"bytes; {reason}). Copy it again."
        ) from error


def _conversion(path: str) -> str:
    """Return a command that extracts the state dict from a file with more than tensors."""
    return (
        f"python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
        f"torch.save(c.get('state_dict', c.get('model', c)), '{os.path.splitext(path)[0]}.state_dict.pt')\""
    )


def _torch_info(path: str, file: int, name: str, tensor: torch.Tensor) -> TensorInfo:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        raise IngredientError(
            f"{path}: the tensor {name} is {tensor.dtype}, {tensor.layout}; expected a dense tensor of "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPE_NAMES)}. Convert it to one of these."
        )
    if offset is None:
        raise IngredientError(
            f"{path} is in torch's legacy format (before 1.6), whose tensors cannot be read separately. Save it again: "
            f"torch.save(torch.load('{path}', weights_only=True), '{path}')."
        )
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    start = int(offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return TensorInfo(tensor.dtype, tuple(tensor.shape), file, start, stride)
