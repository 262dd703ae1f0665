"""List, check and read ingredients, tensor by tensor, any format.

A checkpoint is opened by its header alone: names, dtypes, shapes and the place of every tensor's bytes. safetensors
say this at their beginning; a torch file is unpickled (`weights_only=True`, always) without its data. After that both
are the same thing, bytes at an offset, and are read by range: local files through a memory map, safetensors in a storage by
requests for these bytes, torch files there from a copy in the cache of the node.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import struct
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import has_magic
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from ray_soup import storage
from ray_soup.cache import drained
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.storage import LocalFile, RemoteFile
from ray_soup.sweeps import Sweep, Trial, fine_tuned, is_experiment, read_sweep, split_metric

SAFETENSORS_SUFFIX = ".safetensors"
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
CONTAINERS = ("state_dict", "model", "module", "model_state_dict", "ema_state_dict", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.", "model.")
TEXT_TOWER = re.compile(  # of a CLIP, beside `visual.`, with what else it holds that no image classifier needs
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|text|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size)(\.|$)"
)
COUNTED = re.compile(r"(.*\.)?embeddings\.position_ids$")  # 0, 1, 2, ...: a buffer that transformers no longer saves
MODEL_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
RESERVED_NAMES = {"best_single", "uniform", "greedy", "learned", "learned+", "mehl", "mehl+", "ensemble"}

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
T = TypeVar("T")
HEADER = 1 << 16  # bytes that are read of a file to begin with
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `offset` of the file number `file` of its ingredient."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int
    offset: int
    stride: tuple[int, ...] | None = None  # in numbers; None: row after row

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass
class Ingredient:
    """One fine-tuned checkpoint: `name`, its files, and where each tensor of its state dict lies.

    Opened from headers alone. It can be pickled: the maps of its files are opened where it is read.
    """

    name: str
    path: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    versions: tuple[int, ...]
    """Times of change of its files, in ns."""
    containers: dict[str, dict[str, TensorInfo]]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    copies: list[tuple[str, str, TensorInfo]] = field(default_factory=list)
    key: str = ""
    """The container that was asked for, as in `?key=state_dict_ema`."""
    left_out: tuple[str, ...] = ()
    """Tensors of a known part that the model does not have: the text tower of a CLIP."""
    trial: Trial | None = None
    """The trial that it came from, where it was taken from a sweep."""
    _sources: dict[int, LocalFile | RemoteFile] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sources": {}}

    @property
    def nbytes(self) -> int:
        """Size of its files in bytes."""
        return sum(self.sizes)

    @property
    def identity(self) -> list[Any]:
        """What a cache may know it by without reading it: path, size and time of change of each file, and the key."""
        files = [[f, s, v] for f, s, v in zip(self.files, self.sizes, self.versions, strict=True)]
        return [*files, self.key] if self.key else files

    def source(self, file: int) -> LocalFile | RemoteFile:
        if file not in self._sources:
            path = self.files[file]
            if storage.stat(path).size != self.sizes[file]:
                raise IngredientError(f"{path} changed its size while it was in use. Start again.")
            if not path.endswith(SAFETENSORS_SUFFIX):
                path = drained(storage.local_copy(path))
            self._sources[file] = storage.open_file(path, self.sizes[file])
        return self._sources[file]

    def close(self) -> None:
        self._sources.clear()

    def drop_pages(self) -> None:
        for source in self._sources.values():
            source.drop_pages()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Numbers `start` to `stop` of the tensor `name`, flattened: a 1-D tensor of its own dtype.

        A read-only view of the file where the layout allows it.
        """
        info = self.tensors[name]
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

    def match(self, expected: Iterable[str], tied: dict[str, str]) -> bool:
        """Choose the container, and strip the prefix, that give exactly the tensors `expected`.

        `tied` maps a second name of a tensor to its first: a file may hold either or both. A text tower is left out where
        the model has none. True if it fits; else `tensors` is the container nearest to it, its prefix stripped where that
        brings more names into place.
        """
        expected = set(expected)
        image_only = any(n.startswith("visual.") for n in expected) and not any(map(TEXT_TOWER.match, expected))
        best: dict[str, TensorInfo] = {}
        best_score: tuple[bool, int] = (False, -1)
        self.copies, self.left_out = [], ()
        for tensors in self.containers.values():
            for candidate in _candidates(tensors, expected):
                named = dict(candidate)
                copies = []
                for alias, first in tied.items():
                    if alias in named:
                        info = named.pop(alias)
                        if named.setdefault(first, info) != info:
                            copies.append((first, alias, info))
                left_out = tuple(
                    n for n in named.keys() - expected if COUNTED.match(n) or (image_only and TEXT_TOWER.match(n))
                )
                for name in left_out:
                    del named[name]
                score = (named.keys() == expected, len(named.keys() & expected))
                if score > best_score:
                    best, best_score, self.copies, self.left_out = named, score, copies, left_out
        self.tensors = best
        return best_score[0]

    def check_copies(self) -> None:
        """Tensors that the model ties together may be written twice; then both must hold the same numbers."""
        for first, alias, info in self.copies:
            aside = replace(self, tensors={alias: info}, _sources=self._sources)
            if not torch.equal(self.read(first), aside.read(alias)):
                raise IngredientError(
                    f"{self.path}: {first} and {alias} are one tensor in the model and differ in this file. Give a "
                    "model that does not tie them, or save the checkpoint from the tied model."
                )


