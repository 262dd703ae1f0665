"""Which files are checkpoints: their names, the shards of an index, and the model in a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.distributed import METADATA, check_complete, is_metadata
from ray_soup.io.formats import DISTRIBUTED_SUFFIX, INDEX_SUFFIXES, SAFETENSORS_SUFFIX, TORCH_SUFFIXES
from ray_soup.io.json_files import read_json, special_kind
from ray_soup.io.parts import refuse_part
from ray_soup.io.rank_files import is_rank_file, rank_files

MODEL_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
"""The files of a LoRA adapter of PEFT; of those of weights, PEFT loads the first one that exists."""
SHARDED_MODEL = "pytorch_model_fsdp_0"
"""The folder with the model's distributed checkpoint in what Accelerate and Transformers save under FSDP."""
INDEX = ".index.json"


def split_key(spec: str) -> tuple[str, str]:
    """Split `run.pth.tar?key=state_dict_ema` into path and key; without ?key= the key is empty."""
    found = re.fullmatch(r"(.*)[?&]key=([\w.-]+)", spec, re.DOTALL)
    return (found[1], found[2]) if found else (spec, "")


def stem(path: str) -> str:
    """Return the name of a checkpoint's file without its suffix."""
    name = Path(path).name
    bare = next((name.removesuffix(suffix) for suffix in (*INDEX_SUFFIXES, ".pth.tar") if name.endswith(suffix)), None)
    return bare or name.rpartition(".")[0] or name


def index_map(index: str) -> dict[str, str]:
    """Return the path of the shard that contains each tensor, by the tensor's name, as an index lists them.

    Raises IngredientError, with the index and the entry, if the index is damaged, names a file outside its own folder, or
    names a file that is missing. A shard may be a link, as in the cache of the Hugging Face Hub.
    """
    folder = os.path.dirname(index)
    named = _weight_map(index)
    for shard in sorted(set(named.values())):
        path = storage.join(folder, shard)
        if not storage.isfile(path):
            entry = next(name for name, file in named.items() if file == shard)
            kind = special_kind(path) or "missing"
            raise IngredientError(
                f"{path} is {kind}, but {index} lists it for {entry!r} and {sum(f == shard for f in named.values()) - 1} "
                "other tensors. Copy it to that place."
            )
    return {name: storage.join(folder, shard) for name, shard in named.items()}


def _weight_map(index: str) -> dict[str, str]:
    """Return the name of the shard that contains each tensor. Raises IngredientError."""
    suffixes_ = (SAFETENSORS_SUFFIX,) if index.endswith(INDEX_SUFFIXES[0]) else TORCH_SUFFIXES
    try:
        found = read_json(index)
        named = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(named, dict) or not named:
            what = f"the keys {sorted(found)[:5]}" if isinstance(found, dict) else f"a {type(found).__name__}"
            raise ValueError(f"found {what}; expected the names of tensors and of their files under 'weight_map'")
        for name, shard in named.items():
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\x00-\x1f]+", shard) or not shard.endswith(suffixes_):
                raise ValueError(
                    f"it maps {name!r} to {str(shard)[:200]!r}; expected the name of a file ending in "
                    f"{' or '.join(suffixes_)} in the same folder"
                )
        return named
    except (ValueError, OSError) as error:
        raise IngredientError(f"{index} is not an index of checkpoint files: {error}. Copy it again.") from error


def shards_of(index: str) -> list[str]:
    """Return the files that an index of a checkpoint lists, sorted. Raises IngredientError as `index_map` does."""
    return sorted(set(index_map(index).values()))


def suffixes() -> str:
    """Return the suffixes of checkpoint files, for messages."""
    return ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))


def is_checkpoint(path: str) -> bool:
    """Return whether a file with this name counts as a checkpoint."""
    return path.endswith((SAFETENSORS_SUFFIX, *INDEX_SUFFIXES, *TORCH_SUFFIXES))


