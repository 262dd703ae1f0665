"""Learning that begins from a finished soup: the recipe key `start`.

Coefficients belong to ingredients, and each block's column sums to 1, so that a soup stays the same soup whatever other
ingredients there are: the center may change. With S, the ingredients of the soup that are still there,

    c[k] = c_old[k] + (1 - sum_{j in S} c_old[j]) / |S|    for k in S,        c[k] = 0    for new ingredients:

what ingredients that are gone had of the soup is divided evenly among the old ones that stay.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.actors.pool import StepPool
from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.disk import write_bytes
from ray_soup.io.hashing import sha256_file
from ray_soup.io.lazy import torch
from ray_soup.io.redact import redact
from ray_soup.mixing.blocks import Blocks, Layout, Partition, partition
from ray_soup.mixing.coefficients import MEAN, Coefficients, load_coefficients, to_x
from ray_soup.mixing.row_groups import groups_of
from ray_soup.recipe import Recipe
from ray_soup.soups.granularity import FINER
from ray_soup.soups.records import check_files, finished_record
from ray_soup.soups.report.statistics import is_better
from ray_soup.soups.state import LearnState
from ray_soup.task.choices import cost, figures_on_select
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome

FILE = "coefficients.safetensors"


@dataclass(frozen=True)
class Start:
    """The finished soup that learning begins from."""

    out: str
    """Its folder or URI."""
    coefficients: Coefficients
    """Its coefficients."""
    sha256: tuple[str, ...]
    """Digests of its ingredients."""
    digest: str
    """The digest of its coefficients file."""


@dataclass(frozen=True)
class Beginning:
    """Where learning with certain ingredients may begin."""

    y: NDArray[np.float64]
    """Unit-scaled coordinates float64 [K, B]."""
    note: str
    """What this soup is, for a note."""
    about: dict[str, Any]
    """What it is, for run.json: `ingredients`, the number of ingredients that it has, and others."""
    asked: bool = True
    """Whether the recipe names it."""


def open_start(recipe: Recipe, layout: Layout) -> Start | None:
    """Read the coefficients of the soup that the recipe's `start` names; None if it names none.

    Raises RecipeError if it is not a finished soup, or one of another model.
    """
    if recipe.start is None:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(recipe.start)
        if storage.is_remote(recipe.start):
            folder = Path(temporary)
            for name in ("run.json", FILE):
                if storage.exists(found := storage.join(recipe.start, name)):
                    write_bytes(folder / name, storage.read_bytes(found))
        try:
            record = finished_record(folder)
            check_files(folder, record, [FILE])
            coefficients = load_coefficients(folder / FILE)
        except RecipeError as error:
            raise RecipeError(f"start: {str(error).replace(str(folder), recipe.start)}") from error
        digest = sha256_file(str(folder / FILE))
    listed = {one["name"]: one["sha256"] for one in record["ingredients"]}
    unknown = next((name for name in coefficients.ingredients if name not in listed), None)
    if unknown is not None:
        raise RecipeError(
            f"start: run.json of {recipe.start} does not list the ingredient {unknown} of its coefficients. Restore both "
            "files from the same run."
        )
    _check_model(recipe.start, coefficients, layout)
    start = Start(recipe.start, coefficients, tuple(listed[name] for name in coefficients.ingredients), digest)
    _sources(start, layout, partition(layout, FINER[-1] if recipe.blocks == "auto" else recipe.blocks))
    return start


def fine_enough(start: Start, least: Blocks, layout: Layout) -> Blocks:
    """Return `least`, resolved from `auto`, or the next finer blocks that can express the soup that learning begins from."""
    for blocks in FINER[FINER.index(least) :]:
        with suppress(RecipeError):
            _sources(start, layout, partition(layout, blocks))
            return blocks
    return least


def _check_model(out: str, coefficients: Coefficients, layout: Layout) -> None:
    """Check that a soup's coefficients are for the tensors of a model. Raises RecipeError."""
    ours, theirs = set(layout.names), set(coefficients.block_of)
    odd = next((name for name in (*layout.names, *coefficients.block_of) if (name in ours) != (name in theirs)), None)
    if odd is not None:
        which = ("this model has", "the soup") if odd in ours else ("the soup has", "this model")
        raise RecipeError(
            f"start: {out} is a soup of another model: {which[0]} the tensor {odd}, and {which[1]} does not. Name a soup of "
            "the model in `model:`, or remove the key."
        )