def _tensor_of(buffer: memoryview, dtype: torch.dtype) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():  # torch warns that the map is read-only; nothing here writes
        warnings.simplefilter("ignore")
        return torch.frombuffer(buffer, dtype=dtype)


def _candidates(tensors: dict[str, TensorInfo], expected: set[str]) -> Iterator[dict[str, TensorInfo]]:
    """The names under which the tensors of a file may be those of the model."""
    for named in _stripped(tensors):
        yield named
        if any(name.startswith("classification_head.") for name in named):  # as the Model Soups code names CLIP and head
            renamed = {re.sub("^classification_head", "head", n).removeprefix("model."): info for n, info in named.items()}
            if "head.weight" in expected and len(renamed) == len(named):
                yield renamed


def _stripped(tensors: dict[str, TensorInfo]) -> Iterator[dict[str, TensorInfo]]:
    """The names as they are, then without each prefix that all of them share, one prefix after another."""
    yield tensors
    names = tensors
    while names:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return
        names = {name.removeprefix(prefix): info for name, info in names.items()}
        yield names


# Headers


def _safetensors_header(path: str, file: int, size: int) -> dict[str, TensorInfo]:
    source = storage.open_file(path, size)
    begin = bytes(source.read(0, min(size, HEADER)))
    _refuse_text(path, begin)
    length = struct.unpack("<Q", begin.ljust(8, b"\0")[:8])[0]
    if len(begin) < 8 or length > size - 8 or length > 100_000_000:
        raise IngredientError(
            f"{path} is not a safetensors file, or is truncated: its header should take {length} bytes and the "
            f"file has {size}. Copy it again."
        )
    try:
        header = json.loads(begin[8 : 8 + length] if length <= HEADER - 8 else bytes(source.read(8, length)))
        header.pop("__metadata__", None)
        tensors = {}
        spans = []
        for name, entry in header.items():
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise IngredientError(
                    f"{path}: the tensor {name} has dtype {entry['dtype']}; known are "
                    f"{', '.join(SAFETENSORS_DTYPES)}. Save it in one of these."
                )
            start, stop = entry["data_offsets"]
            info = TensorInfo(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), file, 8 + length + start)
            if any(type(n) is not int or n < 0 for n in (start, stop, *info.shape)):
                raise ValueError(f"{name} has the shape {entry['shape']} and the offsets {[start, stop]}")
            if stop - start != info.nbytes:
                raise IngredientError(
                    f"{path}: the tensor {name} takes {stop - start} bytes; {info} would take {info.nbytes}. The "
                    "file is damaged: copy it again."
                )
            tensors[name] = info
            if stop > start:
                spans.append((start, stop, name))
        spans.sort()
        for (_, stop, name), (start, _, other) in pairwise(spans):
            if start < stop:
                raise ValueError(f"{name} and {other} overlap")
        end = 8 + length + (spans[-1][1] if spans else 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IngredientError(f"{path} has a damaged safetensors header ({error}). Copy it again.") from error
    if end > size:
        raise IngredientError(f"{path} is truncated: it has {size:,} bytes and its header speaks of {end:,}. Copy it again.")
    return tensors


def _refuse_text(path: str, begin: bytes) -> None:
    """Raises IngredientError for what a download leaves in place of a checkpoint."""
    if begin.startswith(b"version https://git-lfs"):
        raise IngredientError(f"{path} is a Git LFS pointer, not the checkpoint itself. Run `git lfs pull` there.")
    if begin.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise IngredientError(
            f"{path} is a web page, not a checkpoint: its download was answered by an error or a login. Open it to see "
            "which, then download it again."
        )


def _torch_containers(path: str, file: int, key: str = "") -> dict[str, dict[str, TensorInfo]]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    here = drained(storage.local_copy(path))
    with open(here, "rb") as stream:
        _refuse_text(path, stream.read(512))
    try:  # tensors without data, that know where in the file their data lies; options that a script wrote beside them
        with FakeTensorMode(), torch.serialization.safe_globals([Namespace]):
            loaded = torch.load(here, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
        what = f"it holds '{found.group(1).strip('.')}'" if found else "it holds more than tensors and plain values"
        raise IngredientError(
            f"{path} was not opened: {what}, and unpickling that would run code from the file. Save the state dict "
            "alone: torch.save(model.state_dict(), path). If you trust the file, this takes it out: "
            f"{_conversion(path)}"
        ) from error
    except Exception as error:  # what the unpickler stumbles over in a file that is no pickle can be anything
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise IngredientError(
            f"{path} cannot be read as a torch checkpoint: it is damaged or truncated ({storage.stat(path).size:,} "
            f"bytes; {reason}). Copy it again."
        ) from error
    if isinstance(loaded, dict) and {"state", "param_groups"} <= set(loaded):
        raise IngredientError(f"{path} is the state of an optimizer, not a model. Leave it out (a glob such as model*.pt).")
    if not isinstance(loaded, dict):
        raise IngredientError(f"{path} holds a {type(loaded).__name__}; expected a state dict. Save that.")
    containers: dict[str, dict[str, TensorInfo]] = {}
    for container, values in [("", loaded), *((name, loaded.get(name)) for name in (*CONTAINERS, key))]:
        if isinstance(values, dict):
            tensors = {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
            if tensors:
                containers[container] = {k: _torch_info(path, file, k, v) for k, v in tensors.items()}
    if not containers:
        raise IngredientError(
            f"{path} holds no tensors: found {sorted(map(str, loaded))[:8]}; expected a state dict, or one under "
            f"{', '.join(CONTAINERS)}."
        )
    return containers


def _conversion(path: str) -> str:
    """The line that turns a file of more than tensors into one that is opened."""
    return (
        f"python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
        f"torch.save(c.get('state_dict', c.get('model', c)), '{os.path.splitext(path)[0]}.state_dict.pt')\""
    )


def _torch_info(path: str, file: int, name: str, tensor: torch.Tensor) -> TensorInfo:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
        raise IngredientError(
            f"{path}: the tensor {name} is {tensor.dtype}, {tensor.layout}; expected a dense tensor of "
            f"{', '.join(str(d).removeprefix('torch.') for d in DTYPE_NAMES)}."
        )
    if offset is None:
        raise IngredientError(
            f"{path} is in torch's old format of before 1.6, whose tensors cannot be read one by one. Save it again: "
            f"torch.save(torch.load('{path}', weights_only=True), '{path}')."
        )
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    start = int(offset) + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return TensorInfo(tensor.dtype, tuple(tensor.shape), file, start, stride)


def open_ingredient(path: str, name: str | None = None) -> Ingredient:
    """Open a checkpoint by its header: a file, a `*.safetensors.index.json`, or a folder that holds one model.

    Raises IngredientError if the file is broken, RecipeError if there is none.
    """
    spec, (path, key) = path, split_key(path)
    file = _checkpoint_of(path)
    if file is None:
        raise RecipeError(f"{path} is not a checkpoint: expected a file ending in {_suffixes()}, or a folder with one.")
    tensors: dict[str, TensorInfo] = {}
    if file.endswith(INDEX_SUFFIXES):
        files = _shards_of(file)
        for shard in files:
            if not storage.isfile(shard):
                raise IngredientError(f"{shard} is missing: {file} names it. Copy it there.")
    else:
        files = [file]
    stats = [storage.stat(f) for f in files]
    for number, (part, found) in enumerate(zip(files, stats, strict=True)):
        if found.size == 0:
            raise IngredientError(f"{part} is empty (0 bytes). Copy it again.")
        if part.endswith(SAFETENSORS_SUFFIX):
            tensors.update(_safetensors_header(part, number, found.size))
        elif file.endswith(INDEX_SUFFIXES):
            tensors.update(_torch_containers(part, number)[""])
    whole = file.endswith((SAFETENSORS_SUFFIX, *INDEX_SUFFIXES))
    containers = {"": tensors} if whole else _torch_containers(file, 0, key)
    if key and key not in containers:
        known = ", ".join(filter(None, containers)) or "none: its tensors lie side by side"
        raise IngredientError(f"{path} holds no tensors under the key '{key}'; it has {known}.")
    ingredient = Ingredient(
        name or _stem(path),
        spec,
        tuple(files),
        tuple(s.size for s in stats),
        tuple(s.version for s in stats),
        {key: containers[key]} if key else containers,
        key=key,
    )
    ingredient.tensors = next(iter(containers.values()))
    if ingredient.tensors and all("lora_" in tensor for tensor in ingredient.tensors):
        raise IngredientError(
            f"{path} is a LoRA adapter ({len(ingredient.tensors)} tensors, as {next(iter(ingredient.tensors))}), not "
            "a whole model. Merge it into its base model first (peft: model.merge_and_unload()) and save that."
        )
    return ingredient


def split_key(spec: str) -> tuple[str, str]:
    """`run.pth.tar?key=state_dict_ema` -> path and key, which is empty where there is none."""
    found = re.fullmatch(r"(.*)[?&]key=([\w.-]+)", spec)
    return (found[1], found[2]) if found else (spec, "")


def _stem(path: str) -> str:
    name = Path(path).name
    bare = next((name.removesuffix(suffix) for suffix in (*INDEX_SUFFIXES, ".pth.tar") if name.endswith(suffix)), None)
    return bare or name.rpartition(".")[0] or name


def _shards_of(index: str) -> list[str]:
    try:
        weight_map = json.loads(storage.read_bytes(index))["weight_map"]
        return [storage.join(os.path.dirname(index), shard) for shard in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IngredientError(f"{index} is not an index of checkpoint files: no readable 'weight_map' ({error}).") from error


def _suffixes() -> str:
    return ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))


def _is_checkpoint(path: str) -> bool:
    return path.endswith((SAFETENSORS_SUFFIX, *INDEX_SUFFIXES, *TORCH_SUFFIXES))


def _checkpoint_of(path: str) -> str | None:
    """The file that stands for the checkpoint at `path`: itself, or what a folder that holds one model calls it."""
    if _is_checkpoint(path) and storage.isfile(path):
        return path
    names = storage.listdir(path) if storage.isdir(path) else []
    for name in (*MODEL_FILES, "adapter_model.safetensors"):  # an adapter is refused when it is opened, not passed over
        if name in names:
            return storage.join(path, name)
    return None


def check_apart(spec: str | Sequence[str] | None, out: str) -> None:
    """Raises RecipeError where a soup in the folder `out` would be among the ingredients that `spec` names."""
    if spec is None or not isinstance(spec, str):
        for one in spec or ():
            check_apart(one, out)
        return
    pattern, folder = (
        s.rstrip("/") if storage.is_remote(s) else os.path.abspath(s) for s in (split_metric(split_key(spec)[0])[0], out)
    )
    inside = storage.isdir(pattern) and folder.rpartition("/")[0] == pattern
    found = has_magic(pattern) and any(storage.matches(p, pattern) for p in (folder, f"{folder}/model.safetensors"))
    if inside or found:
        raise RecipeError(
            f"OUT {out} lies where ingredients are looked for ({spec}): the soup would be one of them the next time. Choose "
            "a folder outside."
        )


def _without_shards(files: list[str]) -> list[str]:
    """Leave out the shards that an index among `files` stands for."""
    shards = {shard for index in files if index.endswith(INDEX_SUFFIXES) for shard in _shards_of(index)}
    return [f for f in files if f not in shards]


def _whole_links(paths: list[str]) -> list[str]:
    """The same. Raises IngredientError for a link to nothing that is called as a checkpoint is."""
    for path in paths:
        if not storage.is_remote(path) and _is_checkpoint(path) and os.path.islink(path) and not os.path.exists(path):
            raise IngredientError(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Bring that file back, or remove the link."
            )
    return paths


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


# A set of ingredients


def find_checkpoints(spec: str | Sequence[str]) -> list[str]:
    """The paths that a glob, a list or a folder names, in natural order (model_2 before model_10); of an experiment of
    Ray Tune or Train the checkpoints of its trials.

    Raises RecipeError where there are none.
    """
    return [path for path, _ in _find(spec)]


def _find(spec: str | Sequence[str]) -> list[tuple[str, Trial | None]]:
    if not isinstance(spec, str):
        return [found for one in spec for found in ([(one, None)] if _checkpoint_of(one) else _find(one))]
    spec, key = split_key(spec)
    if key:
        return [(f"{path}?key={key}", trial) for path, trial in _find(spec)]
    sweeps = find_sweeps(spec)
    if sweeps:
        if not any(sweep.trials for sweep in sweeps):
            raise RecipeError(
                f"ingredients: no finished trial with a checkpoint. {' '.join(s.note() or '' for s in sweeps)}"
            )
        return [(_model_of(trial), trial) for sweep in sweeps for trial in sweep.trials]
    if has_magic(spec) and not storage.exists(spec):
        found = sorted(storage.glob(spec), key=_natural)
        paths = [p for p in _without_shards(_whole_links(found)) if _checkpoint_of(p)]
    elif storage.isdir(spec):
        children = sorted((storage.join(spec, child) for child in storage.listdir(spec)), key=_natural)
        paths = _without_shards([c for c in _whole_links(children) if _checkpoint_of(c)])
    elif storage.exists(spec):
        paths = [spec] if _checkpoint_of(spec) else []
    else:
        raise RecipeError(f"ingredients: {spec} does not exist. Give a glob, a list or a folder of checkpoints.")
    if not paths:
        folder = spec if storage.isdir(spec) else os.path.dirname(spec)
        there = "nothing that matches" if has_magic(folder) else "no such folder"
        if storage.isdir(folder):
            there = ", ".join(storage.listdir(folder)[:5]) or "an empty folder"
        raise RecipeError(f"ingredients: no checkpoints at {spec}; found {there}; expected files ending in {_suffixes()}.")
    return [(path, None) for path in paths]


def find_sweeps(spec: str | Sequence[str] | None) -> list[Sweep]:
    """The experiments of Ray Tune or Train that `spec` names: a folder, a glob or a list of them, or a folder of them;
    behind it `?metric=NAME&mode=max` for the best checkpoint of each trial by a metric. Without it: the last.

    Raises RecipeError for a metric where there is no experiment.
    """
    if spec is None or not isinstance(spec, str):
        return [sweep for one in spec or () for sweep in find_sweeps(one)]
    pattern, metric, mode = split_metric(split_key(spec)[0])
    folders = [pattern] if storage.isdir(pattern) else sorted(storage.glob(pattern), key=_natural)
    experiments = [f for f in folders if is_experiment(f)]
    if not experiments and len(folders) == 1 and storage.isdir(folders[0]):
        children = sorted((storage.join(folders[0], child) for child in storage.listdir(folders[0])), key=_natural)
        if not any(_checkpoint_of(child) for child in children):
            experiments = [child for child in children if is_experiment(child)]
    if metric is not None and not experiments:
        raise RecipeError(f"ingredients: {spec}: no experiment of Ray Tune or Train at {pattern} to take the metric from.")
    return [read_sweep(folder, metric, mode) for folder in experiments]


def _model_of(trial: Trial) -> str:
    """The file of a trial's checkpoint that holds the model."""
    own = _checkpoint_of(trial.path)
    if own is not None:
        return own
    files = sorted(name for name in storage.listdir(trial.path) if _is_checkpoint(name))
    models = [name for name in files if "model" in name.lower()]
    chosen = files if len(files) == 1 else models
    if len(chosen) != 1:
        raise IngredientError(
            f"{trial.path}: which file is the model? Found {', '.join(files) or 'no checkpoint'}; expected one file "
            f"ending in {_suffixes()}, or one that is called model. Name the files with a glob instead."
        )
    return storage.join(trial.path, chosen[0])


def open_ingredients(spec: str | Sequence[str] | None) -> list[Ingredient]:
    """Open all that `spec` names, by their headers. Raises RecipeError or IngredientError."""
    if not spec:
        raise RecipeError("The recipe names no ingredients. Add ingredients: with a glob, a list or a folder.")
    found = _find(spec)
    paths, trials = [path for path, _ in found], [trial for _, trial in found]
    odd = next((path for path in paths if path != path.encode(errors="replace").decode()), None)
    if odd is not None:
        raise IngredientError(f"{odd!a}: this name is not UTF-8 and could not be written into reports. Rename the file.")
    names = [t.name for t in trials if t is not None]
    if len(set(names)) < len(paths):
        names = _unique_names(paths)
    ingredients = [open_ingredient(path, name) for path, name in zip(paths, names, strict=True)]
    for ingredient, trial, noted in zip(ingredients, trials, fine_tuned(paths), strict=True):
        ingredient.trial = trial or noted
    seen: dict[Any, str] = {}
    for ingredient in ingredients:
        file = ingredient.files[0]
        found = None if storage.is_remote(file) else os.stat(file)
        other = seen.setdefault(((found.st_dev, found.st_ino) if found else file, ingredient.key), ingredient.path)
        if other != ingredient.path or paths.count(ingredient.path) > 1:
            raise IngredientError(
                f"{ingredient.path} and {other} are the same file: it would count twice. Leave one of them out."
            )
    return ingredients


def _unique_names(paths: list[str]) -> list[str]:
    """Short names: without suffix where that is enough, else the path from where the paths part."""

    def stem(path: str) -> str:
        path = split_key(path)[0].rstrip("/")
        return _stem(path) if _is_checkpoint(path) else os.path.basename(path)

    stems = [stem(p) for p in paths]
    if len(set(stems)) == len(stems) and not set(stems) & RESERVED_NAMES:
        return stems
    root = os.path.commonpath([os.path.dirname(p) for p in paths]) if len(paths) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(p, root) for p in paths]


def check_together(
    ingredients: list[Ingredient],
    shapes: dict[str, tuple[int, ...]] | None = None,
    tied: dict[str, str] | None = None,
) -> list[str]:
    """Hold names, shapes and dtypes of all ingredients against the model (`shapes`), or where there is none against
    what most of them hold. Returns the names in the order of the model. From headers alone.

    Raises IngredientError that lists what does not fit, file by file, and RecipeError for less than two ingredients.
    """
    if len(ingredients) < 2:
        raise RecipeError(f"A soup takes two ingredients or more; found one: {ingredients[0].path}. Check `ingredients:`.")
    if shapes is None:
        votes = Counter(_signature(i) for i in ingredients)
        reference = next(i for i in ingredients if _signature(i) == votes.most_common(1)[0][0])
        shapes = {name: info.shape for name, info in reference.tensors.items()}
        whose = reference.path
    else:
        whose = "the model"
    faults: list[str] = []
    kinds: dict[str, bool] = {}
    for name in shapes:
        votes_float = Counter(i.tensors[name].dtype in FLOATS for i in ingredients if name in i.tensors)
        kinds[name] = votes_float.most_common(1)[0][0] if votes_float else True
    for ingredient in ingredients:
        ingredient.match(shapes, tied or {})
        lines = []
        for name in [n for n in shapes if n not in ingredient.tensors]:
            lines.append(f"missing: {name} {list(shapes[name])}")
        for name in [n for n in ingredient.tensors if n not in shapes]:
            lines.append(f"not in {whose}: {name} {ingredient.tensors[name]}")
        for name, info in ingredient.tensors.items():
            if name in shapes and info.shape != shapes[name]:
                lines.append(f"shape: {name} is {list(info.shape)}, in {whose} {list(shapes[name])}")
            elif name in shapes and (info.dtype in FLOATS) != kinds[name]:
                expected = "floats" if kinds[name] else "integers"
                lines.append(f"dtype: {name} is {info}, the other ingredients hold {expected}")
        if lines:
            more = [f"and {len(lines) - 6} more"] if len(lines) > 6 else []
            faults.append(f"{ingredient.path} does not fit:\n" + "\n".join(f"    {line}" for line in lines[:6] + more))
    if faults:
        more_files = f"\n  and {len(faults) - 5} more files" if len(faults) > 5 else ""
        raise IngredientError(
            f"{len(faults)} of {len(ingredients)} ingredients do not fit together with {whose}:\n  "
            + "\n  ".join(faults[:5])
            + more_files
            + "\nLeave them out, or give the model that they belong to."
        )
    return list(shapes)


def check_floats(ingredients: list[Ingredient], parameters: Iterable[str]) -> None:
    """Raises IngredientError for a parameter that is held in integers."""
    for name in parameters:
        for ingredient in ingredients:
            if ingredient.tensors[name].dtype not in FLOATS:
                raise IngredientError(
                    f"{ingredient.path}: the parameter {name} is {ingredient.tensors[name]}; expected floats. A quantised "
                    "checkpoint cannot be mixed: give the one from before it was quantised."
                )


def _signature(ingredient: Ingredient) -> tuple[Any, ...]:
    return tuple(sorted((n, i.shape, i.dtype in FLOATS) for n, i in ingredient.tensors.items()))


def common_dtype(ingredients: list[Ingredient], name: str) -> torch.dtype:
    """The dtype that the tensor `name` is written in: the widest one that an ingredient holds it in."""
    dtype = ingredients[0].tensors[name].dtype
    for ingredient in ingredients[1:]:
        dtype = torch.promote_types(dtype, ingredient.tensors[name].dtype)
    return dtype


def check_finite(ingredients: list[Ingredient], name: str, start: int, parts: list[torch.Tensor]) -> None:
    """Raises IngredientError for the first ingredient whose part of the tensor `name`, from number `start` on, holds a
    number that is not finite."""
    for ingredient, part in zip(ingredients, parts, strict=True):
        wrong = torch.nonzero(~torch.isfinite(part)).flatten()
        if len(wrong):
            raise IngredientError(
                f"{ingredient.path}: the tensor {name} holds {part[wrong[0]].item()} at number {start + int(wrong[0])}; "
                "expected finite numbers. This training run diverged: leave it out."
            )


def write_at(file: IO[bytes], numbers: np.ndarray, offset: int) -> None:
    """Write all of `numbers` at a byte of an open file, from any thread."""
    view = memoryview(np.ascontiguousarray(numbers).view(np.uint8)).cast("B")  # type: ignore[arg-type]
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def reading_threads(nbytes: int = 1) -> int:
    """Threads to read with where each holds `nbytes`: one for each core that this process may use, by its container's limit
    too, and no more than hold 1 GB together."""
    cores = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return max(1, min(math.ceil(cores), (1 << 30) // nbytes))


# Hashes


class StreamingHash:
    """SHA-256 of a file of which ranges are handed over in the order of the file; what lies between them is read.

    `in_order` is False once a range came too late: the caller then hashes the file on its own.
    """

    def __init__(self, source: LocalFile | RemoteFile, size: int):
        self._sha = hashlib.sha256()
        self._source = source
        self._size = size
        self._position = 0
        self.in_order = True

    def update(self, offset: int, data: memoryview) -> None:
        if offset < self._position or not self.in_order:
            self.in_order = False
            return
        self._feed(offset)
        self._sha.update(data)
        self._position += data.nbytes

    def _feed(self, stop: int) -> None:
        while self._position < stop:
            n = min(stop - self._position, 1 << 24)
            self._sha.update(self._source.read(self._position, n))
            self._position += n

    def hexdigest(self) -> str:
        self._feed(self._size)
        return self._sha.hexdigest()


def sha256_file(path: str, watch: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file; `watch` is told the bytes of each part read."""
    sha = hashlib.sha256()
    for chunk in storage.chunks(path):
        sha.update(chunk)
        if watch:
            watch(len(chunk))
    return sha.hexdigest()


def combined_sha256(digests: Sequence[str]) -> str:
    """The hash of an ingredient: that of its file, or of the list of its files' hashes where it has several."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
