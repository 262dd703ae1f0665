"""Soups of state dicts in memory: no recipe, no Ray, no files left behind.

The code is that of `ray-soup learn`, with one actor in this process and a temporary folder.
"""

from __future__ import annotations

import copy
import inspect
import numbers
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.cache import cache_at
from ray_soup.io.formats import check_dtype
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import Layout
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import DEFAULT_METHOD, Recipe, make_recipe, with_changes
from ray_soup.soups.baseline import compare_with_best_single, warn_if_worse
from ray_soup.soups.evaluations import figures_of, reported
from ray_soup.soups.inputs import CALIBRATION, open_inputs
from ray_soup.soups.make import mix
from ray_soup.soups.model_batch import requested_model_batch
from ray_soup.soups.output import MODEL, open_output
from ray_soup.soups.polish import polish
from ray_soup.soups.report.notebook import as_html, as_text
from ray_soup.soups.session import Session
from ray_soup.soups.write import bake_and_evaluate
from ray_soup.task.dataset_functions import TARGETS
from ray_soup.task.objective import CausalLM
from ray_soup.task.tokenized import MOVED, moved_by_one

_MODEL: ContextVar[torch.nn.Module] = ContextVar("model")
GIVEN = ("model", "ingredients", "data", "actors", "method")
Batches = Iterable[Any] | torch.utils.data.Dataset[Any]
"""Batches of (inputs, labels), such as a DataLoader yields, or a dataset of pairs; or dictionaries of inputs, which are the
model's arguments by name, with an entry `labels`."""
IMAGES, LABELS = "images", "labels"


@dataclass(frozen=True, repr=False)
class MixedSoup:
    """A soup in memory. A notebook shows it as a table."""

    coefficients: Coefficients
    """The coefficients; the state dicts are named 0, 1, ..."""
    figures: dict[str, float]
    """Figures as in results.jsonl: select_accuracy, select_nll, and test_... if there is test data."""
    record: dict[str, Any]
    """Keys as in run.json: method, steps, image_passes, curve and others, depending on the method."""
    notes: list[str]
    """Notes for the user, one sentence or more each."""
    tensors: dict[str, torch.Tensor]
    """The soup's state dict."""
    best_single: dict[str, Any] = field(default_factory=dict)
    """Figures of the best single state dict on select, for comparison: `ingredient`, its position as text, and the keys of
    `figures`. Empty with baseline="none"."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the soup for `model.load_state_dict`, in the dtypes of the ingredients."""
        return dict(self.tensors)

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())

    def _shown(self) -> tuple[str, list[dict[str, Any]]]:
        """The title and the rows of its table."""
        method, rows = self.record["method"], [self.best_single] if self.best_single else []
        title = f"Soup in memory: {method}, made from {len(self.coefficients.ingredients)} state dicts"
        return title, [{"model_name": method, **self.figures}, *rows]


