"""The state of a soup that is being learned: everything a killed run needs to resume bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ray_soup.errors import SoupError
from ray_soup.io.disk import write_bytes
from ray_soup.io.lazy import torch
from ray_soup.io.state_archive import check_archive
from ray_soup.recipe import Recipe
from ray_soup.soups.records import check_version, damaged

VERSION = 4  # 3: without the fields of _OPTIONAL, and written if none is set; 2: best_nll for best_cost
PLAIN_VERSION = 3  # 1: without `version`, written by ray_soup 0.1


@dataclass
class LearnState:
    """Everything that changes while a soup is learned."""

    y: torch.Tensor
    """Coordinates float64 [K, B]; those of finished turns are at their best points."""
    precision: str = ""
    """Precision of forward and backward passes, with `auto` resolved at the start."""
    turn: int = 0
    """The number of the current model batch."""
    epoch: int = 0
    """Number of epochs finished in this turn."""
    step: int = 0
    """Number of steps finished in this epoch."""
    moving: torch.Tensor | None = None
    """Coordinates float64 [m, B] of the current model batch, [m, T] while whole tensors move; with learn.whiten the whitened
    ones."""
    optimizer: dict[str, Any] | None = None
    """The optimizer's state dict."""
    factor: torch.Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    """Factor on the logits, float64 []: one over the temperature."""
    best: torch.Tensor | None = None
    """The best coordinates of this turn on select, float64 [m, B], in the units of `y`."""
    best_factor: float = 1.0
    """The factor at `best`."""
    best_cost: float = float("inf")
    """NLL on select at `best`, or minus the figure that select_by names."""
    total: torch.Tensor | None = None
    """With learn.average, the sum of `moving` after each step of this epoch so far."""
    total_factor: float = 0.0
    """With learn.average, the same sum of the factor."""
    start: torch.Tensor | None = None
    """With `start` or learn.screen, the coordinates float64 [K, B] that learning begins from: zeros for the uniform soup."""
    began: dict[str, float] | None = None
    """With those, the number `start` of the best candidate, whether it is `used` (1 or 0), its figures on select, and those
    of the uniform soup as `uniform_...`."""
    gram: torch.Tensor | None = None
    """With learn.whiten, the inner products of the directions in each block, float64 [B, K, K]: other actors sum them in
    another order."""
    before: torch.Tensor | None = None
    """In and after a refit, the coordinates float64 [K, B] that were learned before it; `turn` counts its turns."""
    before_factor: float = 1.0
    """The factor at `before`."""
    statistics: dict[str, torch.Tensor] | None = None
    """Running statistics that the actors use: those at the coordinates that the turn or the epoch began with."""
    fit_loss: float = 0.0
    """Sum of the loss over the examples of this epoch so far."""
    fit_count: float = 0.0
    """The sum of the weights of those examples."""
    steps: int = 0
    """Number of steps over all turns."""
    image_passes: int = 0
    """Number of examples in forward and backward passes and in re-estimations of running statistics."""
    step_ms: list[float] = field(default_factory=list)
    """Duration of each of the first 1,000 steps, in milliseconds."""
    overhead_ms: list[float] = field(default_factory=list)
    """The part of each duration in which no actor was computing, in milliseconds."""
    wire_bytes: int = 0
    """Bytes to and from one actor in a step."""
    seconds: float = 0.0
    """Time spent learning, over all starts."""
    task: str = ""
    """Identifies what is learned, as from `task_of`; empty in states of earlier versions."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per epoch: turn, epoch, fit_nll, select_nll, select_accuracy, steps, and lr, that of its last step."""


StateCallback = Callable[[int, int, LearnState], None]
"""Called with (step, total steps, state). With learn.patience the run may end earlier."""


def ignore_state(step: int, steps: int, state: LearnState) -> None:
    """Do nothing."""


def task_of(recipe: Recipe, contents: Sequence[str] = ()) -> str:
    """Return the digest of what is learned: the keys of the recipe that matter, apart from defaults, and what they name.

    Args:
        recipe: the recipe.
        contents: digests of the ingredients and of the examples that the recipe names.
    """
    kept = {"model", "ingredients", "data", "method", "blocks", "learn", "buffers", "directions"}
    values = recipe.model_dump(mode="json", include=kept, exclude={"data": {"train"}}, exclude_defaults=True)
    return hashlib.sha256(json.dumps([values, *contents], sort_keys=True).encode()).hexdigest()


