"""Read a pickle into inert values: nothing that it names is imported, and nothing is called.

Lists, dictionaries, tuples, texts and numbers are themselves. Everything else is an `Inert`: the name of what the pickle
would have called, and its arguments. A name that the caller does not expect is refused, so that a library may load the file
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from struct import unpack
from typing import Any

from ray_soup.io.torch_pickle import TooLarge, Unreadable, Unsafe

MOST_VALUES = 10_000_000  # lists, dictionaries, tuples and objects; a piece of a distributed checkpoint takes eight
DEEPEST_TUPLE = 16


class Name(str):
    """A name that the pickle imports, as in torch.float32."""

    __slots__ = ()


class Inert:
    """What the pickle makes by a call of `name` with `arguments`, and the state that it sets afterwards."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def get(self, key: str) -> Any:
        """Return an attribute that the state sets; None if there is none."""
        return self.state.get(key) if isinstance(self.state, dict) else None

    state: Any


class Nested(tuple[Any, ...]):
    """A tuple with tuples in it."""

    depth: int


def read_pickle(data: bytes, allowed: Collection[str]) -> Any:
    """Return the inert value of a pickle.

    Args:
        data: the pickle.
        allowed: the names that it may import.

    Raises Unreadable if it is damaged, Unsafe if it imports another name, TooLarge if it holds more than is read.
    """
    reader = _Reader(data, allowed)
    try:
        while (code := data[reader.at]) != STOP:
            reader.at += 1
            OPERATIONS[code](reader)
        return reader.stack.pop()
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise Unreadable(f"its pickle is broken at byte {reader.at:,}") from error


def shown(value: Any) -> str:
    """Return a short text for an inert value, for messages."""
    if isinstance(value, tuple) and len(value) < 9 and all(isinstance(n, int) and abs(n) < 1 << 70 for n in value):
        return str(list(value))
    if isinstance(value, (str, bool, float)) or value is None or (isinstance(value, int) and abs(value) < 1 << 70):
        return repr(value[:80] if isinstance(value, str) else value)
    return f"a {value.name.rpartition('.')[2] if isinstance(value, Inert) else type(value).__name__}"


class _Reader:
    """The state of an unpickler."""

    def __init__(self, data: bytes, allowed: Collection[str]) -> None:
        self.data, self.allowed, self.at = data, allowed, 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.values = 0

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        if len(part) != count:
            raise ValueError("the pickle ends early")
        self.at += count
        return part

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        line = self.data[self.at : end].decode()
        self.at = end + 1
        return line

    def push(self, value: Any) -> None:
        self.values += 1
        if self.values > MOST_VALUES:
            raise TooLarge(f"it has more than {MOST_VALUES:,} values")
        self.stack.append(value)

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def tuple_of(self, items: list[Any]) -> None:
        nested = [item for item in items if isinstance(item, tuple)]
        if not nested:
            self.push(tuple(items))
            return
        made = Nested(items)
        made.depth = 1 + max(getattr(item, "depth", 1) for item in nested)
        if made.depth > DEEPEST_TUPLE:
            raise TooLarge(f"it has tuples that are more than {DEEPEST_TUPLE} deep")
        self.push(made)

    def last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = self.stack[-count:]
        del self.stack[-count:]
        self.tuple_of(items)

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.allowed:
            raise Unsafe(full)
        self.stack.append(Name(full))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise TypeError
        if function == "torch.Size":
            (sizes,) = arguments
            self.push(tuple(sizes))
        elif function == "collections.OrderedDict" and not arguments:
            self.push({})
        else:
            self.push(Inert(function, arguments))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Inert):
            made.state = state
        elif not isinstance(made, dict):  # an OrderedDict with attributes
            raise TypeError

    def persistent(self) -> None:
        self.push(Inert("storage", self.stack.pop()))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target += items

    def set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Nested):
                raise TypeError
            target[key] = value

    def put(self, key: int) -> None:
        if key > len(self.data):  # pickle itself would make room for all smaller keys
            raise ValueError
        self.memo[key] = self.stack[-1]

    def text(self, layout: str, size: int) -> None:
        self.push(str(self.take(unpack(layout, self.take(size))[0]), "utf-8", "surrogatepass"))

    def integer(self, size: int) -> None:
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))


STOP = ord(".")
OPERATIONS: dict[int, Callable[[_Reader], Any]] = {
    code[0]: operation
    for code, operation in {
        b"\x80": lambda r: r.take(1),
        b"\x95": lambda r: r.take(8),
        b"c": lambda r: r.name(r.line(), r.line()),
        b"\x93": _Reader.stack_name,
        b"R": _Reader.call,
        b"\x81": _Reader.call,
        b"b": _Reader.build,
        b"Q": _Reader.persistent,
        b"(": _Reader.mark,
        b"t": lambda r: r.tuple_of(r.marked()),
        b")": lambda r: r.push(()),
        b"\x85": lambda r: r.last(1),
        b"\x86": lambda r: r.last(2),
        b"\x87": lambda r: r.last(3),
        b"]": lambda r: r.push([]),
        b"}": lambda r: r.push({}),
        b"a": lambda r: r.append([r.stack.pop()]),
        b"e": lambda r: r.append(r.marked()),
        b"s": lambda r: r.set([r.stack.pop(), r.stack.pop()][::-1]),
        b"u": lambda r: r.set(r.marked()),
        b"\x94": lambda r: r.put(len(r.memo)),
        b"q": lambda r: r.put(r.take(1)[0]),
        b"r": lambda r: r.put(unpack("<I", r.take(4))[0]),
        b"h": lambda r: r.stack.append(r.memo[r.take(1)[0]]),
        b"j": lambda r: r.stack.append(r.memo[unpack("<I", r.take(4))[0]]),
        b"N": lambda r: r.stack.append(None),
        b"\x88": lambda r: r.stack.append(True),
        b"\x89": lambda r: r.stack.append(False),
        b"J": lambda r: r.integer(4),
        b"K": lambda r: r.stack.append(r.take(1)[0]),
        b"M": lambda r: r.stack.append(unpack("<H", r.take(2))[0]),
        b"G": lambda r: r.stack.append(unpack(">d", r.take(8))[0]),
        b"\x8a": lambda r: r.integer(r.take(1)[0]),
        b"\x8c": lambda r: r.text("<B", 1),
        b"X": lambda r: r.text("<I", 4),
        b"C": lambda r: r.push(r.take(r.take(1)[0])),
    }.items()
}
"""The operations of pickles that torch and `torch.distributed.checkpoint` write; any other one is refused."""
