"""Which files are checkpoints: their names, the shards of an index, and the model in a folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.formats import INDEX_SUFFIXES, SAFETENSORS_SUFFIX, TORCH_SUFFIXES

MODEL_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def split_key(spec: str) -> tuple[str, str]:
    """Split `run.pth.tar?key=state_dict_ema` into path and key; without ?key= the key is empty."""
    found = re.fullmatch(r"(.*)[?&]key=([\w.-]+)", spec)
    return (found[1], found[2]) if found else (spec, "")


def stem(path: str) -> str:
    """Return the name of a checkpoint's file without its suffix."""
    name = Path(path).name
    bare = next((name.removesuffix(suffix) for suffix in (*INDEX_SUFFIXES, ".pth.tar") if name.endswith(suffix)), None)
    return bare or name.rpartition(".")[0] or name


def shards_of(index: str) -> list[str]:
    """Return the files that an index of a checkpoint lists, sorted. Raises IngredientError if it is damaged."""
    try:
        weight_map = json.loads(storage.read_bytes(index))["weight_map"]
        return [storage.join(os.path.dirname(index), shard) for shard in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IngredientError(
            f"{index} is not an index of checkpoint files: it has no readable 'weight_map' ({error}). Copy it again."
        ) from error


def suffixes() -> str:
    """Return the suffixes of checkpoint files, for messages."""
    return ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))


def is_checkpoint(path: str) -> bool:
    """Return whether a file with this name counts as a checkpoint."""
    return path.endswith((SAFETENSORS_SUFFIX, *INDEX_SUFFIXES, *TORCH_SUFFIXES))


def checkpoint_of(path: str) -> str | None:
    """Return the file of the checkpoint at `path`: the path itself, or the model in a folder; None if there is none."""
    if is_checkpoint(path) and storage.isfile(path):
        return path
    names = storage.listdir(path) if storage.isdir(path) else []
    for name in (*MODEL_FILES, "adapter_model.safetensors"):  # open_ingredient refuses an adapter with a message
        if name in names:
            return storage.join(path, name)
    return None
