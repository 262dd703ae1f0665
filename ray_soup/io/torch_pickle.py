"""Check the pickle in a torch file before torch runs it: what it builds and calls, and the bytes of each of its storages.

`torch.load(weights_only=True)` runs no code from a file, but it trusts the file's numbers: a few bytes can ask for gigabytes
or exhaust the stack. Here the pickle is interpreted without building anything: values that do not matter are placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from struct import unpack
from typing import Any

LONGEST_PICKLE = 64 << 20  # bytes; the names and shapes of a model of 10,000 tensors take 3 MB
MOST_OPERATIONS, MOST_CONTAINERS, MOST_CALLS = 5_000_000, 1_000_000, 500_000
LONGEST_TUPLE, MOST_COPIED = 1_000_000, 5_000_000  # values; those copied by calls or hashed as keys
DEEPEST_TUPLE = 16
ITEMSIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1, "Untyped": 1,
}  # fmt: skip
"""Bytes of an element, by the name of its storage class without `Storage`."""
REBUILD = re.compile(r"torch\._utils\._rebuild_\w+")
CALLS = {
    "argparse.Namespace", "builtins.bytearray", "builtins.complex", "builtins.set", "collections.Counter",
    "collections.OrderedDict", "torch.Size", "torch._tensor._rebuild_from_type_v2", "torch.device",
    "torch.serialization._get_layout", "_codecs.encode",
}  # fmt: skip
"""Callables of torch and Python that a checkpoint may call, besides those of REBUILD."""


class Unreadable(Exception):
    """The pickle is damaged, or asks for what no checkpoint needs."""


class TooLarge(Exception):
    """The pickle holds more than is read; the text names the limit."""


class Unsafe(Exception):
    """The pickle calls something that is neither a tensor nor a plain value; the text is its name."""


class Global(str):
    """A name that the pickle imports."""

    __slots__ = ()


class Placeholder:
    """A placeholder: a container, or the result of a call."""

    __slots__ = ("kind", "size", "storage")
    size: int  # number of values in it, those in tuples included

    def __init__(self, kind: str, storage: str | None = None) -> None:
        self.kind, self.storage, self.size = kind, storage, 0


class Items(tuple[Any, ...]):
    """A tuple, with its depth and the number of values in it, nested ones included."""

    depth: int
    size: int


class Storages:
    """Interprets a pickle.

    Attributes:
        nbytes: size of each storage in bytes, by its key.
        tensors: name of the first tensor in each storage, by the storage's key.
    """

    def __init__(self, data: bytes) -> None:
        """Interpret the pickle `data`. Raises Unreadable, TooLarge or Unsafe."""
        self.nbytes: dict[str, int] = {}
        self.tensors: dict[str, str] = {}
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._containers = self._calls = self._copied = self._text = 0
        try:
            for _ in range(MOST_OPERATIONS):
                code = self._take(1)
                if code == b".":
                    break
                OPERATIONS[code](self)
            else:
                raise _too_many(MOST_OPERATIONS, "values and steps")
        except (LookupError, ValueError) as error:
            if isinstance(error, KeyError) and error.args[0] in NEWER:
                raise Unsafe("a pickle of protocol 3 or later") from None
            raise Unreadable(f"its pickle is broken at byte {self._at:,}") from error

    def _take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise ValueError("the pickle ends early")
        self._at += count
        return part

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end].decode()
        self._at = end + 1
        return line

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _container(self, kind: str) -> None:
        self._containers += 1
        if self._containers > MOST_CONTAINERS:
            raise _too_many(MOST_CONTAINERS, "lists and dictionaries")
        self._stack.append(Placeholder(kind))

    def _tuple(self, items: list[Any]) -> None:
        made = Items(items)
        nested = [item for item in items if isinstance(item, Items)]
        made.depth = 1 + max((n.depth for n in nested), default=0)
        made.size = len(items) + sum(n.size for n in nested)
        if made.depth > DEEPEST_TUPLE:
            raise TooLarge(f"it has tuples that are more than {DEEPEST_TUPLE} deep")
        if made.size > LONGEST_TUPLE:
            raise TooLarge(f"it has a tuple of {made.size:,} values; expected at most {LONGEST_TUPLE:,}")
        self._stack.append(made)

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = self._stack[-count:]
        del self._stack[-count:]
        self._tuple(items)

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(Global(f"{'builtins' if module == '__builtin__' else module}.{name}"))

    def _grow(self, items: list[Any]) -> None:
        """Add items to the list at the top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, Placeholder) or target.kind != "list":
            raise ValueError
        target.size += _count(items)

    def _set(self, items: list[Any]) -> None:
        """Set items, keys and values in turn, in the dictionary at the top of the stack."""
        target = self._stack[-1]
        if not isinstance(target, Placeholder) or len(items) % 2:
            raise ValueError
        target.size += _count(items)
        self._copy(sum(key.size for key in items[::2] if isinstance(key, Items)))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str) and isinstance(value, Placeholder) and value.storage is not None:
                self.tensors.setdefault(value.storage, key)

    def _copy(self, count: int) -> None:
        self._copied += count
        if self._copied > MOST_COPIED:
            raise _too_many(MOST_COPIED, "values in copies and keys")

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, Items):
            raise ValueError
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise _too_many(MOST_CALLS, "tensors, parameters and other objects")
        self._text += sum(len(argument) for argument in arguments if type(argument) is str)
        if self._text > LONGEST_PICKLE:
            raise _too_many(LONGEST_PICKLE, "characters of encoded text")
        self._copy(sum(argument.size for argument in arguments if isinstance(argument, (Placeholder, Items))))
        if not _may_be_called(function, arguments):
            raise Unsafe(str(function))
        storage = next((a.storage for a in arguments if isinstance(a, Placeholder) and a.storage is not None), None)
        if function == "torch._tensor._rebuild_from_type_v2":
            storage = next((a.storage for a in arguments[2] if isinstance(a, Placeholder)), None)
        self._stack.append(Placeholder(str(function), storage))

    def _build(self) -> None:
        self._stack.pop()
        made = self._stack[-1]
        if not isinstance(made, Placeholder) or made.kind.startswith(("torch.", "builtins.")):
            raise ValueError

    def _storage(self) -> None:
        found = self._stack.pop()
        if not isinstance(found, Items) or len(found) != 5:
            raise ValueError
        what, kind, key, _, count = found
        itemsize = ITEMSIZES.get(str(kind).rpartition(".")[2].removesuffix("Storage")) if isinstance(kind, Global) else None
        if what not in ("storage", b"storage") or itemsize is None or type(key) is not str or type(count) is not int:
            raise Unreadable(f"its pickle describes a storage as {[str(f)[:40] for f in found]}")
        if count < 0:
            raise Unreadable(f"its pickle describes a storage of {count} elements")
        self.nbytes[key] = max(self.nbytes.get(key, 0), count * itemsize)
        self._stack.append(Placeholder("storage", key))


