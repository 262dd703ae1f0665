"""Exact baking of a soup of adapters as a whole model: the base plus the weighted sum of the products.

    W' = W + sum_k c_k s_k B_k A_k

Computed in float64, one range of rows at a time, and rounded once, to the dtype that is written: the base's, or `out_dtype`.
Whole tensors are weighted sums, as in mixing.bake; all other tensors are those of the base, bit for bit. Two tensors that
the base ties are written separately if adapters change one of them alone, as PEFT computes.

Shapes: W [outputs, inputs], or its transpose in layers that store it so (embeddings, Conv1D).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ray_soup.io.formats import name_of
from ray_soup.io.ingredient import Ingredient, check_unchanged
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.mixing.adapter_bake import factors_of, finite, positions, scaled
from ray_soup.mixing.bake import RANGE, as_tensor, mix_range, too_large
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.shard_files import ShardWriter, plan_files


@dataclass(frozen=True, eq=False)
class Range:
    """Elements of a tensor of the merged model."""

    start: int
    """The first of them in the tensor."""
    written: torch.Tensor
    """Their values [n], in the dtype that is written."""
    exact: torch.Tensor
    """The same before rounding, float64 [n]; equal to `written` where the base is copied."""
    change: float
    """Sum of the squares of what the adapters add."""


@dataclass(frozen=True, eq=False)
class MergedSoup:
    """A soup of adapters as a whole model, whose tensors are computed one after another."""

    coefficients: Coefficients
    ingredients: Sequence[Ingredient]
    """The K lifted ingredients that the coefficients are for."""
    group: AdapterSet
    """The set that these belong to."""
    transposed: Collection[str]
    """Modules that store the transpose of W."""
    ties: Mapping[str, str]
    """Maps other names of tied tensors of the base to their first names."""
    out_dtype: str = "keep"
    """Dtype of the floats, or `keep` for those of the base."""

    @cached_property
    def changed(self) -> dict[str, str]:
        """The modules that adapters in use change, by the names of their weights."""
        used = positions(self.coefficients, self.ingredients)
        return {f"{name}.weight": name for name, one in self.group.modules.items() if any(one.ranks[k] for k in used)}

    @cached_property
    def whole(self) -> dict[str, str]:
        """The lifted names of whole tensors that adapters in use contain, by their names in the base."""
        used, others = positions(self.coefficients, self.ingredients), scaled(self.coefficients)
        return {
            tensor.base: name
            for name, tensor in self.group.whole.items()
            if name in others or any(tensor.stored[k] is not None for k in used)
        }

    @property
    def names(self) -> list[str]:
        """The names of all tensors: those of the base, heads that it lacks, and tied tensors that differ now."""
        base = self.group.base.tensors
        heads = [t.base for t in self.group.whole.values() if t.source not in base]
        apart = [alias for alias, first in self.ties.items() if self._changes_one(alias, first)]
        return list(dict.fromkeys([*base, *heads, *apart]))

    def _changes_one(self, alias: str, first: str) -> bool:
        """Return whether adapters change one of two tied tensors, or both in different ways."""
        saved = {base for base, name in self.whole.items() if self.group.whole[name].saved}
        return any(name in self.changed or name in saved for name in (alias, first))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        base, source = self.group.base.tensors, self.group.tied.get(name, name)
        if source in base:
            return tuple(base[source].shape)
        return next(t.shape for t in self.group.whole.values() if t.base == name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is written in; heads that the base lacks have the dtype of most of its tensors."""
        base, source = self.group.base.tensors, self.group.tied.get(name, name)
        usual = Counter(info.dtype for info in base.values() if info.dtype.is_floating_point).most_common(1)[0][0]
        found: torch.dtype = base[source].dtype if source in base else usual
        if self.out_dtype == "keep" or not found.is_floating_point:
            return found
        chosen: torch.dtype = getattr(torch, self.out_dtype)
        return chosen

    def ranges(self, name: str) -> Iterator[Range]:
        """Compute a tensor, range by range. Raises IngredientError if a value is not finite."""
        shape, dtype = self.shape(name), self.dtype(name)
        size, columns = math.prod(shape), math.prod(shape[1:])
        b, a = self._factors(name) if name in self.changed else (None, None)
        step = max(1, RANGE // max(1, columns)) * max(1, columns)
        for start in range(0, size, step):
            stop = min(start + step, size)
            values, change = self._before(name, start, stop, dtype), 0.0
            if b is not None and a is not None:
                delta = (b[start // columns : stop // columns] @ a).reshape(-1)
                values, change = values.double() + delta, float(delta.square().sum())
            written = values.to(dtype)
            if not torch.isfinite(written).all():
                finite(values, self.group, None, name)
                raise too_large(name, name_of(dtype))
            yield Range(start, written, values, change)

    def slack(self, name: str, part: Range) -> torch.Tensor:
        """Return a bound of the rounding error of `part.exact`, float64 [n]; zeros for a tensor without products."""
        if name not in self.changed:
            return torch.zeros(len(part.written), dtype=torch.float64)
        b, a = self._factors(name)
        rows = slice(part.start // a.shape[1], (part.start + len(part.written)) // a.shape[1])
        sums = part.exact.abs() + (b[rows].abs() @ a.abs()).reshape(-1)
        return (len(a) + 4) * 2.0**-53 * sums

    def _before(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return elements of a tensor without the products: the base's own, or a weighted sum in float64."""
        source = self.group.tied.get(name, name)
        shared = self.whole.get(source)
        own = self.whole.get(name) or (shared if shared and not self.group.whole[shared].saved else None)
        if own is None:
            return self.group.base.read(source, start, stop)
        wide = torch.float64 if name in self.changed else dtype
        return as_tensor(mix_range(self.ingredients, own, self.coefficients.of(own), start, stop, name_of(wide)))

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two factors of the change of a weight in the layout of the file, float64 [rows, R] and [R, columns]."""
        module = self.changed[name]
        a, b = factors_of(self.coefficients, self.ingredients, self.group, module)
        a = a.double().flatten(1)
        return (a.T.contiguous(), b.T.contiguous()) if module in self.transposed else (b, a)


def bake_merged(
    soup: MergedSoup, path: Path, progress: CountCallback = no_count, shard_size: int | None = None
) -> tuple[Path, float | None]:
    """Write a soup of adapters as a whole model, in safetensors.

    Args:
        soup: the soup.
        path: the file to write; shards are stored beside it, as by mixing.bake.
        progress: called with the tensors written so far and in total.
        shard_size: maximum bytes of tensors per file; None: one file.

    Returns:
        The file to load the model from, and the Frobenius norm of what rounding took from all changed weights, relative to
        their changes; None if no weight is changed.

    Raises SoupError if the files cannot be written, IngredientError if a value is not finite or an ingredient has changed.
    """
    names, base = soup.names, soup.group.base
    shapes, dtypes = {name: soup.shape(name) for name in names}, {name: name_of(soup.dtype(name)) for name in names}
    tied = {alias: first for alias, first in soup.group.tied.items() if alias not in shapes}
    files, lost, total = plan_files(shapes, dtypes, path, shard_size, tied), 0.0, 0.0
    try:
        with files.removed_on_error():
            with ShardWriter(files) as writer:
                for done, name in enumerate(names):
                    for part in soup.ranges(name):
                        writer.write(name, part.start, part.written)
                        if part.change:
                            lost += float((part.written.double() - part.exact).square().sum())
                            total += part.change
                    progress(done + 1, len(names))
                writer.sync()
            check_unchanged([*soup.ingredients])
            base.check_unchanged()
            return files.write_index(), math.sqrt(lost / total) if total else None
    finally:
        soup.group.close()
