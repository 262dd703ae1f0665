from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError
from ray_soup.io.find import find_checkpoints
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import drain
from ray_soup.mixing import build_store
from ray_soup.mixing.blocks import Layout, layout_of, partition
from ray_soup.mixing.directions import CHUNK, has_store, open_store
from ray_soup.mixing.kernels_int4 import pack
from ray_soup.mixing.store_format import GROUP, GROUP_BYTES, StoreRecord
from tests.tiny import Tiny
from tests.unit.mixing.stores import bound, dense, int4_elements, make_store, stored_directions


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-7), ("bfloat16", 2**-8), ("int8", 1 / 254), ("int4", 1 / 8)])
def test_center_directions_and_norms_are_the_formulas(zoo: Path, dtype: str, error: float) -> None:
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    vectors = dense(zoo / "zoo", layout)
    np.testing.assert_array_equal(store.center, vectors.mean(axis=0).astype(np.float32))
    exact = vectors - vectors.mean(axis=0)
    unit = np.abs(exact).max() if dtype.startswith("int") else np.abs(exact)
    assert (np.abs(stored_directions(store) - exact) <= error * 1.01 * unit + 1e-9).all()
    for blocks in ("tensor", "layer", "model"):
        parts, norms = store.blocks(partition(layout, blocks))
        for b in range(parts.count):
            columns = np.repeat(parts.block, layout.sizes) == b
            np.testing.assert_allclose(norms[:, b], np.linalg.norm(exact[:, columns], axis=1), rtol=1e-6)


def test_invariant_blocks_have_no_coefficient_and_take_no_memory(zoo: Path) -> None:
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout)
    assert [n for n, moves in zip(layout.names, store.variant, strict=True) if not moves] == ["unused"]
    parts, norms = store.blocks(partition(layout, "tensor"))
    assert "unused" not in parts.names
    assert norms.shape == (8, parts.count)
    assert (norms > 0).all()
    start = layout.offsets[layout.names.index("unused")]
    pieces = store.pieces(parts, 0, layout.numel)
    assert not ((pieces[:, 0] <= start) & (start < pieces[:, 1])).any()
    assert (pieces[:, 1] - pieces[:, 0]).sum() == layout.numel - 7
    assert store.row_bytes == 4 * (layout.numel - 7)


def test_equal_values_in_different_dtypes_are_invariant(tmp_path: Path) -> None:
    frozen, moved = torch.randn(1000), torch.randn(1000)
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.bfloat16)):
        save_file({"frozen": frozen.to(dtype), "moved": moved + k}, tmp_path / f"{k}.safetensors")
    store = make_store(str(tmp_path), Layout(("frozen", "moved"), ((1000,), (1000,))))
    assert store.variant.tolist() == [False, True]


