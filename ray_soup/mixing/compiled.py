"""Set-up of the CPU loops that numba compiles, and what several of them share.

Modules import numba and llvmlite from here: the folder of numba's cache must be chosen before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from ray_soup.io.cache import cache_folder

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))  # numba reads it when it is imported

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import overload as numba_overload
from numpy.typing import NDArray

__all__ = ["add_rows", "addresses", "carray", "cgutils", "implements", "intrinsic", "ir", "jit", "pointer", "types"]

carray = numba.carray  # type: ignore[attr-defined] # an array over memory; numba does not export it in its types

F = TypeVar("F", bound=Callable[..., Any])
SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""The digest of this package's source."""


def jit(function: F) -> F:
    """Compile a loop with numba. The fast-math flags allow vector sums, but keep NaN and infinity intact."""
    return _compiled(function, {"contract", "reassoc", "nsz"})


def jit_in_order(function: F) -> F:
    """Compile a loop as `jit` does, but keep the order of its additions."""
    return _compiled(function, {"contract", "nsz"})


def _compiled(function: F, fast: set[str]) -> F:
    made: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=fast)(function)
    if isinstance(made, Dispatcher):  # unless NUMBA_DISABLE_JIT is set
        made._cache._cache_file.__class__ = CompiledFiles  # type: ignore[attr-defined]
    return cast(F, made)


class CompiledFiles(IndexDataCacheFile):
    """The compiled code of one function in numba's cache, by the types of its arguments; each file says which it is for.

    numba takes no lock: of two processes that compile at once for different types, the index of one may name the file of
    the other. And it looks at the file of a loop only, not at those of the loops and constants that it uses. Code for other
    types, or of other sources, counts as missing here; it is compiled and saved again.
    """

    def save(self, key: Any, data: Any) -> None:
        """Save the code for these types."""
        super().save(key, (SOURCES, key, data))  # type: ignore[no-untyped-call]

    def load(self, key: Any) -> Any:
        """Return the code for these types; None if there is none."""
        found = super().load(key)  # type: ignore[no-untyped-call]
        return found[2] if isinstance(found, tuple) and found[:2] == (SOURCES, key) else None


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a generator of LLVM code callable from compiled loops, without its leading typing context."""
    made: Callable[..., Any] = numba_intrinsic(function)
    return made


def implements(stub: Callable[..., Any], **options: Any) -> Callable[[F], F]:
    """Register the decorated function as the implementation of `stub` in compiled loops, chosen by argument types."""
    decorate: Callable[[F], F] = numba_overload(stub, **options)
    return decorate


@intrinsic
def pointer(_context: Any, _address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the dtype of the array `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.uint64, like), code  # type: ignore[no-untyped-call]


@jit
def add_rows(
    total: NDArray[np.float64], factors: NDArray[np.float64], addresses: NDArray[np.uint64], like: Any, start: int, stop: int
) -> None:
    """Compute total += sum_k factors[k] * row_k[start:stop] in the order of k, with one pass over the sums for four rows.

    Args:
        total: float64 [stop - start].
        factors: float64 [K].
        addresses: of the K rows, as `addresses` returns them.
        like: an array of the dtype of the rows.
        start: first element.
        stop: end of the range (excluded).
    """
    fours = addresses.size // 4 * 4
    for k in range(0, fours, 4):
        a = carray(pointer(addresses[k], like), (stop,))[start:]
        b = carray(pointer(addresses[k + 1], like), (stop,))[start:]
        c = carray(pointer(addresses[k + 2], like), (stop,))[start:]
        d = carray(pointer(addresses[k + 3], like), (stop,))[start:]
        _add_four(total, factors[k : k + 4], a, b, c, d)
    for k in range(fours, addresses.size):
        _add_scaled(total, factors[k], carray(pointer(addresses[k], like), (stop,))[start:])


@jit
def _add_scaled(total: NDArray[np.float64], factor: float, row: NDArray[Any]) -> None:
    for i in range(total.size):
        total[i] += factor * row[i]


@jit_in_order
def _add_four(
    total: NDArray[np.float64],
    factors: NDArray[np.float64],
    a: NDArray[Any],
    b: NDArray[Any],
    c: NDArray[Any],
    d: NDArray[Any],
) -> None:
    for i in range(total.size):
        part = total[i]
        part += factors[0] * a[i]
        part += factors[1] * b[i]
        part += factors[2] * c[i]
        part += factors[3] * d[i]
        total[i] = part


def addresses(rows: Sequence[NDArray[Any]], size: int) -> NDArray[np.uint64]:
    """Return the memory address of each row, uint64 [K], for loops that read `size` elements of one dtype from it.

    Compiled loops check nothing, so this is the only place where an address is taken. The rows have to outlive its use.

    Raises ValueError for a row that is not [size], contiguous and aligned, or whose dtype is not that of the first.
    """
    for k, row in enumerate(rows):
        if row.shape != (size,) or row.dtype != rows[0].dtype or not (row.flags.c_contiguous and row.flags.aligned):
            raise ValueError(
                f"row {k} is {row.dtype} {list(row.shape)} with the strides {row.strides}; expected {rows[0].dtype} "
                f"[{size}], contiguous and aligned"
            )
    return np.array([row.ctypes.data for row in rows], dtype=np.uint64)
