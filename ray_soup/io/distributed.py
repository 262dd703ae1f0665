"""Folders of `torch.distributed.checkpoint`: which tensors they have, and where the pieces of each one lie.

The file `.metadata`, a pickle, is interpreted without running anything. It lists the pieces of every tensor: the place of
each in the tensor, and in a file. What it says is checked against the files before any tensor is read: the pieces fill every
tensor exactly once, and each lies within its file.

Names are those that torch gives to nested state dicts, as in `model.layer.weight`; prefixes are matched as in any other
checkpoint (binding.py). The state of an optimizer and of other parts of a training is left out, unless `?key=` names it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.formats import DISTRIBUTED_SUFFIX, DTYPE_NAMES, LowPrecisionError, Piece, TensorInfo
from ray_soup.io.inert_pickle import Inert, read_pickle, shown
from ray_soup.io.pieces import fault_of
from ray_soup.io.remote import Stat
from ray_soup.io.torch_pickle import TooLarge, Unreadable, Unsafe

METADATA = ".metadata"
STATE_FILE = "meta.pt"
"""The file with the state of the training that Lightning writes beside the pieces."""
LONGEST_METADATA = 256 << 20  # bytes; 600,000 pieces take 100 MB
TRAINING_STATE = re.compile(r"(?i:(optim|optimizer|lr_?scheduler|scheduler|dataloader|rng)s?(_?states?)?(_\d+)?)")
"""Keys of a nested state dict under which the state of a training is stored."""
_MODULE = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
}  # fmt: skip
_PATHS = {
    f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows", "")
}
PICKLED = {
    *(f"{_MODULE}.{name}" for name in _CLASSES), "torch.distributed.checkpoint.filesystem._StorageInfo", *_PATHS,
    "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict",
}  # fmt: skip
"""The names in the file `.metadata`, apart from those of dtypes."""


class Parts(NamedTuple):
    """A distributed checkpoint: its files, and its tensors in pieces."""

    files: list[str]
    """Paths or URIs; first `.metadata`, then the files with the tensors' pieces, sorted."""
    stats: list[Stat]
    tensors: dict[str, TensorInfo]


@functools.cache
def every_dtype() -> frozenset[str]:
    """Return the names of all dtypes of torch, as in torch.float32."""
    import torch

    return frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))


def is_metadata(path: str) -> bool:
    """Return whether a path is that of the file that describes a distributed checkpoint."""
    return path.rpartition("/")[2] == METADATA


def check_complete(folder: str, names: Collection[str]) -> None:
    """Check that a folder with these names does not lack the description of its pieces. Raises IngredientError."""
    if METADATA in names or not any(name.endswith(DISTRIBUTED_SUFFIX) for name in names):
        return
    own = next((name for name in names if re.fullmatch(r"__\d+\.metadata", name)), None)
    if own is not None:
        raise IngredientError(
            f"{folder} is a distributed checkpoint in which each process described its own part ({own}); expected one file "
            f"{METADATA}. Save it with use_collectives=True, the default of torch.distributed.checkpoint.save."
        )
    raise IngredientError(
        f"{folder} has files ending in {DISTRIBUTED_SUFFIX}, but no {METADATA}, which torch.distributed.checkpoint writes "
        "last: it was not saved to the end, or not copied completely (the name begins with a dot). Copy it again, or "
        "exclude it."
    )


