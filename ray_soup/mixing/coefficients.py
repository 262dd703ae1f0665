"""Coefficients of a soup: parametrizations, saving and loading.

    x[k, b] = y[k, b] / n[k, b]                      coordinates y are unit-scaled: one learning rate fits every block
    c[k, b] = x[k, b] + (1 - sum_j x[j, b]) / K      each column sums to 1, any sign

Learned soups (Wortsman et al. 2022) have c = softmax(y) over the ingredients, and a factor t on the logits. Since c sums to
1, sum_k c_k theta_k = center + sum_k c_k d_k: combine and project stay the same with x = c, and the chain rule gives dL/dy.

Shapes: K ingredients, m ingredients of the model batch, B blocks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ray_soup.errors import RecipeError
from ray_soup.io.disk import json_value, write_bytes
from ray_soup.mixing.row_groups import groups_of
from ray_soup.mixing.running_statistics import Statistics

SUM_TOLERANCE = 1e-12
"""How far the sum of a column of coefficients may be from 1."""
MEAN = -1  # block of a tensor that is the plain mean of all ingredients
FORMAT = "ray_soup.coefficients/1"
ROWS_FORMAT = "ray_soup.coefficients/2"
"""The format of a file with groups of rows, which readers of the first format refuse."""
STATISTICS = "statistics/"


def to_x(y: NDArray[np.float64], norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute x = y / n, and 0 where a direction is zero: float64 [K, B] each."""
    return np.divide(y, norms, out=np.zeros_like(y), where=norms > 0)