def test_every_byte_is_read_once_and_hashed(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range is hashed while it is in the processor's cache; an open store is not read again."""
    layout = layout_of(Tiny())
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build_store, "RANGE_BYTES", 8 * 4 * CHUNK)
    read: Counter[str] = Counter()
    original = Ingredient.read

    def counting(self: Ingredient, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        part = original(self, name, start, stop)
        read[self.path] += part.numel() * part.itemsize
        return part

    monkeypatch.setattr(Ingredient, "read", counting)
    store = make_store(str(zoo / "zoo"), layout)
    assert len(read) == 8
    assert set(read.values()) == {4 * layout.numel}
    files = find_checkpoints(str(zoo / "zoo"))
    assert list(store.sha256) == [sha256_file(f) for f in files]
    read.clear()
    again = make_store(str(zoo / "zoo"), layout)
    assert not read
    assert again.hold is not None
    assert store.hold is not None
    assert again.hold.path == store.hold.path


def test_has_store_says_whether_the_cache_has_it(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    layout = layout_of(Tiny())
    ingredients = bound(str(zoo / "zoo"), layout)
    assert not has_store(ingredients, layout, "int8")
    drain(open_store(ingredients, layout, "int8"))
    assert has_store(ingredients, layout, "int8")
    assert not has_store(ingredients, layout, "float32")
    assert not has_store(ingredients[1:], layout, "int8")


def test_a_file_that_replaces_another_of_equal_size_and_time_has_its_own_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    layout = layout_of(torch.nn.Linear(3, 3))
    sha256 = []
    for turn in range(2):
        for k in range(2):
            file = tmp_path / f"m{k}.safetensors"
            save_file({"weight": torch.full((3, 3), float(k + turn)), "bias": torch.zeros(3)}, file)
            os.utime(file, ns=(0, 0))
        sha256.append(make_store(str(tmp_path / "m*"), layout).sha256)
        assert sha256[-1] == tuple(sha256_file(str(tmp_path / f"m{k}.safetensors")) for k in range(2))
    assert sha256[0] != sha256[1]


def test_progress_ends_at_the_size_of_all_ingredients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    for k in range(2):
        save_file({"a": torch.full((100,), float(k)), "b": torch.zeros(7)}, tmp_path / f"{k}.safetensors")
    layout = Layout(("a", "b"), ((100,), (7,)))
    ingredients = bound(str(tmp_path / "*.safetensors"), layout)
    total = sum(i.nbytes for i in ingredients)
    assert list(open_store(ingredients, layout, "float32")) == [(800, total), (856, total), (total, total)]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_ranges_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    size = 3 * CHUNK + 5
    layout = Layout(("a", "b"), ((size,), (7,)))
    for k in range(3):
        torch.manual_seed(k)
        save_file({"b": torch.randn(7), "a": torch.randn(size)}, tmp_path / f"{k}.safetensors")
    stores = []
    for threads, ranges in ((1, 1 << 28), (3, 1)):
        monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / f"cache{threads}"))
        monkeypatch.setattr(build_store, "RANGE_BYTES", ranges)
        stores.append(make_store(str(tmp_path / "*.safetensors"), layout, dtype, threads))
    for array in ("center", "rows", "scales"):
        np.testing.assert_array_equal(getattr(stores[0], array), getattr(stores[1], array))
    np.testing.assert_allclose(stores[0].squares, stores[1].squares, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 1000])
def test_int4_keeps_the_largest_element_of_64_and_rounds_the_others(size: int) -> None:
    direction = np.random.default_rng(size).standard_normal(size).astype(np.float32) * np.float32(1e-5)
    direction[64:128] = 0
    groups = -(-size // GROUP)
    packed = np.full(groups * GROUP_BYTES, 255, np.uint8)
    pack(direction, packed)
    found = int4_elements(packed)
    assert not found[size:].any()
    assert not found[64:128].any()
    error = np.abs(found[:size] - direction)
    for start in range(0, size, 64):
        exact, wrong = np.abs(direction[start : start + 64]), error[start : start + 64]
        assert (wrong <= exact.max() / 8 * 1.01).all()
        assert wrong[exact.argmax()] <= exact.max() / 250
    if size == 1000:
        assert np.linalg.norm(error) < 0.1 * np.linalg.norm(direction)


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-30])
def test_int4_makes_directions_too_small_for_a_scale_zero(size: float) -> None:
    packed = np.full(GROUP_BYTES, 255, np.uint8)
    pack(np.full(128, size, np.float32), packed)
    assert not packed.any()


def test_values_that_are_not_finite_are_named_and_leave_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    for k in range(3):
        tensor = torch.zeros(100)
        tensor[17] = float("nan") if k == 1 else 0.0
        save_file({"a": tensor}, tmp_path / f"{k}.safetensors")
    with pytest.raises(IngredientError, match=r"1\.safetensors: the tensor a contains nan at element 17"):
        make_store(str(tmp_path / "*.safetensors"), Layout(("a",), ((100,),)))
    assert not [p for p in (tmp_path / "cache" / "directions").iterdir() if p.is_dir()]


def test_a_record_that_is_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    record = StoreRecord(
        random.random((2, 3)).astype(np.float32), random.random((2, 2)), np.array([True, False]), ("a" * 64, "b" * 64)
    )
    record.save(tmp_path)
    loaded = StoreRecord.load(tmp_path)
    assert loaded.sha256 == record.sha256
    for name in ("scales", "squares", "variant"):
        array = getattr(loaded, name)
        assert array.dtype == getattr(record, name).dtype
        np.testing.assert_array_equal(array, getattr(record, name))
