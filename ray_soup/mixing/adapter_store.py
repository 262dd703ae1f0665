"""Directions of lifted adapters, stored once: every column of a factor B belongs to one adapter.

    theta[e] = c[k, b] value[e]        e in a column of adapter k, in block b;  value = s_k B_k
    d_k[e]   = value[e] ([e is of k] - 1/K)

so that K directions over N elements take N values, not K N. Of a whole tensor, an adapter that contains it owns its
difference from the base. Norms and inner products of directions are those of the products s_k B_k A_k, in the weights of
the model, from small matrices:

    <s_j B_j A_j, s_k B_k A_k> = sum over both ranks of (B_j^T B_k) * (A_j A_k^T)  (elementwise), times s_j s_k

Shapes: K adapters, N elements of all lifted tensors, T lifted tensors, R the sum of the ranks for a module.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.cache import cached, content_key, lookup
from ray_soup.io.disk import write_at
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import Ingredient, check_unchanged
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet, LiftedIngredient, group_of
from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.store_format import CENTER_FILE, StoreRecord

FORMAT = 1
KIND = "adapters"
VALUES_FILE, DIFFERENCES_FILE, GRAM_FILE, DIGESTS_FILE = "values.bin", "differences.bin", "gram.npz", "sha256.json"
RANGE = 1 << 24  # elements of a whole tensor that are read at a time
EQUAL = 1e-14
"""Squared norm of a direction, relative to the largest of the products, up to which it counts as rounding."""


@dataclass(frozen=True)
class AdapterStore(DirectionStore):
    """An open store of lifted adapters. `rows` is values float32 [1, N]: s_k B_k in the columns of adapter k."""

    differences: NDArray[np.float32]
    """float32 [M], for each whole tensor and each adapter that contains it: its difference from the base."""
    gram: NDArray[np.float64]
    """float64 [T, K, K], inner products of the directions in the space of the products, at the place of each B."""
    columns: dict[int, NDArray[np.int64]]
    """Owner of each column of each factor B, int64 [R], by the number of the tensor; -1 for an adapter that is not open."""
    owners: dict[int, list[tuple[int, int]]]
    """Of each whole tensor, by its number: the owners, and where their differences begin in `differences`."""
    count: int
    """K, the number of open adapters."""

    @property
    def row_bytes(self) -> int:
        """Bytes of the values and differences, divided by the number of adapters, rounded up."""
        held = sum(int(self.layout.sizes[t]) for t in self.columns) + len(self.differences)
        return -(-4 * held // self.count)

    def blocks(self, partition: Partition) -> tuple[Partition, NDArray[np.float64]]:
        """Remove the invariant blocks, as for whole models. Raises RecipeError if a tensor is cut into groups of rows."""
        check_not_cut(partition)
        return super().blocks(partition)


def check_not_cut(partition: Partition) -> None:
    """Check that no tensor of adapters is cut into groups of rows. Raises RecipeError."""
    if partition.cuts:
        raise RecipeError(
            "blocks: the rows of tensors have groups, but the ingredients are LoRA adapters, whose factors are mixed whole. "
            "Set blocks: tensor."
        )


@dataclass(frozen=True)
class _Plan:
    """What belongs to whom, for the open adapters of a set."""

    columns: dict[int, NDArray[np.int64]]
    owners: dict[int, list[tuple[int, int]]]
    differences: int
    """M, elements of all differences."""


def open_adapters(ingredients: Sequence[Ingredient], layout: Layout) -> Generator[tuple[int, int], None, AdapterStore]:
    """Open the store of these lifted ingredients; build it first if this node's cache has none.

    Yields (tensors done, tensors in total) while the store is built; the value of the generator is the AdapterStore.

    Raises IngredientError for values that are not finite, SoupError if the disk is too small.
    """
    group, positions = _group(ingredients)
    plan = _plan(group, positions, layout)
    nbytes = 4 * (2 * layout.numel + plan.differences)
    key = _key(ingredients, layout)
    hold = yield from cached(KIND, key, nbytes, lambda folder: _build(folder, ingredients, layout, plan))
    arrays = np.load(hold.path / GRAM_FILE)
    digests = json.loads((hold.path / DIGESTS_FILE).read_text(encoding="utf-8"))
    gram: NDArray[np.float64] = arrays["gram"]
    squares = np.einsum("tkk->kt", gram)
    record = StoreRecord(np.ones((1, 1), np.float32), squares, arrays["variant"], tuple(digests))
    differences = np.zeros(0, np.float32)
    if plan.differences:
        differences = np.memmap(hold.path / DIFFERENCES_FILE, np.float32, "r", shape=(plan.differences,))
    return AdapterStore(
        hold, layout, "float32", np.memmap(hold.path / CENTER_FILE, np.float32, "r", shape=(layout.numel,)),
        np.memmap(hold.path / VALUES_FILE, np.float32, "r", shape=(1, layout.numel)), record, differences, gram,
        plan.columns, plan.owners, len(positions),
    )  # fmt: skip


def has_adapters(ingredients: Sequence[Ingredient], layout: Layout) -> bool:
    """Return whether this node's cache has the store of these lifted ingredients."""
    hold = lookup(KIND, _key(ingredients, layout))
    if hold is None:
        return False
    hold.close()
    return True


def _group(ingredients: Sequence[Ingredient]) -> tuple[AdapterSet, list[int]]:
    group = group_of(ingredients)
    assert group is not None
    return group, [i.position for i in ingredients if isinstance(i, LiftedIngredient)]


def _key(ingredients: Sequence[Ingredient], layout: Layout) -> str:
    group, positions = _group(ingredients)
    known = [a.identity_here() for a in group.adapters], group.base.identity_here(), positions
    return content_key(FORMAT, *known, layout.names, layout.shapes)


