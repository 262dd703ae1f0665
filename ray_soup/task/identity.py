"""The identity of code and of the values that it uses, for cache keys: equal in every process, different after any edit.

A function of the user's is identified by its bytecode, its defaults, the variables that it captures and the globals that it
names, and by the source of its module and of the user's modules that this one imports. Installed code is identified by its
name and the version of its package.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import re
import sys
import threading
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.io.lazy import torch
from ray_soup.task.code_files import Sources, codes, hash_texts, is_of_library, version

RUN = uuid.uuid4().hex
"""Part of the identity of what cannot be identified: no other run has it, so only this run's entries in a cache equal it."""
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
WITHOUT_STATE = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event)
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
"""Attributes of every module of torch; the keys of hooks are numbers that depend on what the process did before."""
NOT_IN_CLASS = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "_abc_impl", "__slots__")


@functools.cache
def types_by_text() -> tuple[type, ...]:
    """Return the types whose repr says all."""
    of_torch = (torch.dtype, torch.device, torch.layout, torch.memory_format)
    return (*of_torch, re.Pattern, Path, range, slice, np.dtype)


@functools.cache
def bookkeeping() -> frozenset[str]:
    """Return the attributes that every module of torch has."""
    return frozenset(vars(torch.nn.Module()))


def in_run(token: str) -> None:
    """Make this process part of a run, whose processes share the results of what cannot be identified."""
    global RUN  # noqa: PLW0603 - one run per process
    RUN = token


def identify(value: Any, strict: bool = True, state: dict[int, str] | None = None, outside: list[str] | None = None) -> str:
    """Hash a value and the code that it refers to: SHA-256 in hex.

    Args:
        value: a function, an object, or plain data.
        strict: True if code that reads files or the environment, or runs text, is never equal to that of another run.
        state: tensors to leave out, by id: the parameters and buffers that a checkpoint replaces.
        outside: receives the names of such code, and of the classes of objects that cannot be identified.
    """
    walk = _Identity(strict, state or {})
    found = walk.digest(value)
    if outside is not None:
        outside += walk.outside
    return found


def notes_on(outside: list[str]) -> list[str]:
    """Return a note for the user about code that cannot be identified, if there is any; `outside` is from `identify`."""
    names = ", ".join(dict.fromkeys(outside))
    if not names:
        return []
    return [f"The code of {names} reads files or cannot be identified: its results are not reused by other runs."]


def own_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, and the hooks that its forward pass calls, without torch's own bookkeeping."""
    found = {name: value for name, value in vars(module).items() if name not in bookkeeping()}
    hooks = {name: list(getattr(module, name, {}).values()) for name in FORWARD_HOOKS}
    return found | {name: values for name, values in hooks.items() if values}