def to_coefficients(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the coefficients of the ingredients from those of the directions: float64 [K, B] each."""
    coefficients: NDArray[np.float64] = x + (1 - x.sum(axis=0, keepdims=True)) / len(x)
    return coefficients


class Parametrization(Protocol):
    """The map from coordinates y to coefficients; y = 0 gives the uniform soup."""

    @property
    def norms(self) -> NDArray[np.float64]:
        """Norms of the directions, float64 [m, B]."""

    @property
    def learns_factor(self) -> bool:
        """Whether a factor on the logits is learned too."""

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute what the optimizer moves from the unit-scaled coordinates y: float64 [m, B] each."""

    def to_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the unit-scaled coordinates from what the optimizer moves: float64 [m, B] each."""

    def x(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the factors x of the directions from y: float64 [m, B] each."""

    def gradient(self, y: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dy from y and dL/dx: float64 [m, B] each."""

    def coefficients(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from y: float64 [m, B] each."""


class _Plain:
    """What the optimizer moves are the coordinates themselves."""

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return y."""
        return y

    def to_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return y."""
        return y


@dataclass(frozen=True)
class Affine(_Plain):
    """The parametrization of MEHL soups: coordinates in units of the directions' norms."""

    norms: NDArray[np.float64]
    """float64 [m, B], norms of the directions."""
    learns_factor: ClassVar[bool] = False

    def x(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute x = y / n: float64 [m, B] each."""
        return to_x(y, self.norms)

    def gradient(self, y: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dy = dL/dx / n: float64 [m, B] each."""
        return to_x(by_x, self.norms)

    def coefficients(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from y: float64 [m, B] each."""
        return to_coefficients(to_x(y, self.norms))


@dataclass(frozen=True)
class Softmax(_Plain):
    """The parametrization of learned soups (Wortsman et al. 2022): x = c = softmax(y) over all ingredients."""

    norms: NDArray[np.float64]
    """float64 [K, B], norms of the directions; only their shape is used."""
    learns_factor: ClassVar[bool] = True

    def x(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute softmax(y) over the ingredients: float64 [K, B] each."""
        powers = np.exp(y - y.max(axis=0))
        shares: NDArray[np.float64] = powers / powers.sum(axis=0)
        return shares

    def gradient(self, y: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dy = c (dL/dc - sum_j c_j dL/dc_j): float64 [K, B] each."""
        c = self.x(y)
        by_y: NDArray[np.float64] = c * (by_x - (c * by_x).sum(axis=0))
        return by_y

    def coefficients(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from y: float64 [K, B] each."""
        return self.x(y)


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a soup: with the ingredients, all that is needed to bake it."""

    values: NDArray[np.float64]
    """float64 [K, B]; each column sums to 1."""
    ingredients: tuple[str, ...]
    """Names of the K ingredients."""
    blocks: tuple[str, ...]
    """Names of the B blocks."""
    block_of: dict[str, int]
    """Block of each parameter tensor, or MEAN; of a tensor in `cuts`, the block of its first group of rows."""
    buffers: str = "average"
    """How buffers are mixed: the `policy` of mixing.buffers."""
    tied: dict[str, str] | None = None
    """Maps other names of a tensor to its first name."""
    factor: float = 1.0
    """Factor on the logits, learned with the coefficients: the inverse of the temperature."""
    factored: tuple[str, ...] = ()
    """Tensors of the last layer, which `factor` is multiplied into; empty if the model has no such layer."""
    statistics: Statistics = field(default_factory=dict)
    """Re-estimated running statistics, by buffer name; without the data, they cannot be computed from the ingredients."""
    cuts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The elements at which the groups of rows of a tensor begin, after the first; their blocks follow one another."""

    def of(self, tensor: str) -> NDArray[np.float64]:
        """Return the coefficients of a parameter tensor, float64 [K], times the factor if the tensor is in `factored`.

        Raises ValueError if groups of its rows have coefficients of their own.
        """
        if tensor in self.cuts:
            raise ValueError(f"{tensor} has coefficients for each of {len(self.cuts[tensor]) + 1} groups of rows")
        return self._column(tensor, self.block_of[tensor])

    def parts(self, tensor: str, start: int, stop: int) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
        """Yield (first, end, coefficients float64 [K]) of the runs of elements start to stop that share coefficients."""
        if tensor not in self.cuts:
            yield start, stop, self.of(tensor)
            return
        for low, high, block in groups_of(self.block_of[tensor], self.cuts[tensor], max(stop, self.cuts[tensor][-1])):
            first, end = max(low, start), min(high, stop)
            if first < end:
                yield first, end, self._column(tensor, block)

    def at(self, tensor: str, elements: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the coefficients of some elements of a parameter tensor, float64 [K, n], or [K, 1] if all have the same."""
        if tensor not in self.cuts:
            return self.of(tensor)[:, None]
        columns = [self._column(tensor, block) for block in self.blocks_of(tensor)]
        return np.stack(columns, axis=1)[:, np.searchsorted(self.cuts[tensor], elements, side="right")]

    def blocks_of(self, tensor: str) -> range:
        """Return the blocks of a parameter tensor: one, or those of its groups of rows; none if it is a plain mean."""
        block = self.block_of[tensor]
        return range(0) if block == MEAN else range(block, block + 1 + len(self.cuts.get(tensor, ())))

    def _column(self, tensor: str, block: int) -> NDArray[np.float64]:
        count = len(self.values)
        values = np.full(count, 1 / count) if block == MEAN else self.values[:, block]
        return values * self.factor if tensor in self.factored else values

    def used(self) -> list[int]:
        """Return the indices of the ingredients that have a nonzero coefficient."""
        return [int(k) for k in np.flatnonzero(self.values.any(axis=1))]

    def shares(self) -> NDArray[np.float64]:
        """Return each ingredient's mean coefficient over the blocks, float64 [K]."""
        means: NDArray[np.float64] = self.values.mean(axis=1)
        return means


def save_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Save coefficients as a safetensors file.

    The file has a tensor `coefficients` float64 [K, B], and a tensor `statistics/BUFFER` for each re-estimated running
    statistic. The metadata contains the names as JSON. Raises SoupError if the file cannot be written.
    """
    c = coefficients
    metadata = {
        "format": ROWS_FORMAT if c.cuts else FORMAT,
        "ingredients": json.dumps(c.ingredients),
        "blocks": json.dumps(c.blocks),
        "block_of": json.dumps(c.block_of),
        "buffers": c.buffers,
        "tied": json.dumps(c.tied or {}),
        "factor": json.dumps({"value": c.factor, "tensors": c.factored}),
        **({"cuts": json.dumps(c.cuts)} if c.cuts else {}),
    }
    arrays = {"coefficients": c.values, **{f"{STATISTICS}{name}": values for name, values in c.statistics.items()}}
    write_bytes(path, save({name: np.asarray(values, order="C") for name, values in arrays.items()}, metadata))


def save_table(coefficients: Coefficients, path: Path) -> None:
    """Save coefficients as a Parquet table for other tools, with one row per ingredient and block.

    Raises SoupError if the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def numbers(kind: Any, values: np.ndarray) -> Any:  # not pa.array, which imports pandas
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])

    def texts(values: tuple[str, ...]) -> Any:
        encoded = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
        return pa.Array.from_buffers(pa.string(), len(values), [None, *map(pa.py_buffer, (ends, b"".join(encoded)))])

    count, blocks = coefficients.values.shape
    names = numbers(pa.int32(), np.repeat(np.arange(count, dtype=np.int32), blocks))
    labels = numbers(pa.int32(), np.tile(np.arange(blocks, dtype=np.int32), count))
    columns = {
        "ingredient": pa.DictionaryArray.from_arrays(names, texts(coefficients.ingredients)),
        "block": pa.DictionaryArray.from_arrays(labels, texts(coefficients.blocks)),
        "coefficient": numbers(pa.float64(), coefficients.values.ravel()),
    }
    stream = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([*columns.values()], [*columns]), stream)
    write_bytes(path, stream.getvalue().to_pybytes())


class _Factor(BaseModel):
    """The factor on the logits in the metadata of a coefficients file."""

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    tensors: tuple[str, ...] = ()


class _Metadata(BaseModel):
    """The metadata of a coefficients file, parsed."""

    ingredients: Annotated[tuple[str, ...], Field(min_length=1)]
    blocks: tuple[str, ...]
    block_of: dict[str, int]
    buffers: Literal["average", "first"]
    tied: dict[str, str]
    factor: _Factor = _Factor()
    cuts: dict[str, Annotated[tuple[int, ...], Field(min_length=1)]] = {}


def load_coefficients(path: str | Path) -> Coefficients:
    """Load coefficients that `save_coefficients` wrote, and check that they describe a soup.

    >>> coefficients = ray_soup.load_coefficients("soup/coefficients.safetensors")
    >>> coefficients.ingredients, coefficients.values.shape  # ingredients, blocks
    (('model_0', 'model_1', 'model_2', 'model_3'), (4, 1))

    Raises RecipeError if the file is missing, damaged or in another format, if the array does not have the rows and columns
    that the metadata names, or if a column does not sum to 1.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with safe_open(path, "np") as file:
            found: dict[str, str] = file.metadata() or {}
            if found.get("format") not in (FORMAT, ROWS_FORMAT):
                raise RecipeError(
                    f"{path} has the format {found.get('format')!r}; expected {FORMAT!r}. Use a coefficients file "
                    "that ray_soup wrote."
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        known = {key: value if key == "buffers" else json_value(value) for key, value in found.items() if key != "format"}
        metadata = _Metadata.model_validate(known)
        if bool(metadata.cuts) != (found["format"] == ROWS_FORMAT):
            raise ValueError(f"groups of rows belong to the format {ROWS_FORMAT}")
        values = arrays.pop("coefficients", None)
        fault = "no tensor 'coefficients'" if values is None else _fault(values, metadata, arrays)
        if values is None or fault is not None:
            raise ValueError(fault)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error)
    else:
        statistics = {name.removeprefix(STATISTICS): array for name, array in arrays.items()}
        return Coefficients(
            values, metadata.ingredients, metadata.blocks, metadata.block_of, metadata.buffers, metadata.tied,
            metadata.factor.value, metadata.factor.tensors, statistics, metadata.cuts,
        )  # fmt: skip
    raise RecipeError(f"{path} cannot be read as coefficients ({reason}). Use a coefficients file that ray_soup wrote.")


def _fault(values: NDArray[Any], metadata: _Metadata, others: dict[str, NDArray[Any]]) -> str | None:
    """Say what is wrong with the array of a coefficients file; None if nothing is."""
    ingredients, blocks, block_of = metadata.ingredients, metadata.blocks, metadata.block_of
    shape = (len(ingredients), len(blocks))
    if values.dtype != np.float64 or values.shape != shape:
        return f"found {values.dtype} {list(values.shape)}; expected float64 {list(shape)} for its ingredients and blocks"
    if len(set(ingredients)) < len(ingredients):
        return "an ingredient is named twice"
    if not np.isfinite(values).all():
        return "a coefficient is not finite"
    off, size = np.abs(values.sum(axis=0) - 1), np.abs(values).sum(axis=0)
    if (off > SUM_TOLERANCE * np.maximum(size, 1)).any():  # large terms of both signs cancel only up to their own rounding
        return f"the coefficients of a block sum to 1 only within {off.max():.1e}; expected {SUM_TOLERANCE:.0e}"
    wrong = next((tensor for tensor, block in block_of.items() if not MEAN <= block < len(blocks)), None)
    if wrong is not None:
        return f"the tensor {wrong} is in block {block_of[wrong]} of {len(blocks)}"
    for tensor, cuts in metadata.cuts.items():
        first = block_of.get(tensor, MEAN)
        if first == MEAN or first + len(cuts) >= len(blocks):
            return f"the tensor {tensor} is cut into {len(cuts) + 1} groups of rows, which are no blocks"
        if any(low >= high for low, high in itertools.pairwise((0, *cuts))):
            return f"the groups of rows of the tensor {tensor} begin at the elements {list(cuts)}"
    wrong = next((tensor for tensor in metadata.factor.tensors if tensor not in block_of), None)
    if wrong is not None:
        return f"the factor is for a tensor {wrong}, which is in no block"
    wrong = next((n for n, array in others.items() if not n.startswith(STATISTICS) or not np.isfinite(array).all()), None)
    return None if wrong is None else f"the tensor {wrong!r} is no running statistic, or is not finite"


def check_covers(coefficients: Coefficients, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Check that coefficients are for a model with tensors of these shapes: each has a block, or is a buffer.

    Args:
        coefficients: read from `path`.
        shapes: shapes of the model's tensors.
        path: for the message.

    Raises RecipeError.
    """
    block_of, statistics = coefficients.block_of, coefficients.statistics
    fault = next((f"a tensor {name}, which the model does not have" for name in block_of if name not in shapes), None)
    for name, cuts in coefficients.cuts.items():
        shape = shapes.get(name, (1,))
        if cuts[-1] >= math.prod(shape) or any(cut % math.prod(shape[1:]) for cut in cuts):
            fault = (
                fault or f"groups of rows of {name} that begin at the elements {list(cuts)}, and not within {list(shape)}"
            )
    for name, values in statistics.items():
        if name not in shapes or name in block_of or values.size != math.prod(shapes[name]):
            fault = fault or f"running statistics {name} {list(values.shape)}, which do not fit the model"
    if fault is not None:
        raise RecipeError(f"{path} is for another model: it has {fault}. Restore the file of the same run.")
