"""Checkpoints in which every process of FSDP saved its own state dict: `model_world_size_N_rank_R.pt`, as verl writes them.

Each file has the process's shard of every tensor, a DTensor, whose pickle is interpreted without running anything. All files
together are read as one checkpoint in pieces. Meshes of one dimension are supported; others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.distributed import Parts, every_dtype
from ray_soup.io.distributed_files import PICKLED, REBUILD, tensor_of, window
from ray_soup.io.formats import DTYPE_NAMES, LowPrecisionError, Piece, TensorInfo, name_of
from ray_soup.io.inert_pickle import Inert, read_pickle, shown
from ray_soup.io.lazy import torch
from ray_soup.io.mapped import Version
from ray_soup.io.parts import join_fsdp
from ray_soup.io.pieces import elements, fault_of
from ray_soup.io.progress import drain
from ray_soup.io.storage import LocalFile
from ray_soup.io.torch_archive import archive_of
from ray_soup.io.torch_pickle import TooLarge, Unreadable, Unsafe

RANK = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
WRAPPED = "torch._tensor._rebuild_from_type_v2"
_TENSOR, _MESH = "torch.distributed.tensor", "torch.distributed._mesh_layout"
NAMES = {
    *PICKLED, WRAPPED,
    "torch._utils._rebuild_wrapper_subclass", "torch.Size", "torch.device", "torch.serialization._get_layout",
    f"{_TENSOR}.DTensor", f"{_TENSOR}._dtensor_spec.DTensorSpec", f"{_TENSOR}._dtensor_spec.TensorMeta",
    f"{_TENSOR}._dtensor_spec.ShardOrderEntry", f"{_TENSOR}.placement_types.Shard",
    f"{_TENSOR}.placement_types.Replicate", "torch.distributed.device_mesh.DeviceMesh", f"{_MESH}._MeshLayout",
    f"{_MESH}._FlatLayout",
}  # fmt: skip
"""The names in the pickle of a state dict of DTensors, apart from those of dtypes."""


def is_rank_file(path: str) -> bool:
    """Return whether a path is that of the model part of one process of FSDP."""
    return RANK.fullmatch(path.rpartition("/")[2]) is not None


def rank_files(folder: str, names: Collection[str]) -> list[str]:
    """Return the model parts of all processes in a folder with these names, in the order of ranks; empty if there are none.

    Raises IngredientError if one is missing, or if there are those of several jobs.
    """
    found = {(int(m[1]), int(m[2])): m[0] for name in names if (m := RANK.fullmatch(name))}
    worlds = sorted({world for world, _ in found})
    if not worlds:
        return []
    missing = next((rank for rank in range(min(worlds[0], 1 << 16)) if (worlds[0], rank) not in found), None)
    if len(worlds) > 1 or missing is not None:
        what = f"rank {missing} of {worlds[0]} is missing" if len(worlds) == 1 else f"found world sizes {worlds}"
        raise IngredientError(
            f"{folder} has {next(iter(found.values()))}, the part of one process of FSDP; expected those of all "
            f"processes of one job, but {what}. Copy them again, or remove the others."
        )
    return [found[worlds[0], rank] for rank in range(worlds[0])]


class RankFile:
    """The part of one process on a local disk, or the copy in the cache of a remote one. See TensorFile."""

    def __init__(self, path: str) -> None:
        """Read the description of the tensors. Raises IngredientError if it is damaged or not a state dict of DTensors."""
        self._path = path
        self._file = LocalFile(drain(storage.local_copy(path)))
        self.metadata: Mapping[str, Any] = {}
        self.version: Version | None = None if storage.is_remote(path) else self._file.version
        self._view = self._file.read(0, self._file.version.size)
        try:
            self._records, pickled = archive_of(window(self._view))
            state = read_pickle(pickled, NAMES | every_dtype())
        except (Unreadable, TooLarge) as error:
            raise IngredientError(f"{path} is damaged: {error}. Copy all files of this checkpoint again.") from error
        except Unsafe as error:
            raise IngredientError(
                f"{path} holds {str(error)!r}; expected a state dict of dense tensors and DTensors. {join_fsdp(path)}"
            ) from error
        self.shards = {k: v for k, v in state.items() if _is_tensor(v)} if isinstance(state, dict) else {}

    def describe(self, number: int) -> dict[str, dict[str, TensorInfo]]:
        """Return nothing: all parts together describe the tensors."""
        return {}

    def read(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Read elements of a shard, as in TensorFile."""
        return elements(self.tensor(info), start, stop)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a view of a shard."""
        return self.local(info.stored[1])

    def local(self, name: str) -> torch.Tensor:
        """Return this process's shard of a tensor as a view of the file. Raises IngredientError if it is damaged."""
        made = self.shards[name]
        made = _state_of(made).get("_local_tensor") if made.name == WRAPPED else made
        try:
            return tensor_of(made, self._records, self._view)
        except Unreadable as error:
            raise IngredientError(f"{self._path}: {name} is damaged: {error}. Copy all files again.") from error

    def split(self, name: str, world: int) -> tuple[int | None, tuple[int, ...]]:
        """Return the dimension in which a tensor is cut over the processes, None if it is not, and its whole shape.

        Raises IngredientError for other ways to distribute it.
        """
        made = self.shards[name]
        if made.name != WRAPPED:
            return None, tuple(self.local(name).shape)
        spec = _state_of(made).get("_spec")
        placements, meta, mesh = (_get(spec, key) for key in ("placements", "tensor_meta", "mesh"))
        if isinstance(placements, tuple) and len(placements) == 1 and isinstance(meta, Inert) and self._ranks(mesh, world):
            shape = meta.arguments[0] if meta.arguments else None
            kind = placements[0].name.rpartition(".")[2] if isinstance(placements[0], Inert) else ""
            if isinstance(shape, tuple) and _is_shape(shape):
                if kind == "Replicate":
                    return None, shape
                dimension = _get(placements[0], "dim")
                if kind == "Shard" and type(dimension) is int and 0 <= dimension < len(shape):
                    return dimension, shape
        raise IngredientError(
            f"{self._path}: {name} is not cut in one dimension over all {world} processes, but in another way. "
            f"{join_fsdp(self._path)}"
        )

    def _ranks(self, mesh: Any, world: int) -> bool:
        """Return whether a mesh consists of all processes, in order."""
        made = _get(mesh, "_rank_map") or _get(mesh, "mesh")
        try:
            return tensor_of(made, self._records, self._view).flatten().tolist() == list(range(world))
        except Unreadable:
            return False

    def addresses(self) -> list[int]:
        """Return an address in the memory map."""
        return [torch.frombuffer(self._view, dtype=torch.uint8).data_ptr()] if len(self._view) else []


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Inert) and value.name in (REBUILD, WRAPPED)


