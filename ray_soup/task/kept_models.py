"""What is known of a library's model, kept in the cache of the node: layout, preprocessing, default settings.

To describe a model, its library has to be imported, which takes seconds. A command that computes nothing with the model
needs no more than the description. Its key consists of the recipe key `model`, and of the names, sizes and modification
times of all files of this package and the libraries. A model of the user's own function is never kept, and nothing is kept
once other code of the process has imported such a library: it may have registered models there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ray_soup.errors import SoupError
from ray_soup.io.cache import InUse, cached, content_key, lookup
from ray_soup.io.progress import drain
from ray_soup.task.functions import PACKAGE, as_in_workers
from ray_soup.task.model_spec import ModelSpec

T = TypeVar("T")
LIBRARIES = ("open_clip", "timm", "torchvision")
"""The libraries whose models are described by their names and options alone; open_clip's may consist of the others'."""
FROM_FILES = ("zeroshot", "template")
"""Options by which a model depends on more."""
NBYTES = 1 << 20
_KEEPING: ContextVar[bool] = ContextVar("keeping", default=False)


@contextmanager
def keeping() -> Iterator[None]:
    """Keep values in this context, also after the first of them has imported a library, if none was imported before."""
    token = _KEEPING.set(_KEEPING.get() or _are_absent())
    try:
        yield
    finally:
        _KEEPING.reset(token)


def _are_absent() -> bool:
    return not any(library in sys.modules for library in LIBRARIES)


def kept(what: str, model: str, kind: type[T], make: Callable[[], T], *more: Any) -> T:
    """Return the value of `make()` from the cache of the node if it is there, without importing the library of `model`.

    Args:
        what: a name of the value.
        model: the recipe key `model`.
        kind: the type of the value, for pydantic.
        make: computes it.
        more: other JSON values that it depends on.
    """
    spec = ModelSpec.parse(model)
    named = spec.library in LIBRARIES and not {"/", ":"} & {*spec.name} and spec.options.keys().isdisjoint(FROM_FILES)
    if not (named and (_KEEPING.get() or _are_absent())):
        return make()
    key, adapter = content_key(what, model, _code(), *more), TypeAdapter(kind)
    with suppress(SoupError, OSError, ValueError):  # an entry that cannot be read is missing
        hold = lookup("models", key)
        if hold is not None:
            return _read(hold, adapter)
    made = make()
    with suppress(SoupError, OSError):  # a cache that cannot be written is a reason to be slow, not to stop
        drain(cached("models", key, NBYTES, lambda folder: _write(folder, adapter.dump_json(made)))).close()
    return made


def _read(hold: InUse, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json((hold.path / "value.json").read_bytes())
    finally:
        hold.close()


def _write(folder: Path, data: bytes) -> Iterator[None]:
    (folder / "value.json").write_bytes(data)
    yield


@functools.cache
def _code() -> list[Any]:
    """Return what identifies the code that describes models: this package, the libraries, and the versions below them."""
    with as_in_workers():
        found = [importlib.util.find_spec(library) for library in LIBRARIES]
    folders = [PACKAGE, *(folder for spec in found if spec for folder in spec.submodule_search_locations or ())]
    return [sys.version, importlib.metadata.version("torch"), [sorted(_files(folder)) for folder in folders]]


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and modification time in ns of each file below a folder that is no compiled copy of another."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):
                found = os.stat(path)
                yield path, found.st_size, found.st_mtime_ns
