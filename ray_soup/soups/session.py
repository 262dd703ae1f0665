"""The session of a run: its inputs, and actors that are set up to work on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors.messages import Mesh, SetupInfo, StoreInfo
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import actor_bytes, has_room, memory_of_each, resolve_mesh
from ray_soup.actors.pool import ActorPool
from ray_soup.actors.ray_session import connect
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.adapters import AdapterIngredient, adapters_among
from ray_soup.io.binding import Ignored
from ray_soup.io.cache import content_key
from ray_soup.io.check import check_floats, check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.hugging_face import download_all
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lifting import files_of, group_of
from ray_soup.io.progress import ProgressCallback, labelled, no_progress
from ray_soup.mixing.adapter_store import check_not_cut
from ray_soup.mixing.blocks import Blocks, Layout, partition
from ray_soup.mixing.buffers import check_buffers, differing_layers
from ray_soup.recipe import RESERVED_NAMES, Recipe, with_changes
from ray_soup.recipe.plain import shown
from ray_soup.soups.evaluations import evaluation_key, individual_outcomes, recall
from ray_soup.soups.granularity import resolved_blocks
from ray_soup.soups.output import Output, versions
from ray_soup.soups.polish_checks import check_polish
from ray_soup.soups.records import read_resolved, write_resolved
from ray_soup.soups.start import Start, fine_enough, open_start
from ray_soup.soups.state import StateCallback, ignore_state
from ray_soup.soups.trajectory import check_trajectory, steps_of
from ray_soup.task import identity
from ray_soup.task.adapters import lift
from ray_soup.task.data import Split, calibration_batches, cut_splits
from ray_soup.task.merged_models import check_merged
from ray_soup.task.models import objective_in
from ray_soup.task.other_models import advice_for
from ray_soup.task.outcomes import Outcome, join_outcomes
from ray_soup.task.own_functions import check_functions, objective_of
from ray_soup.task.preprocessing import examine, with_cut
from ray_soup.task.tokenized import check_data

CALIBRATION = 10_000  # maximum number of examples of fit for the running statistics of a finished soup
CALIBRATION_WHILE_CHOOSING = 512  # the same while learning and for greedy candidates


@dataclass(frozen=True)
class Inputs:
    """The ingredients of a run, checked against each other and bound to the model's layout. Immutable."""

    ingredients: tuple[Ingredient, ...]
    layout: Layout
    notes: tuple[str, ...] = ()
    """Notes for the user about how the ingredients were trained."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How examples are preprocessed, for run.json."""
    frozen: int = 0
    """Parameters of the base, if the ingredients are adapters."""
    start: Start | None = None
    """The finished soup that learning begins from."""

    @property
    def held(self) -> tuple[int, int]:
        """What an actor holds, for estimates of its memory: parameters, and directions of each.

        Of the base these are 4 bytes per parameter, and of adapters 20 per element, whatever their number.
        """
        if not self.frozen:
            return self.layout.numel, len(self.ingredients)
        return self.frozen // 4 + self.layout.numel * 5 // 4, 0

    @property
    def started(self) -> dict[str, str]:
        """What a folder that is started records beside the recipe and the ingredients."""
        return {} if self.start is None else {"start": self.start.digest}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the ingredients, in order."""
        return tuple(ingredient.name for ingredient in self.ingredients)

    @cached_property
    def steps(self) -> tuple[int, ...] | None:
        """The step of each ingredient, if they are different steps of one training run; otherwise None."""
        return steps_of(self.ingredients)

    @property
    def unit_of_steps(self) -> str:
        """What a step of a run is called: step or epoch."""
        first = self.ingredients[0].step
        return "step" if first is None else first.unit

    @property
    def everything(self) -> tuple[int, ...]:
        """The positions of all ingredients."""
        return tuple(range(len(self.ingredients)))

    @cached_property
    def differing_layers(self) -> tuple[str, ...]:
        """The layers whose running statistics differ between ingredients; the other BatchNorm layers were frozen."""
        return differing_layers(self.ingredients, self.layout.tracking, self.layout.buffers)

    def recalibrated(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the layers whose running statistics are re-estimated on fit for every soup instead of averaged."""
        if recipe.data.fit is None or recipe.buffers not in ("auto", "recalibrate"):
            return ()
        return self.layout.tracking if recipe.buffers == "recalibrate" else self.differing_layers