def matches(start: Start, names: Sequence[str], sha256: Sequence[str]) -> list[int | None]:
    """Return for each ingredient its position among those of the soup; None for a new one.

    Files are the same if their SHA-256 is, and the name decides between equal files; an ingredient that was saved in another
    format, whose SHA-256 is new, is the one of its name.
    """
    old = list(zip(start.coefficients.ingredients, start.sha256, strict=True))
    new = list(zip(names, sha256, strict=True))
    found: list[int | None] = [None] * len(new)
    left = dict(enumerate(old))
    for compared in (slice(2), slice(1, 2), slice(1)):  # both, the digest, the name
        for k, one in enumerate(new):
            equal = (j for j, other in left.items() if one[compared] == other[compared])
            position = next(equal, None) if found[k] is None else None
            if position is not None:
                found[k] = position
                del left[position]
    return found


def coordinates(
    start: Start,
    matched: Sequence[int | None],
    layout: Layout,
    parts: Partition,
    norms: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the unit-scaled coordinates of the soup, float64 [K, B].

    Args:
        start: the soup.
        matched: the position of each of the K ingredients among those of the soup, as from `matches`; not all are None.
        layout: the layout of the model.
        parts: its B blocks.
        norms: float64 [K, B], norms of the directions.

    Raises RecipeError if tensors of one block have different coefficients in the soup.
    """
    kept = {k: position for k, position in enumerate(matched) if position is not None}
    stay, old = list(kept), start.coefficients.values[list(kept.values())]
    values = np.zeros((len(matched), parts.count))
    for block, source in enumerate(_sources(start, layout, parts)):
        column = np.full(len(stay), 1 / len(start.sha256)) if source == MEAN else old[:, source]
        values[stay, block] = column + (1 - column.sum()) / len(stay)
    found: NDArray[np.float64] = (values - 1 / len(values)) * norms
    return found


def _sources(start: Start, layout: Layout, parts: Partition) -> list[int]:
    """Return the soup's block for each block, or MEAN. Raises RecipeError if it has several for one."""
    values, block_of, cuts = start.coefficients.values, start.coefficients.block_of, start.coefficients.cuts
    found = [MEAN] * parts.count
    first: dict[int, str] = {}
    for tensor, name in enumerate(layout.names):
        if parts.block[tensor] < 0 or block_of[name] == MEAN:
            continue
        size = int(layout.sizes[tensor])
        old = list(groups_of(block_of[name], cuts.get(name, ()), size))
        for low, high, block in parts.groups(tensor, size):
            for source in [source for begin, end, source in old if begin < high and low < end]:
                other = first.setdefault(block, name)
                if found[block] == MEAN:
                    found[block] = source
                elif not np.array_equal(values[:, found[block]], values[:, source]):
                    raise _coarser(start.out, other, name)
    return found


def _coarser(out: str, one: str, other: str) -> RecipeError:
    which = f"rows of the tensor {one}" if one == other else f"the tensors {one} and {other}"
    return RecipeError(
        f"start: in {out}, {which} have different coefficients, but these `blocks:` have one for both. Use finer blocks, as "
        "in blocks=tensor, or those of that soup, or remove the key."
    )


def beginning(
    start: Start,
    names: Sequence[str],
    sha256: Sequence[str],
    layout: Layout,
    parts: Partition,
    norms: NDArray[np.float64],
) -> Beginning:
    """Return where learning with these ingredients begins.

    Args:
        start: the soup.
        names: names of the K ingredients.
        sha256: their digests.
        layout: the layout of the model.
        parts: its B blocks.
        norms: float64 [K, B], norms of the directions.

    Raises RecipeError if the soup has none of these ingredients, or if tensors of one block have different coefficients in
    it.
    """
    matched = matches(start, names, sha256)
    stay = sum(position is not None for position in matched)
    if not stay:
        raise RecipeError(
            f"start: the soup {start.out} has none of these {len(names)} ingredients, such as {names[0]}; it was made of "
            f"others, such as {start.coefficients.ingredients[0]}. Remove the key, or name a soup of these ingredients."
        )
    gone = len(start.sha256) - stay
    note = f"{start.out}, which has {stay} of these {len(names)} ingredients"
    note += f"; what others had of it was divided evenly among those {stay}" if gone else ""
    about = {"out": redact(start.out), "sha256": start.digest, "ingredients": stay}
    return Beginning(coordinates(start, matched, layout, parts, norms), f"the soup {note}", about)


def choose_start(
    state: LearnState,
    pool: StepPool,
    norms: NDArray[np.float64],
    chosen: NDArray[np.int64],
    select: Split,
    calibration: Sequence[Split],
    select_by: str,
    starts: Sequence[Beginning],
) -> None:
    """Let learning begin at one of `starts`, or at the uniform soup.

    They are compared one after another with the best so far, first with the uniform soup. One that the recipe asks for must
    be no worse on select. Any other one must be significantly better on every second example of select, those that it was
    not chosen by: the paired 95 % interval must not contain 0.

    Args:
        state: the state, before the first turn.
        pool: actors that hold the directions.
        norms: float64 [K, B], norms of the directions.
        chosen: int64 [m], the first model batch.
        select: the split that decides.
        calibration: batches that running statistics are re-estimated on.
        select_by: the recipe key.
        starts: one or more.
    """

    def evaluated(y: NDArray[np.float64]) -> Outcome:
        x = to_x(y, norms).astype(np.float32)
        pool.begin(chosen, x, state.precision)
        if calibration:
            pool.recalibrate(x[chosen], list(calibration))
            state.image_passes += sum(map(len, calibration))
        return pool.evaluate_each(x[chosen], select)

    outcomes = [evaluated(start.y) for start in starts]
    uniform = evaluated(np.zeros_like(norms))
    best, used, rows = uniform, None, np.arange(1, len(select), 2)
    for number, outcome in enumerate(outcomes):
        gain = cost(best, select_by) - cost(outcome, select_by)
        better = gain >= 0 if starts[number].asked else is_better(outcome.at(rows), best.at(rows), select_by)
        if math.isfinite(cost(outcome, select_by)) and (better or not math.isfinite(gain)):
            best, used = outcome, number
    shown = 0 if used is None else used
    even = {f"uniform_{name}": value for name, value in figures_on_select(uniform).items()}
    state.began = {
        "used": float(used is not None), "start": float(shown), **figures_on_select(outcomes[shown]), **even
    }  # fmt: skip
    state.start = torch.from_numpy(np.zeros_like(norms) if used is None else starts[used].y.copy())
    state.y = state.start.clone()


def began_record(begins: Sequence[Beginning], state: LearnState) -> dict[str, Any]:
    """Return what run.json says about where a run with the last state `state` began; `begins` as for `choose_start`."""
    began = dict(state.began or {"start": 0.0, "used": 0.0})
    return {**begins[int(began.pop("start"))].about, **began, "used": bool(began["used"])}


def began_note(method: str, begins: Sequence[Beginning], state: LearnState) -> list[str]:
    """Return the note for the user on where learning began: none if that is where it begins unless the recipe asks."""
    assert state.began is not None
    theirs, ours, start = state.began["uniform_select_nll"], state.began["select_nll"], begins[int(state.began["start"])]
    if not state.began["used"]:
        better = f"which is better on select (loss {theirs:.4f}) than the start ({ours:.4f}): {start.note}"
        return [f"{method}: learning began from the uniform soup, {better}."] if start.asked else []
    found = f"{method}: learning began from {start.note}"
    return [
        f"{found}." if start.asked else f"{found}: its loss on select is {ours:.4f}, that of the uniform soup {theirs:.4f}."
    ]