def _too_many(limit: int, what: str) -> TooLarge:
    return TooLarge(f"it has more than {limit:,} {what}")


def _count(items: list[Any]) -> int:
    """Return the number of values in a list, those in tuples included."""
    return len(items) + sum(item.size for item in items if isinstance(item, Items))


def _may_be_called(function: Global, arguments: Items) -> bool:
    """Return whether a call is one that checkpoints make; what is neither of torch nor of Python, torch decides."""
    if function == "torch._tensor._rebuild_from_type_v2":
        return len(arguments) == 4 and isinstance(arguments[0], Global) and REBUILD.fullmatch(arguments[0]) is not None
    if function == "builtins.bytearray":
        return not any(isinstance(a, int) for a in arguments)
    if function == "_codecs.encode":  # other encodings than this one, which bytes are stored with, can multiply sizes
        return len(arguments) == 2 and arguments[1] == "latin1"
    if function in CALLS or REBUILD.fullmatch(function):
        return not any(isinstance(a, Global) and a.endswith("Storage") for a in arguments)
    return not function.startswith(("torch.", "builtins."))


def _constant(size: int, value: Callable[[bytes], Any]) -> Callable[[Storages], None]:
    return lambda s: s._push(value(s._take(size)))


def _string(layout: str, size: int) -> Callable[[Storages], None]:
    return lambda s: s._push(str(s._take(unpack(layout, s._take(size))[0]), "utf-8", "surrogatepass"))


OPERATIONS: dict[bytes, Callable[[Storages], Any]] = {
    b"\x80": lambda s: s._take(1),
    b"c": Storages._global,
    b"R": Storages._call,
    b"\x81": Storages._call,
    b"b": Storages._build,
    b"Q": Storages._storage,
    b"(": Storages._mark,
    b"t": lambda s: s._tuple(s._pop_mark()),
    b")": lambda s: s._tuple([]),
    b"\x85": lambda s: s._tuple_of(1),
    b"\x86": lambda s: s._tuple_of(2),
    b"\x87": lambda s: s._tuple_of(3),
    b"]": lambda s: s._container("list"),
    b"}": lambda s: s._container("dict"),
    b"\x8f": lambda s: s._container("set"),
    b"a": lambda s: s._grow([s._stack.pop()]),
    b"e": lambda s: s._grow(s._pop_mark()),
    b"s": lambda s: s._set([s._stack.pop(), s._stack.pop()][::-1]),
    b"u": lambda s: s._set(s._pop_mark()),
    b"q": lambda s: s._put(s._take(1)[0]),
    b"r": lambda s: s._put(unpack("<I", s._take(4))[0]),
    b"h": lambda s: s._push(s._memo[s._take(1)[0]]),
    b"j": lambda s: s._push(s._memo[unpack("<I", s._take(4))[0]]),
    b"N": lambda s: s._push(None),
    b"\x88": lambda s: s._push(True),
    b"\x89": lambda s: s._push(False),
    b"J": _constant(4, lambda data: unpack("<i", data)[0]),
    b"K": _constant(1, lambda data: data[0]),
    b"M": _constant(2, lambda data: unpack("<H", data)[0]),
    b"G": _constant(8, lambda data: unpack(">d", data)[0]),
    b"X": _string("<I", 4),
    b"U": _string("<B", 1),
    b"\x8a": lambda s: s._push(int.from_bytes(s._take(s._take(1)[0]), "little", signed=True)),
}
NEWER = {b"\x8c", b"\x8e", b"\x94", b"\x95", b"B", b"C"}
"""Operations of later pickle protocols, which `torch.load(weights_only=True)` does not support."""