def open_inputs(recipe: Recipe, needs_fit: bool = False) -> Inputs:
    """Open the ingredients, check them, and bind them to the model; reads headers and buffers only.

    Raises RecipeError if the recipe lacks data or ingredients, IngredientError if the ingredients do not fit together.
    """
    if recipe.data.fit is None and (needs_fit or recipe.info.needs_data):
        raise RecipeError(
            "The recipe has no data.fit, the held-out data to learn on. Add it, as in data: {fit: heldout.npz}."
        )
    if recipe.data.fit is None and recipe.buffers == "recalibrate":
        raise RecipeError("buffers: recalibrate needs data.fit, held-out data to estimate running statistics on. Add it.")
    check_functions(recipe)
    of_model = objective_in(recipe.model)
    check_data(recipe.data, objective_of(recipe, of_model).targets, of_model)
    of_runs: list[str] = []
    found = open_ingredients(recipe.ingredients, RESERVED_NAMES, of_runs)
    check_trajectory(recipe, found)
    examined = examine(recipe, found)
    layout, notes = examined.layout, [*of_runs, *examined.notes]
    adapters = adapters_among(found)
    check_polish(recipe, [adapter.path for adapter in adapters])
    if adapters and recipe.out_format != "safetensors":
        raise RecipeError(
            f"out_format is {recipe.out_format}, but the ingredients are LoRA adapters, such as {adapters[0].path}; PEFT "
            "loads safetensors. Remove the key."
        )
    if adapters:
        return _adapter_inputs(recipe, adapters, notes, examined.preprocessing)
    for key, value in recipe.adapter:
        if value:
            raise RecipeError(
                f"adapter.{key} is {shown(value)}, but the ingredients are whole models, such as {found[0].path}; the key "
                "is for LoRA adapters. Remove it."
            )
    ignore: Ignored = (*recipe.ignore, *layout.in_files.unsaved)
    ingredients = check_together(found, layout.state_shapes, layout.known_names, ignore, advise=advice_for(recipe.model))
    layout = layout.with_names({alias for ingredient in ingredients for alias in ingredient.aliases})
    check_floats(ingredients, layout.names)
    if needs_fit or not recipe.info.is_reference:
        notes += check_buffers(ingredients, layout.other_buffers, layout.owners, recipe.buffers)
    return Inputs(tuple(ingredients), layout, tuple(notes), examined.preprocessing, start=open_start(recipe, layout))


def _adapter_inputs(
    recipe: Recipe, adapters: Sequence[AdapterIngredient], notes: Sequence[str], preprocessing: dict[str, Any]
) -> Inputs:
    """Lift adapters to ingredients of one model."""
    ingredients, layout, more = lift(recipe.model, adapters, recipe.ignore)
    check_not_cut(partition(layout, resolved_blocks(recipe.blocks, layout, len(ingredients), 0, cuttable=False)))
    check_floats(ingredients, layout.names)
    group = group_of(ingredients)
    if group is not None and recipe.adapter.merge:
        check_merged(recipe.model, group)
    frozen = 0 if group is None else sum(info.numel for info in group.base.tensors.values())
    start = open_start(recipe, layout)
    return Inputs(tuple(ingredients), layout, (*notes, *more), preprocessing, frozen, start)


@dataclass
class IngredientFacts:
    """Facts about the ingredients that a run has computed so far; shared by all its soups."""

    sha256: list[str] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    """The outcome of each ingredient, by source of data."""


