"""The session of a run: its inputs, and actors that are set up to work on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors.messages import Mesh, SetupInfo, StoreInfo
from ray_soup.actors.metrics import about_run, observed, recording
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import resolve_mesh
from ray_soup.actors.pool import ActorPool
from ray_soup.actors.ray_session import connect
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.cache import content_key
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.hugging_face import download_all
from ray_soup.io.lifting import files_of, group_of
from ray_soup.io.progress import ProgressCallback, labelled, no_progress
from ray_soup.mixing.blocks import Blocks
from ray_soup.recipe import Recipe, with_changes
from ray_soup.soups.evaluations import evaluation_key, individual_outcomes, recall
from ray_soup.soups.granularity import resolved_blocks
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.model_batch import fitting_model_batch, requested_model_batch
from ray_soup.soups.output import Output
from ray_soup.soups.records import read_resolved, versions, write_resolved
from ray_soup.soups.start import fine_enough
from ray_soup.soups.state import StateCallback, ignore_state
from ray_soup.task import identity
from ray_soup.task.data import Split, calibration_batches, cut_splits
from ray_soup.task.outcomes import Outcome, join_outcomes
from ray_soup.task.preprocessing import with_cut


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
        started = [self.inputs.start.digest] if self.recipe.start and self.inputs.start is not None else []
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
    with connect(about_run(recipe.method, output.uri_of())):
        file = output.state("resolved.json") if resolved_file is None else resolved_file
        mesh, cpus, model_batch = _resolve(recipe, inputs, file, learning, progress)
        pool = RayPool(recipe, inputs.ingredients, mesh, cpus)
        progress = observed(progress)
        try:
            with recording(pool, recipe.method, output.uri_of()):
                seen = (str(file),) if output.shared_files() else ()
                setup = pool.setup(progress, seen)
                yield Session(recipe, inputs, pool, setup, mesh, cpus, model_batch, progress, subset=inputs.everything)
        finally:
            pool.close()


def _resolve(
    recipe: Recipe, inputs: Inputs, file: Path, learning: bool, progress: ProgressCallback
) -> tuple[Mesh, float, int]:
    """Return mesh, CPUs per actor and model batch, with `auto` resolved as when this run was started.

    If the cluster cannot place a single replica of that mesh, or the recipe now requests other actors, the mesh differs; the
    optimization does not.
    """
    requested, (numel, held) = recipe.actors.model_dump(exclude={"by_layer"}), inputs.held
    kept = read_resolved(file)
    before = (Mesh(*kept["mesh"]), kept["cpus"]) if kept is not None and kept["actors"] == requested else None
    try:
        mesh, cpus = resolve_mesh(recipe, numel, held if learning else 0, progress, now=True, kept=before)
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