def _plan(group: AdapterSet, positions: Sequence[int], layout: Layout) -> _Plan:
    number = {k: n for n, k in enumerate(positions)}
    columns: dict[int, NDArray[np.int64]] = {}
    owners: dict[int, list[tuple[int, int]]] = {}
    end = 0
    for t, name in enumerate(layout.names):
        module = group.module_of(name)
        if module is not None:
            if name == module.b:
                columns[t] = np.array([number.get(k, -1) for k in module.owners()], np.int64)
            continue
        owners[t] = []
        for k in group.whole[name].owners:
            if k in number:
                owners[t].append((number[k], end))
                end += int(layout.sizes[t])
    return _Plan(columns, owners, end)


def _build(folder: Path, ingredients: Sequence[Ingredient], layout: Layout, plan: _Plan) -> Iterator[tuple[int, int]]:
    """Build the store in an empty folder. Yields (tensors done, tensors in total)."""
    group, positions = _group(ingredients)
    total, count = len(layout.names), len(positions)
    gram = np.zeros((total, count, count))
    with (
        open(folder / CENTER_FILE, "wb") as center,
        open(folder / VALUES_FILE, "wb") as values,
        open(folder / DIFFERENCES_FILE, "wb") as differences,
    ):
        for file, size in ((center, layout.numel), (values, layout.numel), (differences, plan.differences)):
            file.truncate(4 * size)  # sparse: what is never written takes no space
        for t, (name, start, _) in enumerate(layout.spans()):
            module = group.places.get(name)
            if module is None:
                gram[t] = _write_whole(group, name, positions, plan.owners[t], (center, differences), start)
            elif name == group.modules[module].a:
                a = group.stacked_a(module).float()
                _check(a, group, positions, name)
                write_at(center, a.numpy(), 4 * start)
            else:
                b, products = _factors(group, module, positions)
                _check(b, group, positions, name)
                write_at(values, b.numpy(), 4 * start)
                write_at(center, (b / count).numpy(), 4 * start)
                gram[t] = products
            yield t + 1, total
    check_unchanged(ingredients)
    digests = hash_ingredients(ingredients)
    group.close()
    centered = _centered(gram)
    size = np.einsum("tkk->tk", gram).max(axis=1, initial=0)
    squares = np.einsum("tkk->tk", centered)
    variant = (squares > EQUAL * size[:, None]).any(axis=1)
    centered[~variant] = 0
    np.savez(folder / GRAM_FILE, gram=centered, variant=variant)
    (folder / DIGESTS_FILE).write_text(json.dumps(digests), encoding="utf-8")


def _centered(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn inner products of vectors into those of their differences from the mean: float64 [T, K, K] each."""
    rows = gram.mean(axis=2, keepdims=True)
    centered: NDArray[np.float64] = gram - rows - rows.transpose(0, 2, 1) + gram.mean(axis=(1, 2), keepdims=True)
    return centered


def _check(values: torch.Tensor, group: AdapterSet, positions: Sequence[int], name: str) -> None:
    """Check that the values of a tensor are finite in all adapters. Raises IngredientError."""
    if not torch.isfinite(values).all():
        known = [(k, n) for k in positions for n in group.adapters[k].tensors if n == name]
        bad = next((k for k, n in known if not torch.isfinite(group.adapters[k].read(n)).all()), None)
        whose = "an adapter" if bad is None else group.adapters[bad].path
        raise IngredientError(
            f"{whose}: the tensor {name} contains values that are not finite in float32. The training run diverged: exclude "
            "this adapter."
        )


def _factors(group: AdapterSet, module: str, positions: Sequence[int]) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Read the factors of a module: s_k B_k float32 [outputs, R], 0 for adapters that are not open, and the Gram matrix.

    Returns also the inner products of the products s_k B_k A_k, float64 [K, K].
    """
    one = group.modules[module]
    number = {k: n for n, k in enumerate(positions)}
    b = torch.zeros(one.b_shape[:2], dtype=torch.float64)
    a = torch.zeros(one.rank, int(np.prod(one.a_shape[1:])), dtype=torch.float64)
    member = torch.zeros(one.rank, len(positions), dtype=torch.float64)
    for k, n in number.items():
        if one.ranks[k]:
            span = one.columns(k)
            b[:, span] = group.factor_b(module, k)
            a[span] = group.factor_a(module, k).double().flatten(1)
            member[span, n] = 1
    both = (a @ a.T) * (b.T @ b)
    return b.float(), (member.T @ both @ member).numpy()


def _write_whole(
    group: AdapterSet,
    name: str,
    positions: Sequence[int],
    owners: Sequence[tuple[int, int]],
    files: tuple[IO[bytes], IO[bytes]],
    start: int,
) -> NDArray[np.float64]:
    """Write the mean and the differences from the base of a whole tensor; return the inner products, float64 [K, K]."""
    center, differences = files
    gram = np.zeros((len(positions),) * 2)
    size = int(np.prod(group.whole[name].shape))
    for low in range(0, size, RANGE):
        high = min(low + RANGE, size)
        base = group.base_of(name, low, high).double()
        parts = {}
        for n, place in owners:
            parts[n] = group.whole_of(name, positions[n], low, high).double() - base
            _check(parts[n], group, positions, name)
            write_at(differences, parts[n].float().numpy(), 4 * (place + low))
        mean = base + sum(parts.values(), torch.zeros(high - low, dtype=torch.float64)) / len(positions)
        write_at(center, mean.float().numpy(), 4 * (start + low))
        for i, one in parts.items():
            for j, other in parts.items():
                gram[i, j] += float(one @ other)
    return gram