def without_addresses(text: str) -> str:
    """Remove addresses from a repr."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


class _Identity:
    """One walk over values."""

    def __init__(self, strict: bool, state: dict[int, str]) -> None:
        self.strict, self.state = strict, state
        self.sources = Sources()
        self.outside: list[str] = []
        self._done: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no id is used twice
        self._active: list[int] = []

    def digest(self, value: Any) -> str:
        """Hash a value; a value within itself is its position above."""
        if isinstance(value, PLAIN) and type(value) in PLAIN:
            return hash_texts(type(value).__name__, repr(value))
        if id(value) in self.state:
            return self.state[id(value)]
        if id(value) in self._active:
            return f"cycle {self._active.index(id(value))}"
        if id(value) not in self._done:
            self._active.append(id(value))
            self._alive.append(value)
            try:
                self._done[id(value)] = hash_texts(type(value).__qualname__, *self._parts(value))
            except (TypeError, ValueError, RuntimeError, AttributeError, OSError, RecursionError):
                self._done[id(value)] = hash_texts("unidentified", type(value).__qualname__, RUN)
                self.outside.append(f"{type(value).__module__}.{type(value).__qualname__}")
            self._active.pop()
        return self._done[id(value)]

    def _parts(self, value: Any) -> list[str]:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return [self.digest(v) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted(self.digest(v) for v in value)
        if isinstance(value, (dict, types.MappingProxyType)):
            return [self.digest(part) for item in value.items() for part in item]
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            content = self.digest(array.tolist()) if array.dtype.hasobject else _hash_bytes(np.ascontiguousarray(array))
            return [str(array.dtype), str(array.shape), content]
        if isinstance(value, torch.Tensor):
            return _tensor_parts(value)
        if isinstance(value, enum.Enum):
            return [self._class(type(value)), value.name]
        if isinstance(value, types_by_text()):
            return [repr(value)]
        if isinstance(value, WITHOUT_STATE):
            return []
        return self._code_parts(value)

    def _code_parts(self, value: Any) -> list[str]:
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.MethodType):
            return [self.digest(value.__func__), self.digest(value.__self__)]
        if isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
            owner = getattr(value, "__self__", None)
            return [value.__qualname__, "" if owner is None else self.digest(owner)]
        if isinstance(value, type):
            return [self._class(value)]
        if isinstance(value, functools.partial):
            return [self.digest(part) for part in (value.func, value.args, value.keywords)]
        if isinstance(value, (staticmethod, classmethod)):
            return [self.digest(value.__func__)]
        if isinstance(value, property):
            return [self.digest(part) for part in (value.fget, value.fset)]
        if isinstance(value, (types.MemberDescriptorType, types.GetSetDescriptorType)):
            return [value.__name__]
        if isinstance(value, functools._lru_cache_wrapper):
            return [self.digest(value.__wrapped__)]
        if isinstance(value, torch.nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            parts = [own_state(value), value._parameters, value._buffers, value._modules]
            return [self._class(type(value)), *(self.digest(dict(part)) for part in parts)]
        return self._object(value)

    def _object(self, value: Any) -> list[str]:
        """Identify any other object by its class and by what pickle would keep of it."""
        kept = value.__reduce_ex__(2)
        if isinstance(kept, str):
            return [self._class(type(value)), kept]
        parts = [self.digest(part) for part in kept[:3]]
        items = [self.digest(list(part)) for part in kept[3:5] if part is not None]
        return [self._class(type(value)), *parts, *items]

    def _class(self, kind: type) -> str:
        module = sys.modules.get(kind.__module__)
        names = [kind.__module__, kind.__qualname__]
        if _is_library(module):
            return hash_texts(*names, version(kind.__module__))
        members = {n: v for n, v in vars(kind).items() if n not in NOT_IN_CLASS}
        bases = [self.digest(base) for base in kind.__bases__]
        return hash_texts(*names, *bases, self.digest(members), *self.sources.hashes(_file_of(module), kind.__module__))

    def _module(self, module: types.ModuleType) -> list[str]:
        if _is_library(module):
            return [module.__name__, version(module.__name__)]
        values = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("__") and not getattr(value, "__name__", "").startswith(f"{module.__name__}.")
        }
        return [self.digest(values), *self.sources.hashes(_file_of(module), module.__name__)]

    def _function(self, function: types.FunctionType) -> list[str]:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        given = [self.digest(part) for part in (cells, function.__defaults__, function.__kwdefaults__)]
        file, module = function.__code__.co_filename, function.__module__ or ""
        names = [module, function.__qualname__]
        if is_of_library(file, module):
            return [*names, version(module), *given]
        named = {n: function.__globals__[n] for n in _names_in(function.__code__) if n in function.__globals__}
        more = []
        if self.strict and self.sources.read_outside(function.__code__, module):
            more = [RUN]
            self.outside.append(f"{module}.{function.__qualname__}")
        more += self.sources.hashes(file, module)
        return [*names, *given, *self._code(function.__code__), self.digest(named), *more]

    def _code(self, code: types.CodeType) -> list[str]:
        constants = [self.digest(part) for part in code.co_consts]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return [code.co_code.hex(), str(code.co_flags), *constants, *map(repr, names)]


def _hash_bytes(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _tensor_parts(tensor: torch.Tensor) -> list[str]:
    parts = [str(tensor.dtype), str(tuple(tensor.shape))]
    if tensor.device.type == "meta":
        return parts
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return [*parts, _hash_bytes(values.view(torch.uint8).numpy())]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _names_in(code: types.CodeType) -> list[str]:
    return sorted({name for part in codes(code) for name in part.co_names})


def _file_of(module: types.ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ""


def _is_library(module: types.ModuleType | None) -> bool:
    """Return whether a module is installed or part of Python; one without a file is only if Python has it built in."""
    file = _file_of(module)
    if module is not None and file:
        return is_of_library(file, module.__name__)
    return module is not None and (module.__name__ in sys.builtin_module_names or hasattr(module, "__path__"))