def mix_state_dicts(
    model: torch.nn.Module,
    state_dicts: Sequence[Mapping[str, torch.Tensor]],
    fit: Batches,
    method: str = DEFAULT_METHOD,
    *,
    select: float | Batches = 0.2,
    test: Batches | None = None,
    progress: ProgressCallback = no_progress,
    **changes: Any,
) -> MixedSoup:
    """Mix `state_dicts`, fine-tuned from one initialization of `model`, into the soup that is best on held-out data.

    >>> import copy, torch, ray_soup
    >>> _ = torch.manual_seed(0)
    >>> images, means = torch.randn(600, 8), torch.randn(4, 8)
    >>> labels = (images @ means.T + torch.randn(600, 4)).argmax(dim=1)
    >>> model, state_dicts = torch.nn.Sequential(torch.nn.Linear(8, 4)), []
    >>> for lr in (0.5, 1.0, 2.0):
    ...     tuned = copy.deepcopy(model)
    ...     for batch in torch.randperm(300).split(10):
    ...         loss = torch.nn.functional.cross_entropy(tuned(images[batch]), labels[batch])
    ...         loss.backward()
    ...         _ = torch.optim.SGD(tuned.parameters(), lr).step()
    ...     state_dicts.append(tuned.state_dict())
    >>> held_out = torch.utils.data.TensorDataset(images[300:], labels[300:])
    >>> soup = ray_soup.mix_state_dicts(model, state_dicts, held_out)
    >>> model.load_state_dict(soup.state_dict())
    <All keys matched successfully>
    >>> soup.coefficients.values.shape  # ingredients, blocks
    (3, 8)

    Args:
        model: maps a batch of inputs [n, ...] to logits [n, classes], or as `objective` says; it is not changed.
        state_dicts: the ingredients.
        fit: held-out batches, or a dataset, that none of the state dicts was trained on; read once and kept as arrays.
            Batches are (inputs, labels), or dictionaries, as collators of Transformers make them: `labels`, and inputs that
            the model takes by name. For objective="causal_lm" and a model of Transformers, labels are as its forward takes
            them.
        method: as in a recipe.
        select: batches, or a dataset, that choices are made on; or the share of fit that is set aside for this.
        test: batches used for reporting only.
        progress: called with what is being done, the units done so far, and the units in total.
        **changes: other recipe keys, as in learn={"epochs": 3} or objective="regression".

    Warns if the soup has a higher NLL on select than the best single state dict.

    Raises RecipeError for wrong data or keys, IngredientError for state dicts that do not fit together.
    """
    import ray_soup.mixing.kernels  # noqa: F401 - keeps the compiled loops in the user's cache, not in the temporary folder

    _check_arguments(model, state_dicts, progress, changes)
    called = _unwrapped(model)
    moved = changes.get("objective") == CausalLM.name and _is_of_transformers(called)
    with _workplace() as folder, cache_at(folder / "cache"), _given(model):
        data = _write_data({"fit": fit, "select": select, "test": test}, folder, moved, _first_argument(called))
        ingredients = [_write_state_dict(state, folder / f"{k}.safetensors") for k, state in enumerate(state_dicts)]
        recipe = with_changes(_recipe(method, model, data, ingredients), changes)
        return _mix(recipe, folder, progress, [f"Labels {MOVED}"] if moved else [])


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that torch.compile, DataParallel and the like call."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if type(model).__module__.startswith("torch.") and isinstance(inner, torch.nn.Module):
            return _unwrapped(inner)
    return model


def _first_argument(model: torch.nn.Module) -> str:
    """Return the name of the first argument of a model's forward; empty if it is not known."""
    try:
        first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    except (TypeError, ValueError):  # of compiled code
        return ""
    return "" if first is None or first.kind is first.VAR_POSITIONAL else first.name


def _is_of_transformers(model: torch.nn.Module) -> bool:
    """Return whether a model is one of transformers, whose forward itself moves the labels of a causal language model."""
    return any(kind.__module__.partition(".")[0] == "transformers" for kind in type(model).__mro__)


