"""Torch files: checked, then loaded by `torch.load` itself, memory-mapped and without running code from them."""

from __future__ import annotations

import math
import os
import pickle
import re
import shlex
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any, TypeAlias

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.formats import CONTAINERS, DTYPE_NAMES, LowPrecisionError, name_of, refuse_text
from ray_soup.io.lazy import torch
from ray_soup.io.mapped import Version, guard, opened
from ray_soup.io.torch_archive import check_archive
from ray_soup.io.torch_pickle import TooLarge, Unsafe

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's magic number, pickled
MOST_VALUES, MOST_IN_ALL, LONGEST_TEXT, DEEPEST = 10_000, 1_000_000, 10_000, 8  # of metadata: of a key, of all keys
TRAINING_STATE = ("optimizer", "lr_scheduler", "scheduler", "loops", "callbacks")
"""Beginnings of the keys under which the state of a training is stored, which is not metadata of the model."""
_LOADING = Lock()  # torch's list of safe globals belongs to the whole process

Containers: TypeAlias = "dict[str, dict[str, torch.Tensor]]"


class _Dtype:
    """Stands for a NumPy dtype in a checkpoint; nothing of NumPy is called."""

    def __init__(self, name: str, *_options: Any) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])


def _scalar(dtype: _Dtype, data: Any) -> Any:
    """Return a NumPy scalar in a checkpoint as a plain number; None for what is not a number."""
    import numpy as np

    if isinstance(data, str):  # bytes, as a pickle of protocol 2 stores them
        data = data.encode("latin1")
    if not re.fullmatch(r"[biuf][1248]", dtype.name) or not isinstance(data, bytes) or len(data) != int(dtype.name[1]):
        return None
    order = dtype.order if dtype.order in "<>" else "<"
    return np.frombuffer(data, f"{order}{dtype.name}")[0].item()


NUMPY: list[tuple[Callable[..., Any], str]] = [
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
]
"""NumPy's names in a checkpoint, and what stands for them: training scripts store metrics as NumPy scalars."""


def load_torch(path: str, local: str) -> tuple[dict[Any, Any], Version]:
    """Load a torch file without reading its tensors, which are memory-mapped.

    Args:
        path: path or URI, for messages.
        local: the file, or the copy of it in the cache.

    Returns what the file contains, and its version. Raises IngredientError if the file is damaged, contains something else
    than a model, or can only be unpickled by running code from it.
    """
    loaded, version = _load(path, local)
    if isinstance(loaded, dict) and {"state", "param_groups"} <= set(loaded):
        raise IngredientError(
            f"{path} is the state of an optimizer, not a model. Exclude it (with a glob such as model*.pt)."
        )
    if not isinstance(loaded, dict):
        raise IngredientError(f"{path} contains a {type(loaded).__name__}; expected a state dict. Save that instead.")
    return loaded, version


