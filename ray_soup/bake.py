"""Coefficients + ingredients -> model files.

    theta[b] = sum_k c[k, b] theta_k[b]

accumulated in float64 in the order of the ingredients, from the original files, one range of one tensor at a time: memory
does not grow with the model or with the number of ingredients. Compression and the search leave no trace here. Buffers are
mixed too, but for running statistics that were computed anew: these lie beside the coefficients, and the model can be made
again without the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from ray_soup.checkpoints import (
    DTYPE_NAMES,
    Ingredient,
    check_finite,
    common_dtype,
    open_ingredient,
    reading_threads,
    write_at,
)
from ray_soup.coefficients import Coefficients
from ray_soup.errors import IngredientError, SoupError
from ray_soup.running_statistics import Statistics
from ray_soup.shard import buffer_of

RANGE = 1 << 20  # numbers mixed at a time by one thread
Watch = Callable[[int, int], None]
"""Is told (bytes read, bytes in all)."""


def mix_range(
    ingredients: list[Ingredient], name: str, factors: np.ndarray, start: int, stop: int, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers start to stop of sum_k factors[k] theta_k for one tensor, in this dtype.

    Raises IngredientError where the sum is not finite.
    """
    from ray_soup.kernels import mix

    wide = torch.float64 if torch.float64 in (dtype, common_dtype(ingredients, name)) else torch.float32
    parts = [ingredient.read(name, start, stop).to(wide) for ingredient in ingredients]
    addresses = np.array([part.data_ptr() for part in parts], dtype=np.uint64)
    out = torch.empty(stop - start, dtype=wide)
    finite = mix(addresses, parts[0][:0].numpy(), factors, out.numpy())
    soup = out.to(dtype)
    if not finite or (dtype != wide and not torch.isfinite(soup).all()):
        check_finite(ingredients, name, start, parts)
        raise IngredientError(
            f"The soup's tensor {name} does not fit into {dtype}: its numbers are too large. Set out_dtype: float32."
        )
    return soup


def soup_buffer(coefficients: Coefficients, used: list[Ingredient], name: str) -> torch.Tensor:
    """The soup's buffer `name`, flat: of the running statistics that were computed anew, else of the ingredients `used`."""
    if name in coefficients.statistics:
        return torch.from_numpy(coefficients.statistics[name]).reshape(-1)
    return buffer_of(used, name, coefficients.buffers)


def bake(
    coefficients: Coefficients,
    ingredients: list[Ingredient],
    path: Path,
    threads: int | None = None,
    watch: Watch = lambda done, total: None,
    out_dtype: str = "keep",
    shard_size: int | None = None,
) -> Path:
    """Write the soup to `path` as safetensors, in the ingredients' names, order and dtypes, or its floats in `out_dtype`; a
    tensor that the model ties to another is written once and named in the metadata. Where its tensors take more than
    `shard_size` bytes they lie in files of that size at most (a larger tensor has its own) beside `path`, as
    model-00001-of-00003.safetensors, and model.safetensors.index.json says where. Returns the file that stands for the
    model: `path`, or the index. What is half-written is removed.

    The ingredients must have been checked against each other. Raises SoupError if the disk is full.
    """
    first = ingredients[0]
    used = [ingredients[k] for k in coefficients.used()]
    shapes = {name: info.shape for name, info in first.tensors.items()}
    dtypes = {name: written_dtype(ingredients, name, out_dtype) for name in shapes}
    shards = _shards(shapes, dtypes, path, shard_size)
    place: dict[str, tuple[Path, int]] = {}
    headers: dict[Path, tuple[bytes, int]] = {}
    for file, names in shards.items():
        header, begins, length = _header({n: shapes[n] for n in names}, dtypes, coefficients.tied or {})
        headers[file] = header, length
        place |= {name: (file, begins[name]) for name in names}
    tasks = []
    for name in sorted(coefficients.block_of, key=lambda n: (first.tensors[n].file, first.tensors[n].offset)):
        size = math.prod(shapes[name])
        tasks += [(name, start, min(start + RANGE, size)) for start in range(0, size, RANGE)]
    total = sum(i.tensors[name].nbytes for i in ingredients for name in coefficients.block_of)
    for ingredient in ingredients:
        ingredient.check_copies()
    try:
        with ExitStack() as stack:
            files = {file: stack.enter_context(open(file, "wb")) for file in shards}
            for file, (header, length) in headers.items():
                files[file].write(header)
                files[file].truncate(length)

            writing = Lock()  # a file takes one writer at a time: in the system's own queue they would wait at full load

            def write(name: str, start: int, numbers: torch.Tensor) -> None:
                file, begin = place[name]
                with writing:
                    write_at(files[file], numbers.view(torch.uint8).numpy(), begin + start * dtypes[name].itemsize)

            def work(task: tuple[str, int, int]) -> int:
                name, start, stop = task
                write(name, start, mix_range(ingredients, name, coefficients.of(name), start, stop, dtypes[name]))
                return sum((stop - start) * i.tensors[name].dtype.itemsize for i in ingredients)

            for name in shapes:
                if name not in coefficients.block_of:
                    write(name, 0, soup_buffer(coefficients, used, name).to(dtypes[name]))
            done = 0
            with ThreadPoolExecutor(threads or reading_threads(8 * RANGE * len(ingredients))) as pool:
                for nbytes in pool.map(work, tasks):
                    done += nbytes
                    watch(done, total)
            for stream in files.values():
                stream.flush()
                os.fsync(stream.fileno())
        if path in shards:
            return path
        index = path.with_name(f"{path.name}.index.json")
        nbytes = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
        weight_map = {name: place[name][0].name for name in sorted(shapes)}
        index.write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=2))
        return index
    except BaseException as error:
        for file in shards:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SoupError(
                f"{path} could not be written ({error.strerror or error}); it takes "
                f"{sum(length for _, length in headers.values()):,} bytes. Free some room and run the same command again."
            ) from error
        raise
    finally:
        for ingredient in ingredients:
            ingredient.close()


def put(tensors: Statistics, path: Path) -> None:
    """Write these tensors over those of the model at `path`, in its dtypes."""
    model = open_ingredient(str(path))
    for name, values in tensors.items():
        info = model.tensors[name]
        with open(model.files[info.file], "r+b") as file:
            write_at(file, torch.from_numpy(values).reshape(-1).to(info.dtype).view(torch.uint8).numpy(), info.offset)
            os.fsync(file.fileno())


def written_dtype(ingredients: list[Ingredient], name: str, out_dtype: str) -> torch.dtype:
    """What a tensor is written in: floats in `out_dtype`; integers, and all for `keep`, in the ingredients' widest dtype."""
    dtype = common_dtype(ingredients, name)
    return getattr(torch, out_dtype) if dtype.is_floating_point and out_dtype != "keep" else dtype


def _shards(
    shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], path: Path, shard_size: int | None
) -> dict[Path, list[str]]:
    """The tensors of each file, in their order."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtypes[name].itemsize
        if shard_size is not None and parts[-1] and filled + nbytes > shard_size:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += nbytes
    if len(parts) == 1:
        return {path: parts[0]}
    return {path.with_name(f"{path.stem}-{n + 1:05d}-of-{len(parts):05d}{path.suffix}"): p for n, p in enumerate(parts)}


def _header(
    shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype], tied: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The beginning of a safetensors file; where in it each tensor begins, widest dtypes first so that all are aligned;
    and its length in bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **tied}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(shapes, key=lambda n: -dtypes[n].itemsize):
        begins[name] = end
        end += math.prod(shapes[name]) * dtypes[name].itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begins[name], end]
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end