def _check_arguments(model: object, state_dicts: object, progress: object, changes: Mapping[str, Any]) -> None:
    """Check the kinds of the arguments of `mix_state_dicts`. Raises RecipeError."""
    wrong = sorted({key.partition(".")[0] for key in changes}.intersection(GIVEN))
    if wrong:
        raise RecipeError(
            f"mix_state_dicts does not take the recipe key '{wrong[0]}': its own arguments set it. Remove the key."
        )
    if not isinstance(model, torch.nn.Module):
        raise RecipeError(f"model is {_kind(model)}; expected a torch.nn.Module. Pass the model itself.")
    if isinstance(state_dicts, (Mapping, str)) or not isinstance(state_dicts, Iterable):
        raise RecipeError(f"state_dicts is {_kind(state_dicts)}; expected a list of state dicts. Pass a list.")
    if not callable(progress):
        raise RecipeError(
            f"progress is {_kind(progress)}; expected a function of (what, done, total). Pass one, or omit it."
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


@contextmanager
def _workplace() -> Iterator[Path]:
    """Make a temporary folder; an error in the context names the arguments instead of the files in this folder."""
    with tempfile.TemporaryDirectory(prefix="ray_soup") as temporary:
        try:
            yield Path(temporary)
        except SoupError as error:
            text = re.sub(rf"{re.escape(temporary)}/(\d+)\.safetensors", r"state dict \1", str(error))
            text = re.sub(rf"(?:data\.\w+: )?{re.escape(temporary)}/(\w+)\.npz", r"\1", text)
            raise type(error)(text) from error


def _recipe(method: str, model: torch.nn.Module, data: dict[str, Any], ingredients: list[str]) -> Recipe:
    gpus = int(any(p.is_cuda for p in model.parameters()))
    return make_recipe(
        {
            "method": method,
            "model": f"{__name__}:given_model",
            "data": data,
            "ingredients": ingredients,
            "actors": {"replicas": 1, "shards": 1, "gpus": gpus},
        }
    )


@shown_in_notebooks
def _mix(recipe: Recipe, folder: Path, progress: ProgressCallback, notes: list[str]) -> MixedSoup:
    inputs = open_inputs(recipe, needs_fit=True)
    mesh, threads = Mesh(1, 1), torch.get_num_threads()
    pool = InProcessPool(recipe, inputs.ingredients, mesh, threads)
    model_batch = requested_model_batch(recipe, len(inputs.ingredients))
    with open_output(folder / "out", progress) as output:
        session = Session(
            recipe, inputs, pool, pool.setup(progress), mesh, threads, model_batch, progress, subset=inputs.everything,
            state_file=output.state("learn.pt"),
        )  # fmt: skip
        session = session.with_soup(splits=session.cut(recipe.learn.seed))
        mixture = mix(session)
        mixture.notes += [*inputs.notes, *notes]
        calibration = session.calibration(CALIBRATION)
        outcomes = bake_and_evaluate(session, output, mixture, folder / MODEL, reported(session.splits), calibration)
        if recipe.polish is not None:
            outcomes, mixture.figures["polish"] = polish(session, output, mixture, folder, outcomes)
        baseline = compare_with_best_single(session, outcomes)
    tensors = _read(folder / MODEL, inputs.layout)
    if baseline:
        mixture.figures |= baseline.record
        mixture.notes += baseline.notes
        warn_if_worse(baseline)
    row, record = baseline.row if baseline else {}, {"method": recipe.method, **mixture.figures}
    return MixedSoup(mixture.coefficients, figures_of(outcomes), record, mixture.notes, tensors, row)


def _read(path: Path, layout: Layout) -> dict[str, torch.Tensor]:
    found = load_file(path)
    tensors = {name: found[name].view(shape) for name, shape in layout.state_shapes.items()}
    return tensors | {name: tensors[first] for name, first in layout.tied.items()}


def given_model() -> torch.nn.Module:
    """Return a copy of the model that `mix_state_dicts` was called with. Raises RecipeError if it cannot be copied."""
    model = _MODEL.get()
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, copy.Error) as error:  # as after a forward pass under an old-style spectral_norm
        raise RecipeError(
            f"model: {type(model).__name__} cannot be copied ({str(error).partition(chr(10))[0]}). Pass a newly built model."
        ) from error


@contextmanager
def _given(model: torch.nn.Module) -> Iterator[None]:
    token = _MODEL.set(model)
    try:
        yield
    finally:
        _MODEL.reset(token)


def _write_state_dict(state: Mapping[str, torch.Tensor], path: Path) -> str:
    where = f"State dict {path.stem}"
    if not isinstance(state, Mapping):
        how = "model.state_dict()" if isinstance(state, torch.nn.Module) else "what torch.load or load_file returns"
        raise IngredientError(f"{where} is {_kind(state)}; expected names and tensors. Pass {how}.")
    others = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        kind = type(state[others[0]]).__name__
        raise IngredientError(f"{where}: {others[0]} is a {kind}; expected a tensor. Remove that entry.")
    odd = next((name for name, t in state.items() if t.is_meta or t.layout != torch.strided or t.is_quantized), None)
    if odd is not None:
        raise IngredientError(f"{where}: {odd} is a meta, sparse or quantized tensor; expected a dense one. Convert it.")
    for name, tensor in state.items():
        if tensor.dtype.is_complex:  # which only some versions of safetensors can store
            check_dtype(where, name, str(tensor.dtype).removeprefix("torch."))
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, path)
    return str(path)


def _write_data(given: Mapping[str, Any], folder: Path, moved: bool, first: str) -> dict[str, Any]:
    """Write the data that were given, and return the section `data` of a recipe; a share stays one. Raises RecipeError."""
    found: dict[str, Any] = {}
    for name, some in given.items():
        share = name == "select" and isinstance(some, numbers.Real)
        if share or name != "test" or some is not None:
            found[name] = some if share else _write_batches(some, folder / f"{name}.npz", moved, first)
    return found


