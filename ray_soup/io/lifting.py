"""Adapters of one base as ingredients of one model: the base with a single LoRA that holds all their factors.

    sum_k c_k s_k B_k A_k = [c_1 s_1 B_1, ..., c_K s_K B_K] A,    A = the rows of A_1, ..., A_K, one after another

A, whose rank is the sum of the ranks, is the same for every soup. Lifted, ingredient k has s_k B_k in its own columns of B
and zeros in the others, so that a soup of the products is a weighted sum of lifted ingredients, like any other. A whole
tensor of the base that an adapter does not contain is that of the base.

Shapes: K adapters; r_k the rank of adapter k for a module, R their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ray_soup.errors import IngredientError
from ray_soup.io.adapters import PREFIX, AdapterIngredient, as_kind
from ray_soup.io.binding import Ignored
from ray_soup.io.cache import cached, content_key
from ray_soup.io.formats import TensorInfo, dtype_of, name_of
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.progress import drain

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LiftedModule:
    """The factors of one module in all adapters."""

    a: str
    """Name of A in the file of an adapter."""
    b: str
    """Name of B."""
    ranks: tuple[int, ...]
    """r_k, 0 for an adapter without this module."""
    scales: tuple[float, ...]
    """s_k."""
    a_shape: tuple[int, ...]
    """[R, inputs], or [R, channels, height, width] of a convolution."""
    b_shape: tuple[int, ...]
    """[outputs, R], or [outputs, R, 1, 1]."""
    a_dtype: torch.dtype
    """The widest dtype of A among the adapters."""
    b_dtype: torch.dtype
    """The widest dtype of B."""

    @property
    def rank(self) -> int:
        """R, the sum of the ranks."""
        return self.b_shape[1]

    def columns(self, k: int) -> slice:
        """Return the columns of B, and the rows of A, of adapter k."""
        start = sum(self.ranks[:k])
        return slice(start, start + self.ranks[k])

    def owners(self) -> list[int]:
        """Return the adapter of each column of B, [R]."""
        return [k for k, rank in enumerate(self.ranks) for _ in range(rank)]


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the base that some adapters contain whole."""

    base: str
    """Its name in the base."""
    source: str
    """The name under which the base stores it: another one if the base ties it to another tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The widest dtype among the adapters, and the base if that is used."""
    stored: tuple[str | None, ...]
    """Its name in the file of each adapter, None where that does not contain it."""
    saved: bool
    """Whether it belongs to `modules_to_save`, of which PEFT keeps a copy; otherwise it replaces the tensor of the base."""

    @property
    def owners(self) -> list[int]:
        """The adapters that contain it."""
        return [k for k, name in enumerate(self.stored) if name is not None]


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """Adapters of one base, with all that is needed to read them as lifted ingredients."""

    adapters: tuple[AdapterIngredient, ...]
    base: Ingredient
    """The base, bound to the names of its model."""
    modules: Mapping[str, LiftedModule]
    """By the name of the module in the base."""
    whole: Mapping[str, WholeTensor]
    """By the name in the file of an adapter that contains all of them."""
    places: Mapping[str, str]
    """The module of each factor."""
    tied: Mapping[str, str]
    """Maps other names of tensors of the base to their first names."""

    @cached_property
    def base_sha256(self) -> str:
        """The SHA-256 of the base, computed when it is first needed: a base on the Hub must be there by then."""
        return digest_of(self.base)

    def infos(self) -> dict[str, TensorInfo]:
        """Return dtype and shape of each lifted tensor, by name."""
        found: dict[str, TensorInfo] = {}
        for one in self.modules.values():
            found[one.a] = TensorInfo(name_of(one.a_dtype), one.a_shape, 0, len(found))
            found[one.b] = TensorInfo(name_of(one.b_dtype), one.b_shape, 0, len(found))
        for name, tensor in self.whole.items():
            found[name] = TensorInfo(name_of(tensor.dtype), tensor.shape, 0, len(found))
        return found

    def module_of(self, tensor: str) -> LiftedModule | None:
        """Return the module that a lifted tensor is a factor of; None for a whole tensor."""
        return self.modules[self.places[tensor]] if tensor in self.places else None

    def whole_in(self, adapter: AdapterIngredient) -> dict[str, str]:
        """Return the names in the file of an adapter's whole tensors, by the first names of these tensors in the base."""
        return {n if adapter.config.saves(n) else self.tied.get(n, n): stored for n, stored in adapter.whole.items()}

    def factor_a(self, module: str, k: int) -> torch.Tensor:
        """Read A of adapter k, [r_k, ...] in its own dtype."""
        adapter, lifted = self.adapters[k], self.modules[module]
        return adapter.read(adapter.pairs[module].a).view(lifted.ranks[k], *lifted.a_shape[1:])

    def factor_b(self, module: str, k: int) -> torch.Tensor:
        """Read B of adapter k and multiply it by s_k: float64 [outputs, r_k]."""
        adapter, lifted = self.adapters[k], self.modules[module]
        return adapter.read(adapter.pairs[module].b).view(lifted.b_shape[0], lifted.ranks[k]).double() * lifted.scales[k]

    def stacked_a(self, module: str) -> torch.Tensor:
        """Read A of all adapters, one after another: [R, ...]."""
        lifted = self.modules[module]
        parts = [self.factor_a(module, k).to(lifted.a_dtype) for k, rank in enumerate(lifted.ranks) if rank]
        return torch.cat(parts)

    def lifted_b(self, module: str, k: int) -> torch.Tensor:
        """Read B of the lifted ingredient k, zero outside its own columns: float32 or float64 [outputs, R]."""
        lifted = self.modules[module]
        wide = torch.float64 if lifted.b_dtype == torch.float64 else torch.float32
        out = torch.zeros(lifted.b_shape[:2], dtype=wide)
        if lifted.ranks[k]:
            out[:, lifted.columns(k)] = self.factor_b(module, k).to(wide)
        return out

    def whole_of(self, name: str, k: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements of a whole tensor of adapter k, or of the base if that adapter does not contain it."""
        stored = self.whole[name].stored[k]
        return self.adapters[k].read(stored, start, stop) if stored else self.base_of(name, start, stop)

    def base_of(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements of a whole tensor of the base; zeros if the base has no such tensor (a new head)."""
        tensor = self.whole[name]
        if tensor.source in self.base.tensors:
            return self.base.read(tensor.source, start, stop)
        return torch.zeros((math.prod(tensor.shape) if stop is None else stop) - start)

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for ingredient in (*self.adapters, self.base):
            ingredient.close()


@dataclass(frozen=True)
class LiftedIngredient(Ingredient):
    """Adapter number `position` of a set, as an ingredient of the base with all factors.

    `tensors` states the dtype in which a soup is written; B is read wider if s_k B_k does not fit into it.
    """

    group: AdapterSet = None  # type: ignore[assignment] # always given; the fields before it have defaults
    position: int = 0

    @property
    def identity(self) -> list[Any]:
        """As for any ingredient, with the files of the base."""
        base = self.group.base
        return [*super().identity, *([f, s, v] for f, s, v in zip(base.files, base.sizes, base.versions, strict=True))]

    def identity_here(self) -> list[Any]:
        """As for any ingredient, with the base and the position in the set."""
        return [super().identity_here(), self.group.base.identity_here(), self.position]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop` of the lifted tensor `name`, as `Ingredient.read` does."""
        group = self.group
        if name in group.whole:
            return group.whole_of(name, self.position, start, stop)
        module = group.places[name]
        if name == group.modules[module].a:
            found = group.stacked_a(module)
        else:
            found = group.lifted_b(module, self.position)
        return found.reshape(-1)[start:stop]

    def read_array(self, name: str, start: int, stop: int, dtype: str) -> NDArray[Any]:
        """Read elements of the lifted tensor `name`, as `Ingredient.read_array` does."""
        array: NDArray[Any] = self.read(name, start, stop).to(dtype_of(dtype)).numpy()
        return array

    def bind(self, expected: Any, tied: Mapping[str, str], ignore: Ignored = ()) -> LiftedIngredient:
        """Return this ingredient: it has the names of its model already."""
        return self

    def check_copies(self) -> None:
        """Do nothing: copies of tied tensors were compared when the set was made."""

    def check_unchanged(self) -> None:
        """Check that no file of the adapter, nor of the base, has changed. Raises IngredientError."""
        super().check_unchanged()
        self.group.base.check_unchanged()

    def close(self) -> None:
        """Close the files of the set; reading opens them again."""
        self.group.close()


def group_of(ingredients: Sequence[Ingredient]) -> AdapterSet | None:
    """Return the set that lifted ingredients belong to; None for whole models."""
    first = ingredients[0] if ingredients else None
    return first.group if isinstance(first, LiftedIngredient) else None


def files_of(ingredients: Sequence[Ingredient]) -> list[str]:
    """Return the paths of all files that ingredients are read from; of adapters also those of their base."""
    group = group_of(ingredients)
    return [*(() if group is None else group.base.files), *(file for one in ingredients for file in one.files)]


def lifted(group: AdapterSet) -> list[LiftedIngredient]:
    """Return the adapters of a set as ingredients of one model."""
    infos = group.infos()
    return [
        LiftedIngredient(**as_kind(a, LiftedIngredient, containers={"": infos}, tensors=infos, group=group, position=k))
        for k, a in enumerate(group.adapters)
    ]


def digest_of(base: Ingredient) -> str:
    """Return the SHA-256 of a base, kept in this node's cache as long as its files do not change."""

    def make(folder: Path) -> Iterator[None]:
        (folder / "sha256").write_text(hash_ingredients([base])[0], encoding="utf-8")
        yield

    hold = drain(cached("digests", content_key("sha256", base.identity_here()), 64, make))
    try:
        return (hold.path / "sha256").read_text(encoding="utf-8")
    finally:
        hold.close()


def make_set(
    adapters: Sequence[AdapterIngredient], base: Ingredient, parameters: Shapes, tied: Mapping[str, str]
) -> AdapterSet:
    """Check that adapters fit together and fit their base, from headers alone.

    Args:
        adapters: the K adapters.
        base: the base, bound to its model.
        parameters: shapes of the parameters of the model.
        tied: maps the second name of a tied parameter to its first.

    Raises IngredientError.
    """
    names = list(dict.fromkeys(module for adapter in adapters for module in adapter.pairs))
    order = {name: n for n, name in enumerate(parameters)}
    names.sort(key=lambda module: order.get(f"{module}.weight", len(order)))
    modules = {module: _module(module, adapters, parameters, tied) for module in names}
    whole = dict(_whole_tensors(adapters, base, parameters, tied, modules))
    places = {name: module for module, one in modules.items() for name in (one.a, one.b)}
    return AdapterSet(tuple(adapters), base, modules, whole, places, tied)


def _module(module: str, adapters: Sequence[AdapterIngredient], parameters: Shapes, tied: Mapping[str, str]) -> LiftedModule:
    """Join the factors of a module. Raises IngredientError if they differ in more than their rank."""
    having = [a for a in adapters if module in a.pairs]
    first = having[0].pairs[module]
    weight = parameters.get(tied.get(f"{module}.weight", f"{module}.weight"))
    rest: set[Any] = set()
    for adapter in having:
        pair = adapter.pairs[module]
        a, b = adapter.tensors[pair.a], adapter.tensors[pair.b]
        if weight is None or math.prod(weight) != b.shape[0] * math.prod(a.shape[1:]):
            found = "has no such module" if weight is None else f"has {list(weight)} there"
            raise IngredientError(
                f"{adapter.files[0]} changes {module} by [{b.shape[0]}, {', '.join(map(str, a.shape[1:]))}], but the "
                f"recipe's model {found}. Set `model:` to the base that the adapter was trained on."
            )
        rest.add((pair.a, pair.b, a.shape[1:], b.shape[:1]))
    if len(rest) > 1:
        raise IngredientError(
            f"{having[-1].files[0]} and {having[0].files[0]} change {module} in different ways: {_shown(rest)}. Exclude one."
        )
    a_infos, b_infos = ([x.tensors[getattr(x.pairs[module], side)] for x in having] for side in "ab")
    ranks = tuple(a.pairs[module].rank if module in a.pairs else 0 for a in adapters)
    scales = tuple(a.pairs[module].scale if module in a.pairs else 0.0 for a in adapters)
    total = sum(ranks)
    return LiftedModule(
        first.a, first.b, ranks, scales, (total, *a_infos[0].shape[1:]), (b_infos[0].shape[0], total, *b_infos[0].shape[2:]),
        _widest(i.dtype for i in a_infos), _widest(i.dtype for i in b_infos),
    )  # fmt: skip


def _shown(rest: set[Any]) -> str:
    return " and ".join(f"{a} with inputs {list(inputs)}" for a, _, inputs, _ in sorted(rest))


def _widest(dtypes: Any) -> torch.dtype:
    found: torch.dtype = reduce(torch.promote_types, dtypes)
    return found


def _whole_tensors(
    adapters: Sequence[AdapterIngredient],
    base: Ingredient,
    parameters: Shapes,
    tied: Mapping[str, str],
    modules: Mapping[str, LiftedModule],
) -> Iterator[tuple[str, WholeTensor]]:
    """Yield the whole tensors that adapters contain, with the names that they have beside all factors."""
    stored: dict[str, list[str | None]] = {}
    saved: dict[str, set[bool]] = {}
    for k, adapter in enumerate(adapters):
        for name, in_file in adapter.whole.items():
            kept = adapter.config.saves(name)
            first = name if kept else tied.get(name, name)
            _check_whole(adapter, first, in_file, parameters, tied)
            places = stored.setdefault(first, [None] * len(adapters))
            _check_once(adapter, places[k], in_file)
            places[k] = in_file
            saved.setdefault(first, set()).add(kept)
    for name, places in stored.items():
        module = name.rpartition(".")[0]
        if len(saved[name]) > 1 or (True in saved[name] and any(m == module or m.startswith(f"{module}.") for m in modules)):
            raise IngredientError(
                f"{name} is saved whole by {adapters[_first(places)].path} (modules_to_save) and changed in another way by "
                "another adapter; such adapters cannot be mixed. Exclude one kind, or merge the adapters into their base."
            )
        kept = True in saved[name]
        source = tied.get(name, name)
        if source not in base.tensors and None in places:
            lacking = adapters[places.index(None)]
            raise IngredientError(
                f"{lacking.path} and the base {base.path} lack {name}, which other adapters contain. Exclude the adapter."
            )
        infos = [a.tensors[p] for a, p in zip(adapters, places, strict=True) if p is not None]
        dtypes = [i.dtype for i in infos] + ([base.tensors[source].dtype] if None in places else [])
        own = f"{PREFIX}{module}.base_layer.{name.rpartition('.')[2]}" if module in modules and not kept else PREFIX + name
        yield own, WholeTensor(name, source, infos[0].shape, _widest(dtypes), tuple(places), kept)


def _first(places: Sequence[str | None]) -> int:
    return next(k for k, name in enumerate(places) if name is not None)


def _check_whole(adapter: AdapterIngredient, name: str, in_file: str, parameters: Shapes, tied: Mapping[str, str]) -> None:
    """Check that a whole tensor is a parameter of the base. Raises IngredientError."""
    shape, found = parameters.get(tied.get(name, name)), adapter.tensors[in_file].shape
    if shape != found:
        there = "no such parameter" if shape is None else f"{list(shape)} there"
        hint = " after adding the same tokens to the base and saving it" if shape and shape[1:] == found[1:] else ""
        raise IngredientError(
            f"{adapter.files[0]} contains {in_file} {list(found)}, but the recipe's model has {there}. Set `model:` to the "
            f"base that the adapter was trained on{hint}."
        )


def _check_once(adapter: AdapterIngredient, before: str | None, in_file: str) -> None:
    """Check that two names of one tied parameter have equal values. Raises IngredientError."""
    if before is not None and not torch.equal(adapter.read(before), adapter.read(in_file)):
        raise IngredientError(
            f"{adapter.files[0]}: {before} and {in_file} are one parameter in the base, but differ in this file. Use a base "
            "that does not tie them."
        )
