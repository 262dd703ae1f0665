"""Exact baking: compute model files from coefficients and ingredients.

    theta[b] = sum_k c[k, b] theta_k[b]

The sum is accumulated in float64 in the order of the ingredients, from the original files, one range of one tensor at a
time: memory does not grow with the model or with the number of ingredients. The compression that learning uses has no effect
here. Buffers are mixed too, except for re-estimated running statistics: these are saved with the coefficients, so that the
model can be baked again without the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_finite, common_dtype
from ray_soup.io.disk import reading_threads, write_at
from ray_soup.io.formats import FLOATS, dtype_of, safetensors_header
from ray_soup.io.hashing import PassingHash, forget_written, passing_hashes
from ray_soup.io.ingredient import Ingredient, check_unchanged, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.mixing.buffers import mixed_buffer
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.mixing.shard_files import ShardFiles, ShardWriter, Values, bytes_of, plan_files

RANGE = 1 << 20  # elements that a thread mixes at a time
WINDOW = 4  # ranges of each thread that are mixed before the hashes have to follow


def mix_range(
    ingredients: Sequence[Ingredient],
    name: str,
    factors: NDArray[np.float64],
    start: int,
    stop: int,
    dtype: str,
) -> Values:
    """Compute elements start to stop of sum_k factors[k] theta_k for one tensor.

    Where all ingredients have the dtype of the result, float32 or float64, this needs no torch.

    Args:
        ingredients: K ingredients, bound to the model.
        name: name of the tensor.
        factors: float64 [K].
        start: first element.
        stop: end of the range (excluded).
        dtype: torch's name of the dtype of the result.

    Returns:
        dtype [stop - start]: an array if it is float32 or float64 and no ingredient's is wider, otherwise a tensor.

    Raises IngredientError if the sum is not finite in this dtype.
    """
    from ray_soup.mixing.kernels import mix

    wide = "float64" if "float64" in (dtype, common_dtype(ingredients, name)) else "float32"
    parts = [ingredient.read_array(name, start, stop, wide) for ingredient in ingredients]
    out: NDArray[Any] = np.empty(stop - start, wide)
    finite = mix(parts, factors, out)
    if finite and dtype == wide:
        return out
    if finite and (soup := as_tensor(out).to(dtype_of(dtype))).isfinite().all():
        return soup
    check_finite(ingredients, name, start, parts)
    raise too_large(name, dtype)


def too_large(name: str, dtype: str) -> IngredientError:
    """Return the error that says that a tensor of the soup is not finite in its dtype, given by torch's name."""
    return IngredientError(
        f"The soup's tensor {name} does not fit into {dtype}: its values are too large. Set out_dtype: float32."
    )


def as_tensor(values: Values) -> torch.Tensor:
    """Return a mixed range as a tensor on the same memory."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def soup_range(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], name: str, start: int, stop: int, dtype: str
) -> Values:
    """Compute elements start to stop of a parameter tensor of the soup: dtype [stop - start].

    Every group of rows is mixed by its own coefficients. Returns and raises what `mix_range` does.
    """
    parts = [
        mix_range(ingredients, name, factors, first, end, dtype)
        for first, end, factors in coefficients.parts(name, start, stop)
    ]
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    return torch.cat([as_tensor(part) for part in parts])


def soup_buffer(coefficients: Coefficients, used: Sequence[Ingredient], name: str) -> torch.Tensor:
    """Return the soup's buffer `name`, flattened to one dimension.

    This is the re-estimated running statistic if there is one, otherwise the mix of the ingredients `used`.
    """
    if name in coefficients.statistics:
        return torch.from_numpy(coefficients.statistics[name]).reshape(-1)
    return mixed_buffer(used, name, coefficients.buffers)


def bake(
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    path: Path,
    threads: int | None = None,
    progress: CountCallback = no_count,
    out_dtype: str = "keep",
    shard_size: int | None = None,
) -> Path:
    """Write the soup as safetensors, with the tensor names, order and dtypes of the ingredients.

    The ingredients are hashed in the same pass unless their digests are remembered. A tensor that the model ties to another
    is written once and named in the metadata. A partly written model is deleted if anything fails.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: the K ingredients, bound to the model and checked against each other.
        path: the file to write, such as model.safetensors. Shards are stored beside it as
            model-00001-of-00003.safetensors, with the index model.safetensors.index.json.
        threads: number of threads that read and mix; None: as many as CPUs and memory allow.
        progress: called with the bytes read so far and in total.
        out_dtype: dtype of the floats, or `keep`.
        shard_size: maximum bytes of tensors per file; a larger tensor gets a file to itself. None: one file.

    Returns:
        The file to load the model from: `path`, or the index.

    Raises SoupError if the files cannot be written, IngredientError if a value is not finite or an ingredient has changed.
    """
    files = plan_baking(coefficients, ingredients, path, out_dtype, shard_size)
    check_copies(ingredients)
    done, total = 0, read_bytes(coefficients, ingredients, files)
    with files.removed_on_error():
        for nbytes in bake_files(coefficients, ingredients, files, threads, passing_hashes(ingredients)):
            done += nbytes
            progress(done, total)
        return files.write_index()


def plan_baking(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], path: Path, out_dtype: str, shard_size: int | None
) -> ShardFiles:
    """Plan the files of a soup's model; arguments as for `bake`."""
    shapes = {name: info.shape for name, info in ingredients[0].tensors.items()}
    dtypes = {name: written_dtype(ingredients, name, out_dtype) for name in shapes}
    return plan_files(shapes, dtypes, path, shard_size, coefficients.tied or {})