@dataclass(frozen=True)
class Session:
    """Actors that are set up for a run, and the soup to make with them. A method is a function `(session) -> Mixture`."""

    recipe: Recipe
    """The recipe of the soup to make."""
    inputs: Inputs
    pool: ActorPool
    setup: SetupInfo
    mesh: Mesh
    cpus: float
    model_batch: int
    """Number of ingredients whose coordinates move at a time."""
    progress: ProgressCallback = no_progress
    facts: IngredientFacts = field(default_factory=IngredientFacts)
    subset: tuple[int, ...] = ()
    """The ingredients that may go into the soup, by position."""
    splits: dict[str, Split] = field(default_factory=dict)
    state_file: Path = Path()
    """Where a learning method keeps its state, and resumes from."""
    after_epoch: StateCallback = ignore_state

    def with_soup(self, **changes: Any) -> Session:
        """Return a session for another soup of the same run: recipe, subset, splits, model_batch, state_file, ..."""
        return replace(self, **changes)

    # Data

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How examples are preprocessed, for run.json; of texts also the share that was cut, by source."""
        return with_cut(self.inputs.preprocessing, self.setup.cut)

    def whole(self, source: str) -> Split:
        """Return all examples of a source as one split."""
        return Split(source, np.arange(self.setup.sizes[source], dtype=np.int32))

    def is_whole(self, split: Split) -> bool:
        """Return whether a split has all examples of its source, in order."""
        return np.array_equal(split.rows, np.arange(self.setup.sizes[split.source]))

    @property
    def held_out(self) -> list[Split]:
        """Fit and select together."""
        return [self.whole(source) for source in ("fit", "select") if source in self.setup.sizes]

    def cut(self, seed: int) -> dict[str, Split]:
        """Cut the sources into fit, select and the test sets."""
        return cut_splits(self.recipe.data, self.setup.sizes, self.setup.fit_digests, seed)

    def calibration(self, most: int) -> list[Split]:
        """Return the batches of fit that running statistics are estimated on; none if they are averaged."""
        if not self.inputs.recalibrated(self.recipe):
            return []
        learn = self.recipe.learn
        return calibration_batches(self.splits["fit"], learn.batch_size, learn.seed, most)

    @property
    def blocks(self) -> Blocks:
        """Which parameters share a coefficient, with `auto` resolved."""
        inputs, count = self.inputs, len(self.subset)
        least = resolved_blocks(self.recipe.blocks, inputs.layout, count, len(self.splits["fit"]), not inputs.frozen)
        if self.recipe.blocks != "auto" or self.recipe.start is None or inputs.start is None:
            return least
        return fine_enough(inputs.start, least, inputs.layout)

    # Ingredients

    def open_store(self, subset: tuple[int, ...], blocks: Blocks) -> StoreInfo:
        """Have the actors open the directions of `subset`. Raises IngredientError if all ingredients are equal."""
        info = self.pool.open_store(subset, blocks, self.progress)
        if info.partition.count == 0:
            raise IngredientError(f"All {len(subset)} ingredients have the same parameters. Use checkpoints that differ.")
        if len(subset) == len(self.inputs.ingredients):
            self.facts.sha256[:] = info.sha256
        return info

    def learned_from(self, store: StoreInfo) -> list[str]:
        """Return the digests of the ingredients in `store`, their base, the examples of fit and select, and the start."""
        sources = sorted({self.splits[name].source for name in ("fit", "select")})
        group = group_of(self.inputs.ingredients)
        base = [] if group is None else [group.base_sha256]
        started = self.inputs.started.values() if self.recipe.start else ()
        return [*store.sha256, *base, *(self.setup.contents[source] for source in sources), *started]

    def digests(self) -> list[str]:
        """Return the SHA-256 of each ingredient; the files are hashed unless an earlier read did so."""
        if not self.facts.sha256:
            self.facts.sha256[:] = hash_ingredients(self.inputs.ingredients, self.progress)
        return self.facts.sha256

    def keys(self, splits: list[Split]) -> list[list[str]]:
        """Return the cache keys of the ingredients' evaluations on splits, [K][splits]."""
        device = "cuda" if self.recipe.actors.gpus else "cpu"
        setup, torch_version = self.setup, versions()["torch"]
        contents = [setup.contents[s.source] for s in splits]
        for n, split in enumerate(splits):
            if not self.is_whole(split):
                contents[n] = content_key(contents[n], split.rows.tolist())
        known = [(setup.fingerprint, content, device, torch_version) for content in contents]
        which = [digest + i.within for digest, i in zip(self.digests(), self.inputs.ingredients, strict=True)]
        return [[evaluation_key(name, *parts) for parts in known] for name in which]

    def individual(self) -> list[Outcome]:
        """Return the outcome of each ingredient on the held-out set."""
        splits, outcomes = self.held_out, self.facts.outcomes
        if any(s.source not in outcomes for s in splits):
            found = self._evaluated(splits)
            outcomes |= {s.source: [row[n] for row in found] for n, s in enumerate(splits)}
        return [join_outcomes(row) for row in zip(*(outcomes[s.source] for s in splits), strict=True)]

    def on(self, split: Split) -> list[Outcome]:
        """Return the outcome of each ingredient on a split, selected from those on its whole source if these are known."""
        whole = self.facts.outcomes.get(split.source)
        if whole is None and not self.is_whole(split):
            kept = [recall(key) for (key,) in self.keys([self.whole(split.source)])]
            whole = [outcome for outcome in kept if outcome is not None]
        if whole is not None and len(whole) == len(self.inputs.ingredients):
            return [outcome.at(split.rows) for outcome in whole]
        return [outcome for (outcome,) in self._evaluated([split])]

    def _evaluated(self, splits: list[Split]) -> list[list[Outcome]]:
        """Return the outcomes of the ingredients on splits, [K][splits], from the cache where it has them."""
        return individual_outcomes(
            self.pool, [i.path for i in self.inputs.ingredients], self.keys(splits), splits,
            lambda done, total: self.progress("evaluating ingredients", done, total),
        )  # fmt: skip