def _load(path: str, local: str) -> tuple[Any, Version]:
    guard()
    with opened(local) as (link, descriptor, version), os.fdopen(os.dup(descriptor), "rb") as file:
        begin = file.read(512)
        refuse_text(path, begin)
        if not begin:
            raise IngredientError(f"{path} is empty (0 bytes). Copy it again.")
        if not begin.startswith(b"PK\3\4"):
            raise IngredientError(_not_an_archive(path, local, begin))
        try:
            check_archive(file)
            with _LOADING, torch.serialization.safe_globals([Namespace, *NUMPY]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
                return torch.load(link, map_location="cpu", weights_only=True, mmap=True), version
        except Unsafe as error:
            raise IngredientError(_unsafe(path, local, str(error))) from error
        except TooLarge as error:
            raise IngredientError(
                f"{path} was not opened: {error}. Save the state dict alone: torch.save(model.state_dict(), path)."
            ) from error
        except pickle.UnpicklingError as error:
            found = re.search(r"(?:GLOBAL|class|function) (\S+)", str(error))
            raise IngredientError(_unsafe(path, local, found[1].strip(".") if found else "")) from error
        except MemoryError:
            raise
        except Exception as error:  # on a damaged pickle, the unpickler can raise anything
            reason = str(error).partition("\n")[0].partition(". ")[0].replace(link, path)
            raise IngredientError(
                f"{path} cannot be read as a torch checkpoint: it is damaged or truncated ({version.size:,} bytes; "
                f"{reason}). Copy it again, or save it again with torch.save."
            ) from error


def _not_an_archive(path: str, local: str, begin: bytes) -> str:
    """Return the message for a file that is not a zip archive."""
    if begin.startswith(LEGACY):
        return (
            f"{path} is in torch's legacy format (before 1.6), whose tensors cannot be read separately. Save it again: "
            f"{_command(path, local, 'c = torch.load(f, map_location=@, weights_only=True)', 'c')}"
        )
    if begin.startswith(b"\x80"):
        return (
            f"{path} is a pickle that torch.save did not write; expected a torch checkpoint. Save the state dict with "
            "torch.save(model.state_dict(), path)."
        )
    return (
        f"{path} cannot be read as a torch checkpoint: it is damaged or truncated, or another kind of file (it begins with "
        f"{begin[:8]!r}). Copy it again."
    )


def _unsafe(path: str, local: str, what: str) -> str:
    """Return the message for a file with more than tensors and plain values."""
    if what == "TorchScript":
        return (
            f"{path} is a TorchScript archive, a program with its weights; expected a state dict. If you trust the file, "
            f"this command extracts it: {_command(path, local, 'c = torch.jit.load(f, map_location=@)', 'c.state_dict()')}"
        )
    keys = ", ".join(map(_literal, CONTAINERS))
    load = (
        f"c = torch.load(f, map_location=@, weights_only=False); "
        f"c = next((c[k] for k in ({keys}) if c.get(k) is not None), c) if isinstance(c, dict) else c"
    )
    result = "{k: v for k, v in (c if isinstance(c, dict) else c.state_dict()).items() if isinstance(v, torch.Tensor)}"
    holds = f"it holds {what!r}" if what else "it holds more than tensors and plain values"
    return (
        f"{path} was not opened: {holds}, and unpickling that would run code from the file. Save the state dict alone: "
        "torch.save(model.state_dict(), path). If you trust the file, this command extracts it: "
        f"{_command(path, local, load, result)}"
    )


def _command(path: str, local: str, load: str, result: str) -> str:
    """Return a shell command that loads a file `f` into `c`, on the device @, and saves `result` beside it.

    A remote file is loaded from its copy in the cache, and the result is saved in the current folder.
    """
    target = f"{os.path.splitext(os.path.basename(path) if storage.is_remote(path) else path)[0]}.state_dict.pt"
    code = (
        f'import torch; f = open({_literal(local)}, "rb"); {load.replace("@", _literal("cpu"))}; '
        f'torch.save({result}, open({_literal(target)}, "wb"))'
    )
    return f"python -c {shlex.quote(code)}"


def _literal(text: str) -> str:
    """Return a Python literal of a text, in double quotes and ASCII."""
    escaped = text.encode("unicode_escape").decode().replace('"', '\\"')
    return f'"{escaped}"'


def state_dicts(path: str, loaded: Mapping[Any, Any], key: str = "") -> Containers:
    """Return the state dicts in a loaded file, by their keys in it: "" for the top level, one of CONTAINERS, or `key`.

    Raises IngredientError if there is none, or if a tensor is of a kind that cannot be mixed.
    """
    containers: Containers = {}
    for name, values in [("", loaded), *((name, loaded.get(name)) for name in (*CONTAINERS, key))]:
        if isinstance(values, dict):
            tensors = {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
            if tensors:
                containers[name] = {k: _plain_tensor(path, k, v) for k, v in tensors.items()}
    if not containers:
        raise IngredientError(
            f"{path} contains no tensors: found {sorted(map(str, loaded))[:8]}; expected a state dict, or one under one of "
            f"{', '.join(CONTAINERS)}. Specify its key, as in {path}?key=NAME."
        )
    return containers


def _plain_tensor(path: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without its subclass and gradient. Raises IngredientError for one that cannot be mixed."""
    if tensor.is_nested:
        what = "a nested tensor"
    elif tensor.is_meta:
        what = "on the device meta, without values"
    elif name_of(tensor.dtype) not in DTYPE_NAMES or tensor.layout != torch.strided:
        what = f"{tensor.dtype}, {tensor.layout}"
    elif type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        what = f"a {type(tensor).__name__}"
    else:
        return tensor.detach().as_subclass(torch.Tensor)
    raise (LowPrecisionError if "torch.float8" in what else IngredientError)(
        f"{path}: the tensor {name} is {what}; expected a dense tensor of "
        f"{', '.join(DTYPE_NAMES)}. Convert it to one of these."
    )


class _TooMany(Exception):
    """A key has too many values for metadata."""


def plain_values(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the plain values among those stored beside tensors: numbers, texts, lists and dictionaries of them.

    A Namespace becomes a dictionary. What is too long, too deep, or not plain is left out, and so are the state of a
    training and every key with more than MOST_VALUES values.
    """
    left = 0

    def plain(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooMany
        if isinstance(value, Namespace):
            value = vars(value)
        if depth > DEEPEST:
            return None
        if isinstance(value, dict):
            found = {k: plain(v, depth + 1) for k, v in value.items() if isinstance(k, str) and len(k) <= LONGEST_TEXT}
            return {k: v for k, v in found.items() if v is not None}
        if isinstance(value, (list, tuple)):
            items = [plain(v, depth + 1) for v in value]
            return None if any(i is None for i in items) else items
        if isinstance(value, str):
            return str(value) if len(value) <= LONGEST_TEXT else None
        if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 63):
            return value if not isinstance(value, float) or math.isfinite(value) else None
        return None

    found: dict[str, Any] = {}
    in_all = MOST_IN_ALL
    for key, value in loaded.items():
        if not isinstance(key, str) or len(key) > LONGEST_TEXT or key.startswith(TRAINING_STATE):
            continue
        left = budget = min(MOST_VALUES, in_all)
        with suppress(_TooMany):
            found[key] = plain(value, 1)
        in_all -= budget - max(left, 0)
    return {key: value for key, value in found.items() if value is not None}