def _write_batches(batches: Any, path: Path, moved: bool = False, first: str = "") -> str:
    """Write batches, or the examples of a dataset, as the arrays of an .npz file.

    Args:
        batches: the batches, or the dataset.
        path: the file.
        moved: move labels by one place.
        first: the name of the model's first argument, which an only input becomes.

    Raises RecipeError.
    """
    name, found = path.stem, dict[str, list[np.ndarray]]()
    examples, given = _batches(batches, name)
    for batch in given:
        parts = _named(batch, name, "an example" if examples else "a batch")
        if found and parts.keys() != found.keys():
            both = " and ".join(", ".join(keys) for keys in (found, parts))
            raise RecipeError(f"{name}: found batches of {both}; expected the same entries in all. Yield them alike.")
        arrays = {what: _array(part, f"{name}: {what}") for what, part in parts.items()}
        single = examples or arrays[LABELS].ndim == 0
        for what, array in arrays.items():
            found.setdefault(what, []).append(array[None] if single else array)
    if not found:
        raise RecipeError(f"{name}: there are no batches. A generator can be iterated only once: pass a new one.")
    for what, arrays_of in found.items():
        shapes = sorted({array.shape[1:] for array in arrays_of})
        if len(shapes) > 1:
            sizes = " and ".join(str(list(shape)) for shape in shapes[:2])
            raise RecipeError(f"{name}: found {what} of the shapes {sizes}; expected one shape. Resize or pad them.")
    alone = next(iter(found.keys() - {LABELS}))
    if first and len(found) == 2 and alone not in (IMAGES, first):
        raise RecipeError(
            f"{name}: the only input is called {alone}, and the model's first argument {first}. Rename one of them."
        )
    whole: dict[str, Any] = {what: np.concatenate(arrays_of) for what, arrays_of in found.items()}
    if moved:
        if whole[LABELS].ndim != 2:
            raise RecipeError(f"{name}: labels are {list(whole[LABELS].shape)}; expected one for each token, [n, tokens].")
        whole[LABELS] = moved_by_one(whole[LABELS])
    np.savez(path, **whole)
    return str(path)


def _named(batch: Any, name: str, kind: str) -> dict[str, Any]:
    """Return inputs by name, and targets as LABELS; an input without a name is called IMAGES. Raises RecipeError."""
    expected = f"expected (images, labels), or a dictionary of inputs and one of {', '.join(TARGETS)}"
    if isinstance(batch, Mapping):
        named = {str(key): part for key, part in batch.items()}
        targets = [key for key in TARGETS if key in named]
        if len(targets) != 1 or len(named) < 2:
            raise RecipeError(f"{name}: {kind} holds {', '.join(named)[:200]}; {expected}. Rename or remove entries.")
        inputs, labels = named, named.pop(targets[0])
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
        inputs = {str(key): part for key, part in batch[0].items()} if isinstance(batch[0], Mapping) else {IMAGES: batch[0]}
    else:
        found = f"{len(batch)} items" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise RecipeError(f"{name}: {kind} holds {found}; {expected}. Yield tensors or arrays.")
    taken = (*TARGETS, "file", "allow_pickle")  # the latter are arguments of numpy.savez
    wrong = [key for key in inputs if key in taken or (key == IMAGES and len(inputs) > 1)]
    if wrong:
        raise RecipeError(f"{name}: an input of {kind} is called {wrong[0]}, a name with a meaning of its own. Rename it.")
    return {**inputs, LABELS: labels}


def _batches(given: Any, name: str) -> tuple[bool, Iterable[Any]]:
    """Return whether the data are the examples of a map-style dataset, and what yields them. Raises RecipeError."""
    if isinstance(given, (Mapping, str)) or not (isinstance(given, Iterable) or hasattr(given, "__getitem__")):
        more = ", or the share of fit to set aside" if name == "select" else ""
        raise RecipeError(
            f"{name} is {_kind(given)}; expected batches of (images, labels), or a dataset{more}. Pass a DataLoader."
        )
    if isinstance(given, (list, tuple)) or not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        return False, given
    return True, (given[n] for n in range(len(given)))


def _array(part: Any, where: str) -> np.ndarray:
    """Return images or labels as an array. Raises RecipeError."""
    try:
        tensor = torch.as_tensor(part).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{where} are {_kind(part)}; expected tensors or arrays of numbers. Convert them.") from error
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
