"""One ingredient: a checkpoint that is described without its data, then read tensor by tensor.

Local files are read through a memory map, remote safetensors files by range requests, and other remote files from a copy in
this node's cache. A file that changes while it is in use is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io import storage
from ray_soup.io.binding import Ignored, Tensors, best_reading
from ray_soup.io.checkpoint_files import checkpoint_of, index_map, is_of_folder, refuse_piece, split_key, stem, suffixes
from ray_soup.io.distributed import is_metadata, read_parts
from ray_soup.io.formats import INDEX_SUFFIXES, SAFETENSORS_SUFFIX, ZERO, LowPrecisionError, TensorInfo, dtype_of
from ray_soup.io.lazy import torch
from ray_soup.io.leftovers import groups_of
from ray_soup.io.mapped import Version, release_pages, version_of
from ray_soup.io.pieces import joined
from ray_soup.io.progress import drain
from ray_soup.io.quantized import fault_of, remedy
from ray_soup.io.rank_files import read_ranks
from ray_soup.io.remote import Stat
from ray_soup.io.steps import Step
from ray_soup.io.storage import LocalFile, RemoteFile
from ray_soup.io.sweeps import Trial
from ray_soup.io.tensor_files import Described, SafetensorsFile, TensorFile, open_tensors


@dataclass(frozen=True)
class Ingredient:
    """One fine-tuned checkpoint: its name, its files, and the place of each tensor of its state dict.

    An ingredient is opened without reading its tensors. At first `tensors` is its first container; `bind` returns the
    ingredient with the names of a model. It can be pickled: the process that unpickles it opens the files again.
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
    """The container or prefix that the recipe names, as in `?key=state_dict_ema` or `?key=ema_model`."""
    left_out: tuple[str, ...] = ()
    """Tensors that the model does not have and does not need, such as the text tower of a CLIP."""
    remarks: tuple[str, ...] = ()
    """What a user should know about the tensors in use, such as which of several models was taken."""
    unclear: str = ""
    """Why the tensors in use are ambiguous; empty if they are not."""
    aliases: tuple[str, ...] = ()
    """The other names of tied or renamed tensors that the checkpoint uses."""
    chosen: str = ""
    """The prefix of the tensors in use if `ignore` decided; otherwise empty."""
    trial: Trial | None = None
    """The trial of a sweep that the checkpoint comes from."""
    step: Step | None = None
    """The training run that the checkpoint is a step of, and the step, as far as its path says so."""
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Plain values stored beside the tensors: the metadata of a safetensors file, and what stands at the top level of a
    torch file, such as `epoch` or `args` (as a dictionary). What is too long or not plain is missing."""
    _sources: dict[int, TensorFile] = field(default_factory=dict, repr=False, compare=False)
    """The files opened so far, shared with the ingredients derived from this one."""
    _seen: dict[int, Version] = field(default_factory=dict, repr=False, compare=False)
    """The versions of the local files that this process has opened, shared in the same way."""
    _opening: dict[int, Lock] = field(default_factory=dict, repr=False, compare=False)
    """Held while a file is opened, so that threads that read one ingredient do not each open it; shared in the same way."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": {}, "_seen": {}, "_opening": {}}

    @property
    def nbytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(self.sizes)

    @property
    def identity(self) -> list[Any]:
        """JSON value that identifies the content without reading it: path, size and version of each file, and the key.

        If `ignore` decided which tensors are in use, their prefix follows the key.
        """
        files = [[f, s, v] for f, s, v in zip(self.files, self.sizes, self.versions, strict=True)]
        return [*files, self.within] if self.within else files

    def identity_here(self) -> list[Any]:
        """Return `identity` and the last change of each local file in ns, which nobody can set: for keys of a cache.

        Raises IngredientError if a file has changed since the ingredient was opened.
        """
        local = [number for number, file in enumerate(self.files) if not storage.is_remote(file)]
        for file in local:
            self._check_version(file)
        return [self.identity, [self._seen[file].changed for file in local]]

    @property
    def within(self) -> str:
        """Which of several models in the same files this is: the key, and the prefix if `ignore` decided; often empty."""
        return f"{self.key} {self.chosen}" if self.chosen else self.key

    def source(self, file: int) -> TensorFile:
        """Return file number `file`, opened on first use. Raises IngredientError if it has changed."""
        if file not in self._sources:
            with self._opening.setdefault(file, Lock()):
                if file not in self._sources:
                    self._check_version(file)
                    source = open_tensors(self.files[file], self.sizes[file], self.key)
                    if source.version is not None:
                        self._compare(file, source.version)
                    self._sources[file] = source
        return self._sources[file]

    def _check_version(self, file: int) -> None:
        """Check that a file is still the one that was described. Raises IngredientError."""
        path = self.files[file]
        try:
            self._compare(file, storage.stat(path) if storage.is_remote(path) else version_of(path))
        except FileNotFoundError as error:
            raise IngredientError(f"{path} was removed while it was in use. Restore it, then rerun the command.") from error

    def _compare(self, file: int, found: Stat | Version) -> None:
        path, size, version = self.files[file], self.sizes[file], self.versions[file]
        modified = found.version if isinstance(found, Stat) else found.modified
        if found.size != size:
            what = f"it has {found.size:,} bytes; expected {size:,}"
        elif modified != version:
            what = f"it was modified at {modified / 1e9:.6f} s; expected {version / 1e9:.6f} s"
        elif isinstance(found, Version) and not self._seen.setdefault(file, found).same(found, file in self._sources):
            what = "it was replaced by another file of the same size and time"
        else:
            if isinstance(found, Version):
                self._seen[file] = found
            return
        raise IngredientError(f"{path} changed while it was in use: {what}. Rerun the command.")

    def raw(self, file: int) -> LocalFile | RemoteFile:
        """Open the bytes of file number `file`; for a remote torch file, of its copy in the cache.

        Raises IngredientError if the file has changed.
        """
        self._check_version(file)
        path = self.files[file]
        local = path if path.endswith(SAFETENSORS_SUFFIX) else drain(storage.local_copy(path))
        return storage.open_file(local, self.sizes[file])

    def check_unchanged(self) -> None:
        """Check that no file has changed since the ingredient was opened; to be called after the last read.

        Raises IngredientError for the first file that has.
        """
        for file in range(len(self.files)):
            self._check_version(file)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._sources.clear()

    def drop_pages(self) -> None:
        """Release the memory pages read so far from this process."""
        drop_pages([self])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop` of the tensor `name`, counted row by row.

        Returns values [stop - start] in the tensor's own dtype, contiguous: where the layout allows it, a view of the file
        that must not be written to. Raises IngredientError if the file has changed since the ingredient was opened.
        """
        return self._read(self.tensors[name], start, stop)

    def read_array(self, name: str, start: int, stop: int, dtype: str) -> NDArray[Any]:
        """Read elements of a tensor as `read` does, converted to `dtype`, float32 or float64: [stop - start], aligned.

        Elements of that dtype are read without torch where the file allows it, and without a copy.
        """
        info = self.tensors[name]
        self._check_range(info, start, stop)
        source = self.source(info.file) if info.dtype_name in ("float32", "float64") and not info.pieces else None
        if isinstance(source, SafetensorsFile):
            return np.require(source.array(info, start, stop), dtype, ["C", "A"])
        return self.read(name, start, stop).to(dtype_of(dtype)).numpy()

    def _read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
        stop = info.numel if stop is None else stop
        self._check_range(info, start, stop)
        if stop <= start:
            return torch.empty(0, dtype=info.dtype)
        if info == ZERO:
            return torch.zeros(stop - start, dtype=info.dtype)
        if info.pieces:
            return joined(info, start, stop, lambda piece: self.source(piece.file).tensor(piece))
        return self.source(info.file).read(info, start, stop)

    def _check_range(self, info: TensorInfo, start: int, stop: int) -> None:
        if start < 0 or stop > info.numel:
            raise ValueError(f"{self.path}: elements {start} to {stop} of {info}")

    def bind(self, expected: Iterable[str], tied: Mapping[str, str], ignore: Ignored = ()) -> Ingredient:
        """Return this ingredient with the container and prefix whose names are those of a model.

        The result fits if and only if `set(tensors) == set(expected)` and it is not `unclear`. If nothing fits, its
        `tensors` are the nearest match, so that the caller can list the differences.

        Args:
            expected: names of the model's tensors, or their shapes by name. A text tower is left out if the model has none.
            tied: maps the second name of a tied tensor to its first; a file may contain either name or both.
            ignore: tensors to leave out if the model does not have them.
        """
        shapes = expected if isinstance(expected, Mapping) else {}
        known = {name: shape if isinstance(shape := shapes.get(name), tuple) else None for name in expected}
        return replace(self, **best_reading(self.containers, known, tied, ignore)._asdict())

    def with_trial(self, trial: Trial | None, step: Step | None = None) -> Ingredient:
        """Return this ingredient with `trial`, the trial of a sweep that it comes from, and its step of a training run."""
        return replace(self, trial=trial, step=step)

    def check_copies(self) -> None:
        """Check that both copies of a tied tensor are equal. Raises IngredientError if they differ."""
        for first, alias, info in self.copies:
            if not self.read(first).equal(self._read(info)):
                raise IngredientError(
                    f"{self.path}: {first} and {alias} are one tensor in the model, but differ in this file. Use a model "
                    "that does not tie them, or save the checkpoint from the tied model."
                )


def check_unchanged(ingredients: Sequence[Ingredient]) -> None:
    """Check that no file of these ingredients has changed, as `Ingredient.check_unchanged` does."""
    remote = any(storage.is_remote(file) for ingredient in ingredients for file in ingredient.files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:  # a file in remote storage takes a request
        list(pool.map(Ingredient.check_unchanged, ingredients))


def drop_pages(ingredients: Sequence[Ingredient]) -> None:
    """Release the memory pages of these ingredients' files from this process (they stay in the system's page cache)."""
    release_pages([a for i in ingredients for source in i._sources.values() for a in source.addresses()])


def open_ingredient(path: str, name: str | None = None) -> Ingredient:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a file, an index (`*.index.json`), or a folder with one model; append `?key=NAME` to select a container, or the
            tensors whose names begin with `NAME.`.
        name: name of the ingredient; default: the file name without its suffix.

    Raises IngredientError if a file is broken or quantized, RecipeError if there is no checkpoint.
    """
    bare = split_key(path)[0]
    file = checkpoint_of(bare)
    folder = os.path.dirname(file or bare)
    try:
        opened = _opened(path, file, name)
    except LowPrecisionError as error:
        raise IngredientError(f"{error} The checkpoint is quantized. {remedy(folder)}") from error
    for tensors in opened.containers.values():
        fault = fault_of(path, folder, tensors)
        if fault:
            raise IngredientError(fault)
    return opened


def _opened(path: str, file: str | None, name: str | None) -> Ingredient:
    """Open the checkpoint in `file`, which `path` names."""
    spec, (path, key) = path, split_key(path)
    if file is None:
        refuse_piece(path)
        raise RecipeError(
            f"{path} is not a checkpoint: expected a file ending in {suffixes()}, or a folder with one. Check the path."
        )
    if is_of_folder(file):
        return _open_distributed(spec, file, name)
    shard_of = index_map(file) if file.endswith(INDEX_SUFFIXES) else {}
    files = sorted(set(shard_of.values())) or [file]
    stats = [storage.stat(f) for f in files]
    opened = [open_tensors(f, s.size, key, headers_only=True) for f, s in zip(files, stats, strict=True)]
    described = [source.describe(number) for number, source in enumerate(opened)]
    container = key if any(key in tensors for tensors in described) else ""
    containers = _joined(file, files, described, shard_of, container) if shard_of else described[0]
    if key:
        containers = {key: _under(path, containers, key)}
    tensors = next(iter(containers.values()))
    _refuse_adapter(path, tensors)
    return Ingredient(
        name=name or stem(path),
        path=spec,
        files=tuple(files),
        sizes=tuple(s.size for s in stats),
        versions=tuple(s.version for s in stats),
        containers=containers,
        tensors=tensors,
        key=key,
        metadata={k: v for source in reversed(opened) for k, v in source.metadata.items()},
        _seen={number: source.version for number, source in enumerate(opened) if source.version is not None},
    )


def _open_distributed(spec: str, metadata: str, name: str | None) -> Ingredient:
    """Open the checkpoint in pieces that a file `.metadata` describes, or whose first part is that of a process."""
    path, key = split_key(spec)
    parts = read_parts(metadata, with_training_state=bool(key)) if is_metadata(metadata) else read_ranks(metadata)
    containers: Described = {"": parts.tensors}
    if key:
        containers = {key: _under(path, containers, key)}
    tensors = next(iter(containers.values()))
    _refuse_adapter(path, tensors)
    sizes, versions = tuple(s.size for s in parts.stats), tuple(s.version for s in parts.stats)
    name = name or stem(path.rstrip("/"))
    return Ingredient(name, spec, tuple(parts.files), sizes, versions, containers, tensors, key=key)


def _refuse_adapter(path: str, tensors: Tensors) -> None:
    """Check that a checkpoint without an adapter_config.json is not an adapter. Raises IngredientError."""
    if tensors and all("lora_" in tensor for tensor in tensors):
        raise IngredientError(
            f"{path} is a LoRA adapter ({len(tensors)} tensors, such as {next(iter(tensors))}); expected a whole model, "
            "or an adapter with its adapter_config.json among the recipe's ingredients. Restore that file, or merge the "
            "adapter into its base model (peft: model.merge_and_unload()) and save that."
        )


def _under(path: str, containers: Described, key: str) -> dict[str, TensorInfo]:
    """Return the tensors of a container, or those below a prefix in one. Raises IngredientError if there are none."""
    if key in containers:
        return containers[key]
    found = {}
    for container, tensors in containers.items():
        prefix = (key.removeprefix(f"{container}.") if container else key) + "."
        below = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
        if below and "" not in below:
            found[container] = below
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise IngredientError(
            f"{path} has tensors under `{key}.` in each of {', '.join(c or 'its top level' for c in found)}. Name one of "
            f"them in the recipe, as in ?key={list(found)[-1]}.{key}"
        )
    known = ", ".join(filter(None, containers)) or "none: its tensors are at the top level"
    groups = groups_of(name for tensors in containers.values() for name in tensors if "." in name)
    prefixes = ", ".join(group.removesuffix(".*") for group in groups[:8]) + ", ..." * (len(groups) > 8)
    raise IngredientError(
        f"{path} has no tensors under the key '{key}'; its keys: {known}; what its names begin with: {prefixes or '-'}. Fix "
        "?key= in the recipe."
    )


def _joined(index: str, files: list[str], described: list[Described], shard_of: Mapping[str, str], key: str) -> Described:
    """Return the tensors of a checkpoint in shards: each one from the shard that the index names.

    A tensor of that name in another shard is ignored. Raises IngredientError if a shard lacks a tensor that the index
    names in it, or has one that the index does not name.
    """
    joined: dict[str, TensorInfo] = {}
    for shard, containers in zip(files, described, strict=True):
        expected = [name for name, where in shard_of.items() if where == shard]
        if key and key not in containers:
            return containers
        container = key or max(containers, key=lambda c: sum(name in containers[c] for name in expected))
        tensors = containers.get(container, {})
        missing = [name for name in expected if name not in tensors]
        unknown = [name for name in tensors if name not in shard_of]
        for names, what, where in ((missing, "lacks", "names it there"), (unknown, "has", "does not name it")):
            if names:
                raise IngredientError(
                    f"{shard} {what} the tensor {names[0]} ({len(names)} such tensors), but {index} {where}: the files "
                    "belong to different checkpoints. Copy all of them again."
                )
        joined |= {name: tensors[name] for name in expected}
    return {key: joined}
