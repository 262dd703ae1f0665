"""Make, bake and evaluate a soup by actors that have the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.baseline import NOTHING_TO_COMPARE_WITH, compare_with_best_single
from ray_soup.soups.clock import Clock
from ray_soup.soups.evaluations import cosines, figures_of, reported
from ray_soup.soups.inputs import CALIBRATION
from ray_soup.soups.live import LiveTrackers
from ray_soup.soups.make import make
from ray_soup.soups.methods.results import Model
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import BOARD, MODEL, MODEL_FILES, Output
from ray_soup.soups.polish import polish, together
from ray_soup.soups.report.tables import refitted
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.session import Session
from ray_soup.soups.write import bake_and_evaluate, evaluate_model, mesh_record
from ray_soup.soups.written import WrittenSoup
from ray_soup.task.outcomes import judged


def make_with_actors(session: Session, output: Output, staging: Path, clock: Clock, trackers: LiveTrackers) -> WrittenSoup:
    """Make, bake and evaluate the soup."""
    recipe, learning = session.recipe, session.recipe.info.learns
    session = session.with_soup(
        splits=session.cut(recipe.learn.seed),
        state_file=output.state("learn.pt"),
        after_epoch=trackers.curve(scalars(output.folder / BOARD / recipe.method, output.state())),
    )
    if learning:
        session.open_store(session.subset, session.blocks)
    clock.lap("start")
    session.progress(f"preparing {recipe.method}", 0, 1)
    mixture = make(session)
    mixture.notes += session.setup.notes
    clock.lap(recipe.method)
    peak = max(session.pool.peak_memory())
    similarity = cosines(session.pool.gram()) if learning else None
    if isinstance(mixture, Model):
        outcomes = evaluate_model(session, output, mixture, staging / MODEL, reported(session.splits))
    else:
        outcomes = bake_and_evaluate(
            session, output, mixture, staging / MODEL_FILES[recipe.out_format], reported(session.splits),
            session.calibration(CALIBRATION), recipe.shard_size,
        )  # fmt: skip
    clock.lap("mixing and evaluation")
    polished: dict[str, Any] = {}
    if recipe.polish is not None and isinstance(mixture, Mixture):
        outcomes, polished = polish(session, output, mixture, staging, outcomes, recipe.shard_size)
        clock.lap("polish")
    baseline = compare_with_best_single(session, outcomes)
    clock.lap("best single ingredient")
    if baseline:
        mixture.notes += baseline.notes
    elif "select" not in outcomes:
        mixture.notes.append(f"The recipe has no data.fit. {NOTHING_TO_COMPARE_WITH}")
    figures = mixture.figures
    if session.mesh.shards > 1 and learning:  # the shards of a replica gather parameters and scatter gradients
        shards = session.mesh.shards
        figures["wire_bytes_per_step"] += 8 * session.inputs.layout.numel * (shards - 1) // shards
    record = {
        "mesh": mesh_record(session),
        "model_batch": session.model_batch if learning else None,
        "examples": {name: len(split) for name, split in session.splits.items()},
        "preprocessing": session.preprocessing,
        "peak_memory_bytes": peak,
        **figures,
        **(baseline.record if baseline else {}),
        **({"polish": polished} if polished else {}),
    }
    costs = {key: together(figures, polished, key) for key in ("steps", "image_passes")} | {"peak_memory_bytes": peak}
    models = {BEST_SINGLE: baseline.outcomes} if baseline else {}
    shown = {name: found[judged(found)[0]] for name, found in {**models, recipe.method: outcomes}.items() if found}
    row = figures_of(outcomes) | refitted(figures) | costs
    return WrittenSoup(mixture, row, baseline, record, list(session.facts.sha256), shown, similarity)