def _get(made: Any, key: str) -> Any:
    return made.get(key) if isinstance(made, Inert) else None


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _state_of(made: Inert) -> dict[str, Any]:
    """Return the attributes of a DTensor in a pickle; empty if it has none."""
    state = made.arguments[3] if len(made.arguments) == 4 else None
    inner = state[1] if isinstance(state, tuple) and len(state) == 2 else None
    return inner if isinstance(inner, dict) else {}


def read_ranks(first: str) -> Parts:
    """Describe the checkpoint whose first part is the file `first`.

    Raises IngredientError if parts are missing, damaged, or do not fit together.
    """
    folder = first.rpartition("/")[0] or "."
    files = [storage.join(folder, name) for name in rank_files(folder, storage.listdir(folder))]
    stats = [storage.stat(file) for file in files]
    opened = [RankFile(file) for file in files]
    for file, part in zip(files, opened, strict=True):
        odd = next(iter(part.shards.keys() ^ opened[0].shards.keys()), None)
        if odd is not None or not part.shards:
            which = f"the tensor {shown(odd)} is only in one of them" if odd is not None else "they have no tensors"
            raise IngredientError(f"{file} and {files[0]} do not belong together: {which}. Copy all files again.")
    names = [name for name in opened[0].shards if isinstance(name, str)]
    return Parts(files, stats, {name: _joined(name, files, opened, place) for place, name in enumerate(names)})


def _joined(name: str, files: list[str], opened: list[RankFile], place: int) -> TensorInfo:
    """Return a tensor in its pieces. Raises IngredientError."""
    dimension, shape = opened[0].split(name, len(files))
    parts = [part.local(name) for part in opened]
    pieces, begin = [], 0
    for number, (part, local) in enumerate(zip(opened, parts, strict=True)):
        if part.split(name, len(files)) != (dimension, shape) or local.dtype != parts[0].dtype:
            raise IngredientError(f"{files[number]} and {files[0]} differ in how they cut {name}. Copy all files again.")
        if dimension is None and number:
            if not local.equal(parts[0]):
                raise IngredientError(
                    f"{files[number]} and {files[0]} hold different values of {name}, which is not cut over the processes. "
                    f"{join_fsdp(files[0])}"
                )
            continue
        start = tuple(begin if d == dimension else 0 for d in range(len(shape)))
        begin += local.shape[dimension] if dimension is not None and local.dim() else 0
        if local.numel():
            pieces.append(Piece(name_of(local.dtype), tuple(local.shape), number, place, ("", name), begin=start))
    fault = fault_of(shape, pieces)
    if fault:
        raise IngredientError(
            f"{files[0]} and the others are damaged: {name} is {list(shape)}, but {fault}. Copy all again."
        )
    if name_of(parts[0].dtype) not in DTYPE_NAMES:
        raise LowPrecisionError(f"{files[0]}: the tensor {name} is {parts[0].dtype}, which cannot be mixed.")
    return TensorInfo(name_of(parts[0].dtype), shape, 0, place, ("", name), pieces=tuple(pieces))
