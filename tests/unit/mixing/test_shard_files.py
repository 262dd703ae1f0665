"""Files of a model that threads write: what they have hashed meanwhile is the hash of the files."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup.io.formats import name_of
from ray_soup.io.hashing import forget_written, sha256_written
from ray_soup.mixing import shard_files
from ray_soup.mixing.bake import overwrite_tensors
from ray_soup.mixing.shard_files import ShardWriter, plan_files

TENSORS = {
    "a": torch.arange(700, dtype=torch.bfloat16),
    "b": torch.arange(900.0),
    "empty": torch.zeros(0),
    "steps": torch.tensor([3]),
    "c": torch.arange(300, dtype=torch.float16),
}


def write(path: Path, order: int, shard_size: int | None = None) -> list[Path]:
    """Write TENSORS from three threads in ranges of 100 elements, shuffled by `order` unless it is 0; return the files."""
    dtypes = {name: name_of(tensor.dtype) for name, tensor in TENSORS.items()}
    files = plan_files({name: tuple(tensor.shape) for name, tensor in TENSORS.items()}, dtypes, path, shard_size, {})
    ranges = [(name, start) for name in files.places() for start in range(0, len(TENSORS[name]), 100)]
    if order:
        random.Random(order).shuffle(ranges)
    with ShardWriter(files) as writer, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: writer.write(*one, TENSORS[one[0]][one[1] : one[1] + 100]), ranges))
        writer.sync()
    return list(files.files)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("shard_size", [None, 2000])
@pytest.mark.parametrize("order", range(6))
def test_what_was_written_has_the_hash_of_the_file_in_any_order(order: int, shard_size: int | None, tmp_path: Path) -> None:
    found = write(tmp_path / "m.safetensors", order, shard_size)
    assert len(found) == (1 if shard_size is None else 3)
    for path in found:
        assert forget_written(path) == digest(path)
        assert forget_written(path) is None
    loaded = {name: tensor for path in found for name, tensor in load_file(path).items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_is_read_if_too_much_was_written_out_of_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "WAITING_BYTES", 500)
    (path,) = write(tmp_path / "m.safetensors", order=1)
    assert sha256_written(path) == digest(path)
    write(path, order=1)
    assert forget_written(path) is None


def test_a_file_that_was_changed_after_it_was_written_is_read(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "m.safetensors", order=0)
    before = digest(path)
    overwrite_tensors({"b": np.zeros(900, np.float32)}, path)
    assert sha256_written(path) == digest(path) != before
    (path,) = write(path, order=0)
    path.write_bytes(b"another")
    assert sha256_written(path) == digest(path)


def test_a_file_is_read_if_a_range_was_written_twice(tmp_path: Path) -> None:
    files = plan_files({"a": (4,)}, {"a": "float32"}, tmp_path / "m.safetensors", None, {})
    with ShardWriter(files) as writer:
        writer.write("a", 0, torch.ones(4))
        writer.write("a", 1, torch.zeros(1))
    assert sha256_written(files.path) == digest(files.path)


def test_an_incomplete_file_has_no_hash(tmp_path: Path) -> None:
    files = plan_files({"a": (4,)}, {"a": "float32"}, tmp_path / "m.safetensors", None, {})
    with ShardWriter(files) as writer:
        writer.write("a", 0, torch.ones(3))
    assert forget_written(files.path) is None
