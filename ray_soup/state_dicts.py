"""A soup of state dicts in memory: no recipe, no Ray, no files left behind.

What runs is what `ray-soup learn` runs, with one actor in this process, in a temporary folder.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ray_soup.actors import LocalActors, Watch, quiet
from ray_soup.blocks import Layout
from ray_soup.cache import cache_at
from ray_soup.coefficients import Coefficients
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.folder import MODEL
from ray_soup.pipeline import CALIBRATION, Bench, baked, figures_of, make_soup, model_batch_of, prepare, reported
from ray_soup.recipe import Method, Recipe, changed, make_recipe
from ray_soup.shard import Mesh

_MODEL: ContextVar[torch.nn.Module] = ContextVar("model")
GIVEN = ("model", "ingredients", "data", "actors", "method")


@dataclass(frozen=True)
class MixedSoup:
    """A soup in memory."""

    coefficients: Coefficients
    """How much of each state dict, named 0, 1, ..."""
    figures: dict[str, float]
    """As in results.jsonl: select_accuracy, select_nll, and test_... where test was given."""
    record: dict[str, Any]
    """As in run.json: steps, image_passes, curve and others, by method."""
    notes: list[str]
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The soup, for `model.load_state_dict`, in the dtypes of the ingredients."""
        return dict(self.tensors)


def mix_state_dicts(
    model: torch.nn.Module,
    state_dicts: Sequence[Mapping[str, torch.Tensor]],
    fit: Iterable[tuple[torch.Tensor, torch.Tensor]],
    method: Method = "mehl+",
    *,
    select: float | Iterable[tuple[torch.Tensor, torch.Tensor]] = 0.2,
    test: Iterable[tuple[torch.Tensor, torch.Tensor]] | None = None,
    watch: Watch = quiet,
    **changes: Any,
) -> MixedSoup:
    """The soup of `state_dicts`, fine-tunings of `model` from one initialisation, that is best on held-out data.

    fit, test: batches of (images, labels), such as a DataLoader yields, that none of the state dicts was trained on; gone
    through once and held as arrays. select: batches that choices are made on, or a share of fit. `changes` are other keys
    of a recipe: learn={"epochs": 3}, buffers="average". `model` maps images to logits; it stays as it is.

    >>> import copy, torch, ray_soup
    >>> _ = torch.manual_seed(0)
    >>> images, means = torch.randn(600, 8), torch.randn(4, 8)
    >>> labels = (images @ means.T + torch.randn(600, 4)).argmax(dim=1)
    >>> model, state_dicts = torch.nn.Sequential(torch.nn.Linear(8, 4)), []
    >>> for lr in (0.1, 0.3, 1.0):
    ...     tuned = copy.deepcopy(model)
    ...     for batch in torch.randperm(300).split(50):
    ...         loss = torch.nn.functional.cross_entropy(tuned(images[batch]), labels[batch])
    ...         loss.backward()
    ...         _ = torch.optim.SGD(tuned.parameters(), lr).step()
    ...     state_dicts.append(tuned.state_dict())
    >>> held_out = torch.utils.data.TensorDataset(images[300:], labels[300:])
    >>> soup = ray_soup.mix_state_dicts(model, state_dicts, torch.utils.data.DataLoader(held_out, 50))
    >>> model.load_state_dict(soup.state_dict())
    <All keys matched successfully>
    >>> soup.coefficients.values.shape  # ingredients, blocks
    (3, 2)

    Raises RecipeError for wrong data or keys, IngredientError for state dicts that do not fit.
    """
    import ray_soup.kernels  # noqa: F401 - its compiled loops are kept, and not in the temporary folder

    wrong = sorted({key.partition(".")[0] for key in changes}.intersection(GIVEN))
    if wrong:
        raise RecipeError(f"mix_state_dicts takes no key '{wrong[0]}' of a recipe: its arguments say it.")
    with tempfile.TemporaryDirectory(prefix="ray_soup") as temporary, cache_at(Path(temporary) / "cache"), _given(model):
        folder = Path(temporary)
        data: dict[str, Any] = {"fit": _write_batches(fit, folder / "fit.npz"), "select": select}
        if not isinstance(select, float):
            data["select"] = _write_batches(select, folder / "select.npz")
        if test is not None:
            data["test"] = _write_batches(test, folder / "test.npz")
        recipe = make_recipe({
            "method": method, "model": f"{__name__}:given_model", "data": data,
            "ingredients": [_write_state_dict(state, folder / f"{k}.safetensors") for k, state in enumerate(state_dicts)],
            "actors": {"replicas": 1, "shards": 1, "gpus": int(any(p.is_cuda for p in model.parameters()))},
        })  # fmt: skip
        return _mixed(changed(recipe, changes), folder, watch)


def _mixed(recipe: Recipe, folder: Path, watch: Watch) -> MixedSoup:
    ingredients, layout = prepare(recipe, needs_fit=True)
    everything, mesh, threads = tuple(range(len(ingredients))), Mesh(1, 1), torch.get_num_threads()
    actors = LocalActors(recipe, ingredients, mesh, threads)
    model_batch = model_batch_of(recipe, len(ingredients))
    bench = Bench(recipe, ingredients, layout, mesh, threads, model_batch, actors, actors.setup(watch), watch)
    splits = bench.cut(recipe.learn.seed)
    made = make_soup(bench, recipe, everything, splits, model_batch, folder / "learn.pt")
    calibration = bench.calibration(recipe, splits, CALIBRATION)
    outcomes = baked(bench, made, everything, folder / MODEL, reported(splits), calibration)
    return MixedSoup(made.coefficients, figures_of(outcomes), made.figures, made.notes, _read(folder / MODEL, layout))


def _read(path: Path, layout: Layout) -> dict[str, torch.Tensor]:
    found = load_file(path)
    tensors = {name: found[name].view(shape) for name, shape in layout.state_shapes.items()}
    return tensors | {name: tensors[first] for name, first in layout.tied.items()}


def given_model() -> torch.nn.Module:
    """A copy of the model at hand."""
    return copy.deepcopy(_MODEL.get())


@contextmanager
def _given(model: torch.nn.Module) -> Iterator[None]:
    token = _MODEL.set(model)
    try:
        yield
    finally:
        _MODEL.reset(token)


def _write_state_dict(state: Mapping[str, torch.Tensor], path: Path) -> str:
    others = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        kind = type(state[others[0]]).__name__
        raise IngredientError(f"State dict {path.stem}: {others[0]} is a {kind}; expected tensors. Leave it out.")
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)
    return str(path)


def _write_batches(batches: Iterable[Any], path: Path) -> str:
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            found = f"{len(batch)} things" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise RecipeError(f"{path.stem}: a batch is {found}; expected (images, labels), both tensors or arrays.")
        for part, to in zip(batch, (images, labels), strict=True):
            tensor = torch.as_tensor(part).detach().cpu()
            to.append((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    if not images:
        raise RecipeError(f"{path.stem}: there are no batches. A generator can be gone through only once.")
    np.savez(path, images=np.concatenate(images), labels=np.concatenate(labels))
    return str(path)
