"""One ingredient: a checkpoint opened by its headers, then read tensor by tensor.

In every format a tensor is a range of bytes in a file: local files are read through a memory map, remote safetensors files
by range requests, and remote torch files from a copy in this node's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io import storage
from ray_soup.io.binding import Tensors, best_reading
from ray_soup.io.checkpoint_files import checkpoint_of, shards_of, split_key, stem, suffixes
from ray_soup.io.formats import (
    INDEX_SUFFIXES,
    SAFETENSORS_SUFFIX,
    TensorInfo,
    safetensors_header,
    torch_containers,
)
from ray_soup.io.progress import drain
from ray_soup.io.storage import LocalFile, RemoteFile
from ray_soup.io.sweeps import Trial


@dataclass(frozen=True)
class Ingredient:
    """One fine-tuned checkpoint: its name, its files, and the place of each tensor of its state dict.

    An ingredient is opened from headers alone. At first `tensors` is its first container; `bind` returns the ingredient with
    the names of a model. It can be pickled: the process that unpickles it opens the files again.
    """

    name: str
    """Short name, unique among the ingredients of a soup."""
    path: str
    """Path or URI as found, with `?key=` if the recipe names a container."""
    files: tuple[str, ...]
    """Paths or URIs of the files."""
    sizes: tuple[int, ...]
    """Sizes of the files in bytes."""
    versions: tuple[int, ...]
    """Modification times of the files in ns."""
    containers: Mapping[str, Tensors]
    """Every state dict in the checkpoint, by the key that it is stored under; "" is the top level."""
    tensors: Tensors = field(default_factory=dict)
    """The tensors in use, by name."""
    copies: tuple[tuple[str, str, TensorInfo], ...] = ()
    """Second copies of tensors that the model ties together: first name, second name, place."""
    key: str = ""
    """The container that the recipe names, as in `?key=state_dict_ema`."""
    left_out: tuple[str, ...] = ()
    """Tensors that the model does not have and does not need, such as the text tower of a CLIP."""
    trial: Trial | None = None
    """The trial of a sweep that the checkpoint comes from."""
    _sources: dict[int, LocalFile | RemoteFile] = field(default_factory=dict, repr=False, compare=False)
    """The files opened so far, shared with the ingredients derived from this one."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": {}}

    @property
    def nbytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(self.sizes)

    @property
    def identity(self) -> list[Any]:
        """JSON value that identifies the content without reading it: path, size and version of each file, and the key."""
        files = [[f, s, v] for f, s, v in zip(self.files, self.sizes, self.versions, strict=True)]
        return [*files, self.key] if self.key else files

    def source(self, file: int) -> LocalFile | RemoteFile:
        """Return file number `file`, opened on first use. Raises IngredientError if its size has changed."""
        if file not in self._sources:
            path = self.files[file]
            size = storage.stat(path).size
            if size != self.sizes[file]:
                raise IngredientError(
                    f"{path} changed while it was in use: it has {size:,} bytes; expected {self.sizes[file]:,}. "
                    "Rerun the command."
                )
            if not path.endswith(SAFETENSORS_SUFFIX):
                path = drain(storage.local_copy(path))
            self._sources[file] = storage.open_file(path, self.sizes[file])
        return self._sources[file]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._sources.clear()

    def drop_pages(self) -> None:
        """Release the memory pages read so far from this process."""
        for source in self._sources.values():
            source.drop_pages()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop` of the flattened tensor `name`.

        Returns values [stop - start] in the tensor's own dtype: a read-only view of the file if the layout allows it.
        """
        return self._read(self.tensors[name], start, stop)

    def _read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = info.numel if stop is None else stop
        if stop <= start:
            return torch.empty(0, dtype=info.dtype)
        if info.stride is None:
            buffer = self.source(info.file).read(
                info.offset + start * info.dtype.itemsize, (stop - start) * info.dtype.itemsize
            )
            return _tensor_of(buffer, info.dtype)
        extent = 1 + sum((n - 1) * s for n, s in zip(info.shape, info.stride, strict=True))
        buffer = self.source(info.file).read(info.offset, extent * info.dtype.itemsize)
        whole = torch.as_strided(_tensor_of(buffer, info.dtype), info.shape, info.stride)
        return whole.reshape(-1)[start:stop]

    def bind(self, expected: Iterable[str], tied: Mapping[str, str]) -> Ingredient:
        """Return this ingredient with the container and prefix whose names are those of a model.

        The result fits if and only if `set(tensors) == set(expected)`. If nothing fits, its `tensors` are the nearest match,
        so that the caller can list the differences.

        Args:
            expected: names of the model's tensors. A text tower is left out if the model has none.
            tied: maps the second name of a tied tensor to its first; a file may contain either name or both.
        """
        best = best_reading(self.containers, set(expected), tied)
        return replace(self, tensors=best.tensors, copies=best.copies, left_out=best.left_out)

    def with_trial(self, trial: Trial | None) -> Ingredient:
        """Return this ingredient with `trial`, the trial of a sweep that it comes from."""
        return replace(self, trial=trial)

    def check_copies(self) -> None:
        """Check that both copies of a tied tensor are equal. Raises IngredientError if they differ."""
        for first, alias, info in self.copies:
            if not torch.equal(self.read(first), self._read(info)):
                raise IngredientError(
                    f"{self.path}: {first} and {alias} are one tensor in the model, but differ in this file. Use a model "
                    "that does not tie them, or save the checkpoint from the tied model."
                )


def _tensor_of(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():  # torch warns that the map is read-only; nothing here writes to it
        warnings.simplefilter("ignore")
        return torch.frombuffer(buffer, dtype=dtype)


def open_ingredient(path: str, name: str | None = None) -> Ingredient:
    """Open a checkpoint by its headers.

    Args:
        path: a file, an index (`*.index.json`), or a folder with one model; append `?key=NAME` to select a container.
        name: name of the ingredient; default: the file name without its suffix.

    Raises IngredientError if a file is broken, RecipeError if there is no checkpoint.
    """
    spec, (path, key) = path, split_key(path)
    file = checkpoint_of(path)
    if file is None:
        raise RecipeError(
            f"{path} is not a checkpoint: expected a file ending in {suffixes()}, or a folder with one. Check the path."
        )
    files = [file]
    if file.endswith(INDEX_SUFFIXES):
        files = shards_of(file)
        for shard in files:
            if not storage.isfile(shard):
                raise IngredientError(f"{shard} is missing, but {file} lists it. Copy it to that place.")
    stats = [storage.stat(f) for f in files]
    containers = _containers(file, files, [s.size for s in stats], key)
    if key and key not in containers:
        known = ", ".join(filter(None, containers)) or "none: its tensors are at the top level"
        raise IngredientError(f"{path} has no tensors under the key '{key}'; its keys: {known}. Fix ?key= in the recipe.")
    tensors = containers[key] if key else next(iter(containers.values()))
    if tensors and all("lora_" in tensor for tensor in tensors):
        raise IngredientError(
            f"{path} is a LoRA adapter ({len(tensors)} tensors, such as {next(iter(tensors))}); expected a whole model. "
            "Merge it into its base model (peft: model.merge_and_unload()) and save that."
        )
    return Ingredient(
        name=name or stem(path),
        path=spec,
        files=tuple(files),
        sizes=tuple(s.size for s in stats),
        versions=tuple(s.version for s in stats),
        containers={key: tensors} if key else containers,
        tensors=tensors,
        key=key,
    )


def _containers(file: str, files: list[str], sizes: list[int], key: str) -> dict[str, dict[str, TensorInfo]]:
    """Read the headers of the state dicts in a checkpoint; `files` are its shards, or `file` alone."""
    tensors: dict[str, TensorInfo] = {}
    for number, (part, size) in enumerate(zip(files, sizes, strict=True)):
        if size == 0:
            raise IngredientError(f"{part} is empty (0 bytes). Copy it again.")
        if part.endswith(SAFETENSORS_SUFFIX):
            tensors.update(safetensors_header(part, number, size))
        elif file.endswith(INDEX_SUFFIXES):
            tensors.update(torch_containers(part, number)[""])
    whole = file.endswith((SAFETENSORS_SUFFIX, *INDEX_SUFFIXES))
    return {"": tensors} if whole else torch_containers(file, 0, key)