@contextmanager
def open_session(
    recipe: Recipe,
    inputs: Inputs,
    output: Output,
    learning: bool,
    progress: ProgressCallback,
    resolved_file: Path | None = None,
) -> Iterator[Session]:
    """Connect to Ray, and set up actors on the mesh that this run was started with.

    Args:
        recipe: the recipe of the run.
        inputs: its ingredients.
        output: the output folder, whose state records the mesh.
        learning: True if actors must also hold directions.
        progress: called with what is being done, the units done so far, and the units in total.
        resolved_file: where the mesh is recorded; None: in the state of `output`.
    """
    identity.in_run(output.token())
    for heartbeat in labelled("downloading ingredients", download_all(files_of(inputs.ingredients))):
        progress(*heartbeat)
    progress("connecting to Ray", 0, 1)
    with connect():
        file = output.state("resolved.json") if resolved_file is None else resolved_file
        mesh, cpus, model_batch = _resolve(recipe, inputs, file, learning, progress)
        pool = RayPool(recipe, inputs.ingredients, mesh, cpus)
        try:
            seen = (str(file),) if output.shared_files() else ()
            setup = pool.setup(progress, seen)
            yield Session(recipe, inputs, pool, setup, mesh, cpus, model_batch, progress, subset=inputs.everything)
        finally:
            pool.close()


def _resolve(
    recipe: Recipe, inputs: Inputs, file: Path, learning: bool, progress: ProgressCallback
) -> tuple[Mesh, float, int]:
    """Return mesh, CPUs per actor and model batch, with `auto` resolved as when this run was started.

    If the cluster has shrunk, or the recipe now requests other actors, the mesh differs; the optimization does not.
    """
    requested, (numel, held) = recipe.actors.model_dump(exclude={"by_layer"}), inputs.held
    kept = read_resolved(file)
    if kept is not None and kept["actors"] == requested and has_room(recipe, Mesh(*kept["mesh"]), kept["cpus"]):
        return Mesh(*kept["mesh"]), kept["cpus"], kept["model_batch"]
    try:
        mesh, cpus = resolve_mesh(recipe, numel, held if learning else 0, progress, now=True)
    except RecipeError:
        if kept is None:
            raise
        fewer = with_changes(recipe, {"actors.replicas": "auto", "actors.shards": "auto"})
        mesh, cpus = resolve_mesh(fewer, numel, held if learning else 0, now=True)
    model_batch = planned_model_batch(recipe, inputs, mesh) if kept is None else kept["model_batch"]
    write_resolved(
        {"mesh": [mesh.replicas, mesh.shards], "cpus": cpus, "model_batch": model_batch, "actors": requested}, file
    )
    return mesh, cpus, model_batch


def planned_model_batch(recipe: Recipe, inputs: Inputs, mesh: Mesh) -> int:
    """Return the model batch on this mesh, as `fitting_model_batch` does; adapters take as much memory for any."""
    count = len(inputs.ingredients)
    if inputs.frozen:
        return requested_model_batch(recipe, count)
    return fitting_model_batch(recipe, inputs.layout.numel, count, mesh)


def fitting_model_batch(recipe: Recipe, parameters: int, count: int, mesh: Mesh) -> int:
    """Return the model batch on this mesh; `auto`: all ingredients, or equal parts of them if memory does not hold all."""
    requested, room = requested_model_batch(recipe, count), memory_of_each(mesh)
    if recipe.learn.model_batch != "auto" or recipe.info.kind == "softmax":
        return requested
    parts = (-(-count // n) for n in range(1, count + 1))
    return next((m for m in parts if actor_bytes(recipe, parameters, m, mesh.shards) <= room), 1)


def requested_model_batch(recipe: Recipe, count: int) -> int:
    """Return how many of `count` ingredients move at a time, apart from memory limits; a softmax needs all of them."""
    requested = recipe.learn.model_batch
    return count if requested == "auto" or recipe.info.kind == "softmax" else min(requested, count)