def checkpoint_of(path: str) -> str | None:
    """Return the file of the checkpoint at `path`: the path itself, or the model in a folder; None if there is none.

    For a distributed checkpoint of torch this is the file `.metadata`. At most an index is opened. Raises IngredientError
    for a FIFO, socket or device with the name of a checkpoint, for a broken link, for a folder with two models of which one
    is out of date, and for a part of a checkpoint.
    """
    if is_checkpoint(path) and storage.isfile(path):
        refuse_part(path)
        return path
    names = storage.listdir(path) if storage.isdir(path) else []
    if METADATA in names:
        return _distributed(path, names)
    check_complete(path, names)
    for name in (*MODEL_FILES, *ADAPTER_FILES):
        if name in names:
            file = storage.join(path, name)
            if file.endswith(INDEX_SUFFIXES) and name.removesuffix(INDEX) in names and not index_in_use(file, names):
                continue
            refuse_special(file)
            return file
    if SHARDED_MODEL in names and (model := checkpoint_of(storage.join(path, SHARDED_MODEL))):
        return model
    if ranks := rank_files(path, names):
        return storage.join(path, ranks[0])
    if ADAPTER_CONFIG in names:
        raise IngredientError(
            f"{path} contains {ADAPTER_CONFIG}, but not {ADAPTER_FILES[0]}. Copy the adapter again, or exclude the folder."
        )
    if is_checkpoint(path):
        refuse_special(path)
    return None


def is_of_folder(file: str | None) -> bool:
    """Return whether what `checkpoint_of` found is one of several files that only their folder can name."""
    return file is not None and (is_metadata(file) or is_rank_file(file))


def index_in_use(index: str, names: Collection[str]) -> bool:
    """Return whether the whole file next to an index is the one to ignore: False if no shard of the index exists any more.

    Saving a model whole where it was saved in shards leaves the old index behind.

    Args:
        index: path of the index.
        names: the files in its folder, among them the whole file `index` without `.index.json`.

    Raises IngredientError if both are complete or nearly so, since one of them is out of date.
    """
    shards = set(_weight_map(index).values())
    whole = os.path.basename(index).removesuffix(INDEX)
    if whole in shards:
        return True
    there = sorted(shards & set(names))
    if not there:
        return False
    raise IngredientError(
        f"{os.path.dirname(index)} contains two models: {whole}, and {len(there)} of the {len(shards)} files that "
        f"{os.path.basename(index)} lists, such as {there[0]}. One of them is probably out of date (transformers loads "
        f"{whole}). Remove the one that you do not want."
    )


def _distributed(folder: str, names: Collection[str]) -> str:
    """Return the file that describes a distributed checkpoint. Raises IngredientError if the folder has another model."""
    other = next((name for name in (*MODEL_FILES, *ADAPTER_FILES) if name in names), None)
    if other is not None:
        raise IngredientError(
            f"{folder} contains two models: {other}, and a distributed checkpoint of torch ({METADATA}). Move the one that "
            f"you do not want elsewhere, or name the file {other} itself."
        )
    refuse_special(storage.join(folder, METADATA))
    return storage.join(folder, METADATA)


def refuse_special(path: str) -> None:
    """Check that a path is a regular file or a link to one, without opening it. Raises IngredientError."""
    kind = special_kind(path)
    if kind is not None and kind != "missing":
        raise IngredientError(
            f"{path} is {kind}; expected a checkpoint, a file ending in {suffixes()}. Remove it, or use a glob that leaves "
            "it out."
        )


def refuse_piece(path: str) -> None:
    """Check that a path is not a file of a distributed checkpoint of torch. Raises IngredientError."""
    if is_metadata(path) or path.endswith(DISTRIBUTED_SUFFIX):
        raise IngredientError(
            f"{path} is one file of a distributed checkpoint of torch; expected the folder that contains all of them. Write "
            f"{os.path.dirname(path)} instead."
        )