def read_bytes(coefficients: Coefficients, ingredients: Sequence[Ingredient], files: ShardFiles) -> int:
    """Return how many bytes of the ingredients' parameters are read to bake these files."""
    names = files.places().keys() & coefficients.block_of.keys()
    return sum(i.tensors[name].nbytes for i in ingredients for name in names)


def check_copies(ingredients: Sequence[Ingredient]) -> None:
    """Check that both copies of tied tensors are equal in each ingredient. Raises IngredientError if they differ."""
    for ingredient in ingredients:
        ingredient.check_copies()


def bake_files(
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    files: ShardFiles,
    threads: int | None = None,
    hashes: Sequence[PassingHash] = (),
) -> Iterator[int]:
    """Write some of the files of a soup's model, or all of them; yield the bytes read since the last time.

    The files are deleted if anything fails. Raises SoupError if they cannot be written, IngredientError if a value is not
    finite or an ingredient has changed.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: the K ingredients, bound to the model and checked against each other.
        files: the files to write, from `plan_baking`.
        threads: as for `bake`.
        hashes: of ingredients, computed while these are read.
    """
    try:
        with files.removed_on_error():
            with ShardWriter(files) as writer:
                _write_buffers(writer, coefficients, ingredients, files)
                yield from _write_parameters(writer, coefficients, ingredients, files, threads, hashes)
                writer.sync()
            check_unchanged(ingredients)
    finally:
        for ingredient in ingredients:
            ingredient.close()


def _write_buffers(
    writer: ShardWriter, coefficients: Coefficients, ingredients: Sequence[Ingredient], files: ShardFiles
) -> None:
    used = [ingredients[k] for k in coefficients.used()]
    for name in files.places():
        if name not in coefficients.block_of:
            writer.write(name, 0, soup_buffer(coefficients, used, name).to(dtype_of(files.dtypes[name])))


def _write_parameters(
    writer: ShardWriter,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    files: ShardFiles,
    threads: int | None,
    hashes: Sequence[PassingHash],
) -> Iterator[int]:
    """Mix and write the parameters, range by range in the order of the first ingredient's files; yield the bytes read.

    The hashes follow at a distance of at most two windows of ranges, so that a byte is read from the disk once.
    """
    tensors = ingredients[0].tensors
    ranges = []
    names = files.places().keys() & coefficients.block_of.keys()
    for name in sorted(names, key=lambda n: (tensors[n].file, tensors[n].place)):
        size = math.prod(tensors[name].shape)
        ranges += [(name, start, min(start + RANGE, size)) for start in range(0, size, RANGE)]

    def work(task: tuple[str, int, int]) -> int:
        name, start, stop = task
        dtype = files.dtypes[name]
        writer.write(name, start, soup_range(coefficients, ingredients, name, start, stop, dtype))
        return sum((stop - start) * i.tensors[name].itemsize for i in ingredients)

    count = threads or reading_threads(8 * RANGE * len(ingredients))
    following: list[Future[None]] = []
    widest = max((tensors[name].itemsize for name in names), default=0)
    with ThreadPoolExecutor(count) as pool:
        for first in range(0, len(ranges), WINDOW * count):
            window = ranges[first : first + WINDOW * count]
            mixed = pool.map(work, window)
            share = sum(stop - start for _, start, stop in window) * widest
            for future in following:
                future.result()
            following = [pool.submit(one.advance, share) for one in hashes]
            yield from mixed
        for future in following:
            future.result()
        list(pool.map(PassingHash.finish, hashes))
    for one in hashes:
        one.remember()


def overwrite_tensors(tensors: Statistics, path: Path) -> None:
    """Overwrite tensors of the model at `path` with these arrays, of any shape, converted to the model's dtypes."""
    model = open_ingredient(str(path))
    for number, file in enumerate(model.files):
        forget_written(Path(file))
        places, _ = safetensors_header(file, number, model.sizes[number])
        with open(file, "r+b") as stream:
            for name in places.keys() & tensors.keys():
                info = places[name]
                values = torch.from_numpy(tensors[name]).reshape(-1).to(info.dtype)
                if values.numel() != info.numel:
                    raise ValueError(f"{file}: {name} is {info}; given {tensors[name].shape}")
                write_at(stream, bytes_of(values), info.place)
            os.fsync(stream.fileno())


def written_dtype(ingredients: Sequence[Ingredient], name: str, out_dtype: str) -> str:
    """Return torch's name of the dtype that a tensor is written in.

    This is `out_dtype` for floats, unless that is `keep`, and otherwise the tensor's widest dtype among the ingredients.
    """
    dtype = common_dtype(ingredients, name)
    return dtype if out_dtype == "keep" or dtype not in FLOATS else out_dtype