def save_state(state: LearnState, path: Path) -> None:
    """Write the state atomically. Raises SoupError if it cannot be written."""
    buffer, fields = io.BytesIO(), {f: getattr(state, f) for f in state.__dataclass_fields__}
    for name, default in _OPTIONAL.items():
        if not isinstance(fields[name], torch.Tensor) and fields[name] == default:
            del fields[name]
    version = VERSION if set(fields) & set(_OPTIONAL) else PLAIN_VERSION
    torch.save({"version": version, **fields}, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(file: Path | IO[bytes], task: str = "", shape: tuple[int, ...] | None = None) -> LearnState:
    """Read a state.

    Args:
        file: written by `save_state`.
        task: what is to be learned, as from `task_of`; empty: anything.
        shape: shape [K, B] of the coordinates; None: any.

    Raises RecipeError if the file is damaged, belongs to another task, or was written by a newer version of ray_soup.
    """
    name = getattr(file, "name", "the state") if not isinstance(file, Path) else file
    remedy = f"Remove {name} to learn this soup from the start."
    try:
        check_archive(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"found a {type(found).__name__}; expected the state of a soup")
    except SoupError:
        raise
    except Exception as error:  # torch raises errors of many kinds for damaged files
        raise damaged(name, f"{error}".partition("\n")[0], remedy) from error
    check_version(found, VERSION, name)
    version = found.pop("version", None)
    if version in (None, 1, 2) and isinstance(found.get("fit_count"), int):  # the earlier names and types
        found |= {"fit_count": float(found["fit_count"]), "best_cost": found.pop("best_nll", None)}
    found = {**_OPTIONAL, **found}
    fault = next(_faults(found, shape), None)
    if fault is not None:
        raise damaged(name, fault, remedy)
    state = LearnState(**found)
    if task and state.task and state.task != task:
        raise damaged(name, "it belongs to another recipe, or to ingredients or examples that have changed since", remedy)
    return state


def _faults(found: Mapping[str, Any], shape: tuple[int, ...] | None) -> Iterator[str]:
    """Yield what is wrong with the fields of a state."""
    fields = LearnState.__dataclass_fields__
    if set(found) - set(fields) or set(fields) - set(found) - {"task"}:
        yield f"its keys are {', '.join(sorted(map(str, found)))[:200]}; expected {', '.join(sorted(fields))}"
        return
    wrong = next((f for f in _COUNTS if type(found[f]) is not int or found[f] < 0), None)
    wrong = wrong or next((f for f in _NUMBERS if type(found[f]) is not float or math.isnan(found[f])), None)
    if wrong is not None:
        yield f"{wrong} is {found[wrong]!r}"
    for name, dimensions in (("y", 2), ("factor", 0), ("gram", 3), *((name, 2) for name in (*_OF_A_TURN, *_OF_A_SOUP))):
        tensor = found[name]
        if tensor is None and name not in ("y", "factor"):
            continue
        whole = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.dim() == dimensions
        if not whole or not torch.isfinite(tensor).all():
            yield f"{name} is no float64 tensor of {dimensions} dimensions with finite values"
            return
    y, moving, best = found["y"], found["moving"], found["best"]
    if shape is not None and tuple(y.shape) != tuple(shape):
        yield f"y is {list(y.shape)}; expected {list(shape)} for these ingredients and blocks"
    gram, (count, blocks) = found["gram"], y.shape
    if gram is not None and tuple(gram.shape) != (blocks, count, count):
        yield "gram does not fit y"
    wrong = next((name for name in _OF_A_SOUP if found[name] is not None and found[name].shape != y.shape), None)
    if wrong is not None:
        yield f"{wrong} does not fit y"
    wrong = next((name for name in ("best", "total") if found[name] is not None and moving is None), None)
    if wrong is None and moving is not None:  # `moving` has fewer columns while whole tensors move
        shapes = {
            "moving": (len(moving), min(moving.shape[1], blocks)),
            "best": (len(moving), blocks),
            "total": moving.shape,
        }
        wrong = next((n for n, s in shapes.items() if found[n] is not None and tuple(found[n].shape) != tuple(s)), None)
    if wrong is not None:
        yield f"{wrong} does not fit y"
    if shape is not None and moving is not None and best is None:
        yield "best is missing"
    if not isinstance(found["precision"], str) or not isinstance(found.get("task", ""), str):
        yield "precision or task is no text"
    statistics = found["statistics"]
    if statistics is not None and not (
        isinstance(statistics, dict) and all(isinstance(tensor, torch.Tensor) for tensor in statistics.values())
    ):
        yield "statistics are no tensors"
    if not isinstance(found["optimizer"], (dict, type(None))):
        yield "optimizer is no state"
    if not isinstance(found["began"], (dict, type(None))):
        yield "began is no figures"
    for name, kind in (("step_ms", float), ("overhead_ms", float), ("curve", dict)):
        if not isinstance(found[name], list) or not all(isinstance(one, kind) for one in found[name]):
            yield f"{name} is no list of {kind.__name__}"


_COUNTS = ("turn", "epoch", "step", "steps", "image_passes", "wire_bytes")
_NUMBERS = ("best_factor", "best_cost", "fit_count", "fit_loss", "seconds", "total_factor", "before_factor")
_OF_A_TURN = ("moving", "best", "total")
_OF_A_SOUP = ("before", "start")
_OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("total", "before", "start", "began", "gram")), "total_factor": 0.0, "before_factor": 1.0,
}  # fmt: skip
"""Fields with the values at which they are left out, so that a state without them is what earlier versions wrote."""