def read_parts(described: str, with_training_state: bool = False) -> Parts:
    """Read the description of a distributed checkpoint, and check it against the files.

    Args:
        described: path or URI of the file `.metadata`.
        with_training_state: keep tensors of optimizers and other parts of a training.

    Raises IngredientError if the description is damaged, unsafe or does not fit the files.
    """
    folder = described.rpartition("/")[0] or "."
    stat = storage.stat(described)
    if stat.size > LONGEST_METADATA:
        raise IngredientError(f"{described} has {stat.size:,} bytes; expected at most {LONGEST_METADATA:,}. Copy it again.")
    try:
        metadata = read_pickle(storage.read_bytes(described), PICKLED | every_dtype())
        tensors = _description(metadata, with_training_state)
    except Unsafe as error:
        raise IngredientError(
            f"{described} was not opened: it holds {str(error)!r}, and unpickling that would run code from the file; "
            "expected what torch.distributed.checkpoint.save writes. Save the checkpoint with that function."
        ) from error
    except (Unreadable, TooLarge) as error:
        raise IngredientError(f"{described} is damaged: {error}. Copy all files of this checkpoint again.") from error
    if not tensors:
        raise IngredientError(
            f"{folder} has no tensors of a model, only the state of a training, such as an optimizer's. Exclude it, or name "
            "what to use in the recipe, as in ?key=NAME."
        )
    names = sorted({place.file for found in tensors.values() for place in found.places})
    stats = [stat, *(_stat_of(folder, name, described) for name in names)]
    files = [described, *(storage.join(folder, name) for name in names)]
    number = {name: index + 1 for index, name in enumerate(names)}
    placed = {name: _tensor(name, found, number) for name, found in tensors.items()}
    _check_pieces(described, placed)
    _check_places(files, stats, placed)
    return Parts(files, stats, placed)


class _Place(NamedTuple):
    """A piece as `.metadata` describes it."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class _Described(NamedTuple):
    """A tensor as `.metadata` describes it."""

    dtype_name: str
    shape: tuple[int, ...]
    places: list[_Place]


def _description(metadata: Any, with_training_state: bool) -> dict[str, _Described]:
    """Return the tensors that the inert value of `.metadata` describes. Raises Unreadable."""
    entries, stored = _dict_of(metadata, "Metadata", "state_dict_metadata"), _dict_of(metadata, "Metadata", "storage_data")
    planner = metadata.get("planner_data")
    paths = planner if isinstance(planner, dict) else {}
    places = {}
    for index, info in stored.items():
        if not isinstance(index, Inert) or not isinstance(info, Inert):
            raise Unreadable(f"it stores {shown(index)} as {shown(info)}")
        if index.get("offset") is not None:
            places[index.get("fqn"), _sizes(index.get("offset"), "an offset")] = info
    found = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Inert):
            raise Unreadable(f"it names {shown(name)}, {shown(entry)}")
        if entry.name == f"{_MODULE}.BytesStorageMetadata" or (
            not with_training_state and _is_training_state(name, paths.get(name))
        ):
            continue
        found[name] = _described(name, entry, places)
    return found


def _is_training_state(name: str, path: Any) -> bool:
    """Return whether a tensor is part of an optimizer or the like, by its path in the nested state dict if that is known."""
    keys = path if isinstance(path, tuple) and path else name.split(".")[:2]
    return any(isinstance(key, str) and TRAINING_STATE.fullmatch(key) for key in (keys[0], *keys[1:-1]))


def _dict_of(made: Any, name: str, key: str) -> dict[Any, Any]:
    value = made.get(key) if isinstance(made, Inert) and made.name == f"{_MODULE}.{name}" else None
    if not isinstance(value, dict):
        raise Unreadable(f"it is {shown(made)}, without a dictionary {key}")
    return value


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise Unreadable(f"{what} is {shown(value)}; expected whole numbers from 0 on")
    return value


def _described(name: str, entry: Inert, places: Mapping[Any, Inert]) -> _Described:
    """Return what an entry says about a tensor. Raises Unreadable or IngredientError."""
    properties, chunks = entry.get("properties"), entry.get("chunks")
    state = properties.state if isinstance(properties, Inert) else None
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(chunks, list):
        raise Unreadable(f"its entry for {shown(name)} is {shown(entry)}")
    dtype, shape = str(state[0]), _sizes(entry.get("size"), f"the shape of {name}")
    if dtype not in every_dtype() or not isinstance(state[1], Inert) or state[1].arguments != ("torch.strided",):
        raise Unreadable(f"its entry for {shown(name)} has the dtype {shown(state[0])} and the layout {shown(state[1])}")
    found = []
    for chunk in chunks:
        if not isinstance(chunk, Inert):
            raise Unreadable(f"a piece of {shown(name)} is {shown(chunk)}")
        begin = _sizes(chunk.get("offsets"), f"the offset of a piece of {name}")
        size = _sizes(chunk.get("sizes"), f"the shape of a piece of {name}")
        if 0 in size:
            continue
        info = places.get((name, begin))
        if info is None:
            raise Unreadable(f"it does not say where the piece of {shown(name)} at {list(begin)} is stored")
        found.append(_Place(begin, size, *_stored(name, info)))
    return _Described(dtype.removeprefix("torch."), shape, found)


def _stored(name: str, info: Inert) -> tuple[str, int, int]:
    """Return file, first byte and length of a piece. Raises Unreadable."""
    file, place = info.get("relative_path"), (info.get("offset"), info.get("length"))
    if not isinstance(file, str) or not re.fullmatch(r"[^/\\\x00-\x1f]+", file) or not file.endswith(DISTRIBUTED_SUFFIX):
        raise Unreadable(
            f"it stores {shown(name)} in {shown(file)}; expected a file ending in {DISTRIBUTED_SUFFIX} beside it"
        )
    if info.get("transform_descriptors"):
        raise Unreadable(f"the pieces of {shown(name)} are transformed, for example compressed; expected plain ones")
    offset, length = _sizes(place, f"the place of a piece of {name}")
    return file, offset, length


def _stat_of(folder: str, name: str, described: str) -> Stat:
    path = storage.join(folder, name)
    try:
        if storage.isfile(path):
            return storage.stat(path)
    except FileNotFoundError:
        pass
    raise IngredientError(f"{path} is missing, but {described} lists it. Copy all files of this checkpoint again.")


def _tensor(name: str, found: _Described, number: Mapping[str, int]) -> TensorInfo:
    pieces = tuple(
        Piece(found.dtype_name, p.shape, number[p.file], p.offset, ("", name), begin=p.begin, length=p.length)
        for p in sorted(found.places)
    )
    first = pieces[0] if pieces else None
    file, place = (first.file, first.place) if first is not None else (0, 0)
    return TensorInfo(found.dtype_name, found.shape, file, place, ("", name), pieces=pieces)


def _check_pieces(described: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor can be mixed, and is filled by its pieces. Raises IngredientError."""
    for name, info in tensors.items():
        if info.dtype_name not in DTYPE_NAMES:
            raise (LowPrecisionError if "float8" in info.dtype_name else IngredientError)(
                f"{described}: the tensor {name} is torch.{info.dtype_name}; expected one of {', '.join(DTYPE_NAMES)}. Save "
                "it in one of these dtypes."
            )
        fault = fault_of(info.shape, info.pieces)
        if fault:
            raise IngredientError(
                f"{described} is damaged: the tensor {name} is {list(info.shape)}, but {fault}. Copy all files of this "
                "checkpoint again, or save it again."
            )


