"""Center and compressed directions of a set of ingredients, memory-mapped.

    center        theta_bar = mean of all ingredients
    direction     d_k = theta_k - theta_bar,  stored as float32, bfloat16, or int8 with a scale per ingredient and chunk

A store is made in one read of every ingredient, range by range over all of them at once, so that memory does not grow with
their number. It is cut into chunks inside each tensor and knows the norms of whole tensors: one store serves every partition
into blocks. It lies in the node's cache under a name made of the ingredients' paths, sizes and times of change.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ray_soup.blocks import Layout, Partition
from ray_soup.cache import InUse, cached, content_key, lookup
from ray_soup.checkpoints import (
    Ingredient,
    StreamingHash,
    check_finite,
    combined_sha256,
    common_dtype,
    sha256_file,
    write_at,
)
from ray_soup.errors import IngredientError

FORMAT = 1
CHUNK = 16384  # numbers that share a scale; 0.02 % on top of int8
RANGE_BYTES = 1 << 28  # of all ingredients together, worked on at a time
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}  # bfloat16 as its bits


@dataclass(frozen=True)
class DirectionStore:
    """An opened store. `rows` [K, N] and `center` [N] are maps of files; nothing is read before it is used."""

    hold: InUse
    layout: Layout
    dtype: str
    center: np.ndarray
    rows: np.ndarray
    scales: np.ndarray
    """float32 [K, chunks]."""
    squares: np.ndarray
    """float64 [K, tensors]: squared norms of the uncompressed directions."""
    variant: np.ndarray
    """bool [tensors]: False where all ingredients hold the same numbers, up to the rounding of their dtype."""
    sha256: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one direction, the invariant tensors left out."""
        return int(self.layout.sizes[self.variant].sum()) * self.rows.itemsize

    def blocks(self, partition: Partition) -> tuple[Partition, np.ndarray]:
        """The partition without its invariant blocks (tensors of those: block -1), and the norms float64 [K, B]."""
        kept = np.unique(partition.block[self.variant])
        number = np.full(partition.count, -1, dtype=np.int64)
        number[kept] = np.arange(len(kept))
        names = tuple(partition.names[b] for b in kept)
        squares = partition.sum_tensors(np.where(self.variant, self.squares, 0.0))[:, kept]
        return Partition(names, number[partition.block]), np.sqrt(squares)

    def pieces(self, partition: Partition, low: int, high: int) -> np.ndarray:
        """What of the parameter vector's numbers low to high takes directions, int64 [P, 4]: start, stop, block of the
        partition without invariant blocks, chunk. A piece lies in one chunk."""
        pieces = []
        for t, (start, stop, first) in enumerate(
            zip(self.layout.offsets, self.layout.offsets[1:], _first_chunks(self.layout), strict=False)
        ):
            if not self.variant[t] or partition.block[t] < 0:
                continue
            for c in range((stop - start + CHUNK - 1) // CHUNK):
                s, e = max(start + c * CHUNK, low), min(start + (c + 1) * CHUNK, stop, high)
                if s < e:
                    pieces.append((s, e, partition.block[t], first + c))
        return np.array(pieces, dtype=np.int64).reshape(-1, 4)


def _first_chunks(layout: Layout) -> np.ndarray:
    """The number of each tensor's first chunk, and the count of all: int64 [tensors + 1]."""
    return np.concatenate([[0], np.cumsum((layout.sizes + CHUNK - 1) // CHUNK)]).astype(np.int64)


def open_store(
    ingredients: list[Ingredient], layout: Layout, dtype: str, threads: int = 1
) -> Generator[tuple[int, int], None, DirectionStore]:
    """Yields (bytes done, bytes in all) while the store is made, if this node has none; the value of the generator is the
    DirectionStore. Raises IngredientError for numbers that are not finite, SoupError if the disk is too small."""
    key = _key(ingredients, layout, dtype)
    nbytes = layout.numel * (4 + len(ingredients) * np.dtype(DTYPES[dtype]).itemsize)
    hold = yield from cached("directions", key, nbytes, lambda folder: _make(folder, ingredients, layout, dtype, threads))
    folder = hold.path
    arrays = np.load(folder / "arrays.npz")
    shape = (len(ingredients), layout.numel)
    return DirectionStore(
        hold,
        layout,
        dtype,
        np.memmap(folder / "center.bin", np.float32, "r", shape=(layout.numel,)),
        np.memmap(folder / "rows.bin", DTYPES[dtype], "r", shape=shape),
        arrays["scales"],
        arrays["squares"],
        arrays["variant"],
        tuple(json.loads((folder / "sha256.json").read_text())),
    )


def has_store(ingredients: list[Ingredient], layout: Layout, dtype: str) -> bool:
    """Whether this node has the store already."""
    hold = lookup("directions", _key(ingredients, layout, dtype))
    if hold is None:
        return False
    hold.close()
    return True


def _key(ingredients: list[Ingredient], layout: Layout, dtype: str) -> str:
    return content_key(FORMAT, CHUNK, dtype, [i.identity for i in ingredients], layout.names, layout.shapes)


def _make(
    folder: Path, ingredients: list[Ingredient], layout: Layout, dtype: str, threads: int
) -> Iterator[tuple[int, int]]:
    from ray_soup.kernels import center_and_directions

    count = len(ingredients)
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    chunks = _first_chunks(layout)
    scales = np.zeros((count, chunks[-1]), np.float32)
    squares = np.zeros((count + 1, len(layout.names)), np.float64)
    hashes = [[StreamingHash(i.source(f), size) for f, size in enumerate(i.sizes)] for i in ingredients]
    range_numbers = max(CHUNK, RANGE_BYTES // (4 * count) // CHUNK * CHUNK)
    total = sum(i.nbytes for i in ingredients)
    done = dropped = 0
    with (
        open(folder / "center.bin", "wb") as center_file,
        open(folder / "rows.bin", "wb") as rows_file,
        ThreadPoolExecutor(threads) as pool,
        ThreadPoolExecutor(1) as writer,  # a file takes one at a time; what is written, the next range is read beside
    ):
        center_file.truncate(layout.numel * 4)
        rows_file.truncate(count * layout.numel * itemsize)  # a hole: what is never written takes no room

        def read(k: int, tensor: int, start: int, stop: int) -> torch.Tensor:
            """Also hashes what it read, while it is in the processor's cache."""
            info = ingredients[k].tensors[layout.names[tensor]]
            part = ingredients[k].read(layout.names[tensor], start, stop)
            if info.stride is None:
                offset = info.offset + start * info.dtype.itemsize
                hashes[k][info.file].update(offset, memoryview(part.view(torch.uint8).numpy()))
            return part

        def write(center: np.ndarray, rows: np.ndarray, position: int) -> None:
            write_at(center_file, center, position * 4)
            for k, row in enumerate(rows):
                if row.any():
                    write_at(rows_file, row, (k * layout.numel + position) * itemsize)

        written = writer.submit(lambda: None)
        for tensor in _in_file_order(ingredients[0], layout):
            name, size = layout.names[tensor], int(layout.sizes[tensor])
            wide = torch.float64 if common_dtype(ingredients, name) == torch.float64 else torch.float32
            for start in range(0, size, range_numbers):
                stop = min(start + range_numbers, size)
                parts = [
                    part.to(wide) for part in pool.map(lambda k, t=tensor, s=start, e=stop: read(k, t, s, e), range(count))
                ]
                center = np.empty(stop - start, np.float32)
                rows = np.empty((count, stop - start), DTYPES[dtype])
                first_chunk = int(chunks[tensor]) + start // CHUNK

                def work(low: int, high: int, parts=parts, center=center, rows=rows, first=first_chunk) -> tuple:
                    addresses = np.array([p.data_ptr() + low * p.itemsize for p in parts], dtype=np.uint64)
                    span = slice(first + low // CHUNK, first + (high + CHUNK - 1) // CHUNK)
                    square = np.zeros(count + 1)
                    finite = center_and_directions(
                        addresses, parts[0][:0].numpy(), CHUNK, center[low:high], rows[:, low:high],
                        scales[:, span], square,
                    )  # fmt: skip
                    return finite, square

                cuts = _cuts(stop - start, threads)
                for finite, square in pool.map(work, cuts[:-1], cuts[1:]):
                    if not finite:
                        check_finite(ingredients, name, start, parts)
                        raise IngredientError(f"The mean of the tensor {name} is not finite: its numbers are too large.")
                    squares[:, tensor] += square
                written.result()
                written = writer.submit(write, center, rows, int(layout.offsets[tensor]) + start)
                done += sum(p.numel() * i.tensors[name].dtype.itemsize for p, i in zip(parts, ingredients, strict=True))
                if done - dropped > 1 << 30:
                    dropped = done
                    for ingredient in ingredients:
                        ingredient.drop_pages()
                yield done, total
        digests = list(pool.map(_digests, ingredients, hashes))
        written.result()
    for ingredient in ingredients:
        ingredient.check_copies()
        ingredient.close()
    tolerance = np.array([_rounding(ingredients, name) for name in layout.names])
    variant = (squares[:-1] > tolerance**2 * squares[-1]).any(axis=0)
    np.savez(folder / "arrays.npz", scales=scales, squares=squares[:-1], variant=variant)
    (folder / "sha256.json").write_text(json.dumps(digests))
    yield total, total


def _cuts(size: int, threads: int) -> list[int]:
    """Where to cut `size` numbers into a part for each thread, at chunks."""
    step = max(1, -(-size // CHUNK // threads)) * CHUNK
    return [*range(0, size, step), size]


def _in_file_order(ingredient: Ingredient, layout: Layout) -> list[int]:
    def place(tensor: int) -> tuple[int, int]:
        info = ingredient.tensors[layout.names[tensor]]
        return info.file, info.offset

    return sorted(range(len(layout.names)), key=place)


def _digests(ingredient: Ingredient, hashes: list[StreamingHash]) -> str:
    digests = [h.hexdigest() if h.in_order else sha256_file(f) for h, f in zip(hashes, ingredient.files, strict=True)]
    return combined_sha256(digests)


def _rounding(ingredients: list[Ingredient], name: str) -> float:
    """How far apart, relative to its size, a tensor may be in two ingredients that mean the same: nothing but the
    float64 mean's rounding where all are of one dtype, the coarser dtype's rounding where they are not."""
    dtypes = {i.tensors[name].dtype for i in ingredients}
    coarsest = max(torch.finfo(d).eps for d in dtypes)
    return coarsest if len(dtypes) > 1 else 8 * torch.finfo(torch.float64).eps
