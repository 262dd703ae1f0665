"""What is known of a tensor before it is read, and the header of a safetensors file in remote storage.

Local files are described by their own libraries (tensor_files.py). The reader of headers here serves what these
cannot do: ranges of a file in remote storage, and messages that say what is wrong with a file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.lazy import torch

SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
DISTRIBUTED_SUFFIX = ".distcp"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
BEFORE_AVERAGING = "current_model_state"
"""The key under which Lightning's WeightAveraging keeps the last weights: their average is under `state_dict`."""
CONTAINERS = (
    "state_dict", "model", "module", "model_state_dict", "ema_state_dict", "state_dict_ema", "model_ema", BEFORE_AVERAGING,
)  # fmt: skip
"""Keys of a torch file under which training scripts store a state dict."""

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Torch's name of each dtype of a safetensors file that can be mixed or copied."""
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")
HEADER = 1 << 16  # bytes in the first read of a file
LONGEST_HEADER = 100_000_000  # bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and place of a tensor in the files of an ingredient."""

    dtype_name: str
    """Torch's name of its dtype, one of DTYPE_NAMES: headers are read without torch, which takes a second to import."""
    shape: tuple[int, ...]
    """Shape as in the model; () for a scalar."""
    file: int
    """Index of the file among the ingredient's files."""
    place: int
    """Orders the tensors of a file by where their data lies."""
    stored: tuple[str, str] = ("", "")
    """The key of the state dict in the file ("" for the top level), and the tensor's name in it."""
    offset: int | None = None
    """Byte at which the tensor's data begins, row by row; None where a library finds it."""
    pieces: tuple[Piece, ...] = ()
    """The pieces that a tensor is stored in, which fill it without overlapping; () if it is stored whole."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype itself."""
        return dtype_of(self.dtype_name)

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes."""
        return itemsize(self.dtype_name)

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers of a dtype that can be mixed."""
        return self.dtype_name in FLOATS

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype_name} {list(self.shape)}"


ZERO = TensorInfo("int64", (), -1, 0)
"""A counter that no file contains: it is 0."""


@dataclass(frozen=True, slots=True)
class Piece(TensorInfo):
    """A piece of a tensor: the elements from `begin` to `begin + shape`, stored like a tensor of its own."""

    begin: tuple[int, ...] = ()
    """First index of the piece in each dimension of the whole tensor."""
    length: int = 0
    """Bytes that the piece takes in its file from byte `place` on, if it is an archive of its own."""


def name_of(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that torch calls `name`."""
    found: torch.dtype = getattr(torch, name)
    return found


def itemsize(name: str) -> int:
    """Return the bytes of an element of a dtype, by torch's name."""
    bits = re.search(r"\d+", name)
    return max(int(bits[0]) // 8, 1) if bits else 1


class LowPrecisionError(IngredientError):
    """A tensor has a dtype of so few bits that only quantized checkpoints use it."""


def safetensors_header(path: str, file: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of a safetensors file: its tensors, by name, and its metadata.

    Args:
        path: path or URI.
        file: index of the file among the ingredient's files.
        size: size of the file in bytes.

    Raises IngredientError if the file is damaged, truncated or not a safetensors file.
    """
    source = storage.open_file(path, size)
    begin = bytes(source.read(0, min(size, HEADER)))
    refuse_text(path, begin)
    length = struct.unpack("<Q", begin.ljust(8, b"\0")[:8])[0]
    if len(begin) < 8 or length > size - 8 or length > LONGEST_HEADER:
        raise IngredientError(
            f"{path} is not a safetensors file, or is truncated: its header should take {length} bytes, but the file has "
            f"{size}. Copy it again."
        )
    try:
        text = begin[8 : 8 + length] if length <= HEADER - 8 else bytes(source.read(8, length))
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _safetensors_info(path, file, 8 + length, name, entry) for name, entry in header.items()}
        end = _checked_end(tensors, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise IngredientError(f"{path} has a damaged safetensors header ({error}). Copy it again.") from error
    if end > size:
        raise IngredientError(
            f"{path} is truncated: it has {size:,} bytes, but its header describes {end:,}. Copy it again."
        )
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def check_dtype(path: str, name: str, dtype: str) -> None:
    """Check that a safetensors file names a dtype that can be mixed or copied. Raises IngredientError."""
    if dtype not in SAFETENSORS_DTYPES:
        raise (LowPrecisionError if dtype.startswith(("F8", "F6", "F4")) else IngredientError)(
            f"{path}: the tensor {name} has dtype {dtype}; expected one of {', '.join(SAFETENSORS_DTYPES)}. Save it in one "
            "of these dtypes."
        )


def _safetensors_info(path: str, file: int, data: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    """Parse one entry of a header whose tensors begin at byte `data`."""
    check_dtype(path, name, entry["dtype"])
    start, stop = entry["data_offsets"]
    begin = data + start
    info = TensorInfo(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), file, begin, ("", name), begin)
    if any(type(n) is not int or n < 0 for n in (start, stop, *info.shape)):
        raise ValueError(f"{name} has the shape {entry['shape']} and the offsets {[start, stop]}")
    if stop - start != info.nbytes:
        raise IngredientError(
            f"{path}: the tensor {name} takes {stop - start} bytes; {info} should take {info.nbytes}. The file is damaged: "
            "copy it again."
        )
    return info


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary. Raises ValueError if two have one key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it contains a name twice")
    return found


def _checked_end(tensors: dict[str, TensorInfo], data: int) -> int:
    """Return the byte at which the last tensor ends. Raises ValueError if two tensors overlap."""
    spans = sorted((info.place, info.place + info.nbytes, name) for name, info in tensors.items() if info.nbytes)
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            raise ValueError(f"{name} and {other} overlap")
    return spans[-1][1] if spans else data


def refuse_text(path: str, begin: bytes) -> None:
    """Refuse the text that a failed download leaves in place of a checkpoint. Raises IngredientError."""
    if begin.startswith(b"version https://git-lfs"):
        raise IngredientError(f"{path} is a Git LFS pointer, not the checkpoint itself. Run `git lfs pull` in its folder.")
    if begin.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise IngredientError(
            f"{path} is a web page, not a checkpoint: the server answered the download with an error or a login page. Open "
            "it to see which, then download the checkpoint again."
        )