def _check_places(files: list[str], stats: list[Stat], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every piece lies within its file, is large enough, and shares no bytes. Raises IngredientError."""
    spans: list[list[tuple[int, int, str]]] = [[] for _ in files]
    for name, info in tensors.items():
        for piece in info.pieces:
            spans[piece.file].append((piece.place, piece.place + piece.length, name))
            if piece.length < piece.nbytes:
                raise IngredientError(
                    f"{files[0]} is damaged: it gives {piece.length:,} bytes to a piece of {name}, {piece}, which takes "
                    f"{piece.nbytes:,}. Copy all files of this checkpoint again."
                )
    for file, stat, places in zip(files, stats, spans, strict=True):
        places.sort()
        if places and max(stop for _, stop, _ in places) > stat.size:
            start, stop, name = next(place for place in places if place[1] > stat.size)
            raise IngredientError(
                f"{file} is truncated: it has {stat.size:,} bytes, but a piece of {name} takes bytes {start:,} to {stop:,}. "
                "Copy it again."
            )
        for (first, stop, one), (start, end, other) in pairwise(places):
            tied = (first, stop) == (start, end) and one != other  # two names of one tensor
            if start < stop and not tied:
                raise IngredientError(
                    f"{files[0]} is damaged: pieces of {one} and {other} overlap at byte {start:,} of {file}. Copy "
                    "all files of this checkpoint again."
                )
