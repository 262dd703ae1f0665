from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup import checkpoints, directions
from ray_soup.blocks import Layout, layout_of, partition
from ray_soup.cache import drained
from ray_soup.checkpoints import open_ingredients, sha256_file
from ray_soup.directions import DirectionStore, open_store
from ray_soup.errors import IngredientError
from tests.tiny import Tiny


def make_store(pattern: str, layout: Layout, dtype: str = "float32", threads: int = 2) -> DirectionStore:
    ingredients = open_ingredients(pattern)
    checkpoints.check_together(ingredients, layout.state_shapes, layout.tied)
    return drained(open_store(ingredients, layout, dtype, threads))


def dense(pattern: Path, layout: Layout) -> np.ndarray:
    """All parameter vectors, float64 [K, N]."""
    files = checkpoints.find_checkpoints(str(pattern))
    return np.stack([torch.cat([load_file(f)[n].flatten().double() for n in layout.names]).numpy() for f in files])


def widened(store: DirectionStore) -> np.ndarray:
    """The stored directions as float64 [K, N]."""
    rows = torch.from_numpy(np.array(store.rows))
    wide = (rows.view(torch.bfloat16) if store.dtype == "bfloat16" else rows).double().numpy()
    parts = partition(store.layout, "tensor")
    for start, stop, _, chunk in store.pieces(store.blocks(parts)[0], 0, store.layout.numel):
        wide[:, start:stop] *= store.scales[:, [chunk]]
    return wide


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-7), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_center_directions_and_norms(zoo: Path, dtype: str, error: float) -> None:
    layout = layout_of(Tiny())
    store = make_store(str(zoo / "zoo"), layout, dtype)
    vectors = dense(zoo / "zoo", layout)
    np.testing.assert_array_equal(store.center, vectors.mean(axis=0).astype(np.float32))
    exact = vectors - vectors.mean(axis=0)
    unit = np.abs(exact).max() if dtype == "int8" else np.abs(exact)
    assert (np.abs(widened(store) - exact) <= error * 1.001 * unit + 1e-9).all()
    for blocks in ("tensor", "layer", "model"):
        parts, norms = store.blocks(partition(layout, blocks))
        for b in range(parts.count):
            columns = np.repeat(parts.block, layout.sizes) == b
            np.testing.assert_allclose(norms[:, b], np.linalg.norm(exact[:, columns], axis=1), rtol=1e-6)


def test_invariant_blocks_take_no_coefficient_and_no_room(zoo: Path) -> None:
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


def test_the_same_numbers_in_another_dtype_are_invariant(tmp_path: Path) -> None:
    frozen, moved = torch.randn(1000), torch.randn(1000)
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.bfloat16)):
        save_file({"frozen": frozen.to(dtype), "moved": moved + k}, tmp_path / f"{k}.safetensors")
    store = make_store(str(tmp_path), Layout(("frozen", "moved"), ((1000,), (1000,))))
    assert store.variant.tolist() == [False, True]


def test_one_read_of_every_byte_and_the_hash_of_the_file(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one read also hashes: a range is read for its numbers and, while it is cached, for its hash."""
    layout = layout_of(Tiny())
    monkeypatch.setenv("RAY_SOUP_CACHE", str(zoo / "cache_one_read"))
    monkeypatch.setattr(directions, "RANGE_BYTES", 8 * 4 * directions.CHUNK)
    read: Counter[int] = Counter()
    original = checkpoints.Ingredient.read

    def counting(self: checkpoints.Ingredient, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        part = original(self, name, start, stop)
        read[id(self)] += part.numel() * part.itemsize
        return part

    monkeypatch.setattr(checkpoints.Ingredient, "read", counting)
    store = make_store(str(zoo / "zoo"), layout)
    assert set(read.values()) == {4 * layout.numel}
    files = checkpoints.find_checkpoints(str(zoo / "zoo"))
    assert list(store.sha256) == [sha256_file(f) for f in files]
    read.clear()
    again = make_store(str(zoo / "zoo"), layout)
    assert not read
    assert again.hold.path == store.hold.path


def test_ranges_and_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 3 * directions.CHUNK + 5
    layout = Layout(("a", "b"), ((size,), (7,)))
    for k in range(3):
        torch.manual_seed(k)
        save_file({"b": torch.randn(7), "a": torch.randn(size)}, tmp_path / f"{k}.safetensors")
    stores = []
    for threads, ranges in ((1, 1 << 28), (3, 1)):
        monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / f"cache{threads}"))
        monkeypatch.setattr(directions, "RANGE_BYTES", ranges)
        stores.append(make_store(str(tmp_path / "*.safetensors"), layout, "int8", threads))
    for array in ("center", "rows", "scales"):
        np.testing.assert_array_equal(getattr(stores[0], array), getattr(stores[1], array))
    np.testing.assert_allclose(stores[0].squares, stores[1].squares, rtol=1e-12)


def test_numbers_that_are_not_finite_are_named_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    for k in range(3):
        tensor = torch.zeros(100)
        tensor[17] = float("nan") if k == 1 else 0.0
        save_file({"a": tensor}, tmp_path / f"{k}.safetensors")
    with pytest.raises(IngredientError, match=r"1\.safetensors: the tensor a holds nan at number 17"):
        make_store(str(tmp_path / "*.safetensors"), Layout(("a",), ((100,),)))
    assert not [p for p in (tmp_path / "cache" / "directions").iterdir() if p.is_dir()]
