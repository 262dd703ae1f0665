"""Train all weights on fit, from a written soup on: the recipe section `polish`, and rows of a comparison.

The model is the written soup plus a difference that is kept beside it, so that coefficients, ingredients and difference
prove it. If no epoch of the training is better on select, the model is the soup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors.messages import TrainingJob, TrainingResult
from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.cache import content_key
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.bake import overwrite_tensors
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.difference import apply_difference, open_difference
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.mixing.spectral import singular_vectors
from ray_soup.recipe import Polish
from ray_soup.soups.baseline import compared
from ray_soup.soups.inputs import CALIBRATION
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import DIFFERENCE, MODEL, Output
from ray_soup.soups.report.measures import Measures, measures_of
from ray_soup.soups.session import Session
from ray_soup.soups.write import bake_any, statistics_of
from ray_soup.task.choices import cost
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome

Outcomes = dict[str, Outcome]
TASK_KEYS = {
    "method", "model", "ingredients", "data", "blocks", "buffers", "learn", "objective", "select_by", "loss", "metric",
    "precision", "out_dtype", "greedy", "schedule",
}  # fmt: skip
"""The keys of a recipe that the weights may depend on."""


class NoMemoryError(SoupError):
    """The memory of a GPU does not suffice to train all weights."""


@dataclass(frozen=True)
class Trained:
    """A model all of whose weights were trained, or the soup that it was trained from if that is better."""

    outcomes: Outcomes
    """Outcomes of the written file, by split."""
    coefficients: Coefficients
    """Those of the soup, with the running statistics of the model."""
    difference: str | None
    """The path or URI of the file of differences; None if the model is the soup."""
    figures: dict[str, Any]
    """For run.json: epochs, lr, best_epoch (from 1; 0 is the soup), precision, steps, image_passes, relative_norm, select
    (before and after) and curve; `diverged` with the learning rates at which the loss was not finite."""


def polish(
    session: Session, output: Output, mixture: Mixture, staging: Path, before: Outcomes, shard_size: int | None = None
) -> tuple[Outcomes, dict[str, Any]]:
    """Train the soup in `staging` as the recipe's section `polish` says, and write the model and its difference there.

    Adds notes, and the model's running statistics, to `mixture`. Returns its outcomes, and the figures for run.json.
    """
    recipe = session.recipe
    assert recipe.polish is not None
    path = staging / MODEL
    made = train_weights(session, output, mixture, path, before, recipe.polish, "polish", "polishing", shard_size)
    mixture.coefficients = made.coefficients
    if made.difference is not None:
        storage.download(made.difference, staging / DIFFERENCE)
    mixture.notes += notes_on(recipe.method, made, before, measures_of(recipe))
    return made.outcomes, made.figures


def train_weights(
    session: Session,
    output: Output,
    mixture: Mixture,
    path: Path,
    before: Outcomes,
    settings: Polish,
    name: str,
    what: str,
    shard_size: int | None = None,
) -> Trained:
    """Train all weights of a written soup, and write the result in its place.

    Args:
        session: the actors, with the recipe and the splits.
        output: the output folder.
        mixture: the coefficients, and how they were found.
        path: the file that the soup was written to; of a model in several files, the name without numbers.
        before: the soup's outcomes on the splits to evaluate on.
        settings: how to train.
        name: beginning of the names of the files that the actors keep until the soup is finished.
        what: what is being done, for progress.
        shard_size: largest model file in bytes; None: one file.

    Raises NoMemoryError if the memory of a GPU does not suffice.
    """
    calibration = session.calibration(CALIBRATION) if len(mixture.coefficients.used()) > 1 else []
    results = _train(session, output, mixture, path, settings, name, what, calibration)
    chosen = min(range(len(results)), key=lambda n: (results[n].cost, n))
    best = results[chosen]
    made = None
    if best.epoch >= 0:
        made = _written(session, output, mixture, path, best, calibration, list(before))
        if not cost(made.outcomes["select"], session.recipe.select_by) < cost(before["select"], session.recipe.select_by):
            made = None  # within rounding
            bake_soup(session, mixture.coefficients, path, shard_size)
    after = before if made is None else made.outcomes
    diverged = [lr for lr, result in zip(settings.rates, results, strict=True) if result.stopped == "diverged"]
    figures = {
        "epochs": settings.epochs,
        "lr": settings.rates[chosen],
        **({"rates": list(settings.rates)} if len(settings.rates) > 1 else {}),
        **({"diverged": diverged} if diverged else {}),
        "best_epoch": 0 if made is None else best.epoch + 1,
        "precision": best.precision,
        "steps": sum(result.steps for result in results),
        "image_passes": sum(result.image_passes for result in results),
        "relative_norm": 0.0 if made is None else made.norm,
        "select": {"before": _on_select(before), "after": _on_select(after)},
        "curve": best.curve,
    }
    if made is None:
        return Trained(before, mixture.coefficients, None, figures)
    return Trained(after, made.coefficients, best.difference, figures)


def _without_evaluations(training: str, progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that reports a training as one phase: the evaluations between its epochs are a part of it."""
    at = (0, 1)

    def report(what: str, done: int, total: int) -> None:
        nonlocal at
        at = (done, total) if what == training else at
        progress(training, *at)

    return report


def _train(
    session: Session,
    output: Output,
    mixture: Mixture,
    path: Path,
    settings: Polish,
    name: str,
    what: str,
    calibration: Sequence[Split],
) -> list[TrainingResult]:
    """Train with each learning rate. Arguments as for `train_weights`."""
    results: list[TrainingResult] = []
    precision = mixture.figures.get("precision") or session.pool.choose_precision()
    start, stem = output.visible_to_actors(file_of(path)), output.kept_by_actors(name)
    for number, lr in enumerate(settings.rates):
        job = TrainingJob(
            f"{what}, lr {lr:g}" if len(settings.rates) > 1 else what,
            start, f"{stem}_{number}", _task(session, mixture.coefficients, settings, lr), lr, settings.wd,
            settings.epochs, settings.batch_size, session.recipe.learn.seed, precision, session.splits["fit"],
            session.splits["select"], tuple(calibration),
        )  # fmt: skip
        session.progress("preparing to train", 0, 1)
        results.append(session.pool.train(job, _without_evaluations(job.what, session.progress)))
        precision = results[0].precision
        if results[-1].stopped == "memory":
            raise NoMemoryError(
                "The memory of the GPU does not suffice to train all weights, which takes 16 bytes a parameter. Lower "
                "learn.micro_batch, set learn.gradient_checkpointing: true, or remove polish."
            )
    return results


@dataclass(frozen=True)
class _Written:
    """A written model all of whose weights were trained."""

    outcomes: Outcomes
    coefficients: Coefficients
    norm: float


def _written(
    session: Session,
    output: Output,
    mixture: Mixture,
    path: Path,
    best: TrainingResult,
    calibration: list[Split],
    splits: Sequence[str],
) -> _Written:
    """Turn the soup's file into the trained model, re-estimate its running statistics, and evaluate it on splits."""
    layout, file = session.inputs.layout, file_of(path)
    difference = open_difference(best.difference, dict(zip(layout.names, layout.shapes, strict=True)))
    norm = apply_difference(difference, file)
    found: Statistics = {}
    model = open_ingredient(str(file))
    for spectral in layout.spectral:
        name = layout.tied.get(spectral.weight, spectral.weight)
        vectors = singular_vectors(model.read(name).view(layout.state_shapes[name]), spectral.dim)
        found |= {key: v.astype(np.float32) for key, v in zip((spectral.u, spectral.v), vectors, strict=True)}
    model.close()
    overwrite_tensors(found, file)
    if calibration:
        statistics = statistics_of(session, output, file, calibration)
        overwrite_tensors(statistics, file)
        found |= statistics
    coefficients = replace(mixture.coefficients, statistics=mixture.coefficients.statistics | found)
    on = {name: session.splits[name] if name in session.splits else session.whole(name) for name in splits}
    outcomes = session.pool.evaluate_file(output.visible_to_actors(file), list(on.values()), session.progress)
    return _Written(dict(zip(on, outcomes, strict=True)), coefficients, norm)


def bake_soup(session: Session, coefficients: Coefficients, path: Path, shard_size: int | None = None) -> None:
    """Write the soup of the session's subset to `path`, with the running statistics that `coefficients` hold."""
    chosen = [session.inputs.ingredients[k] for k in session.subset]
    bake_any(session.recipe, coefficients, chosen, path, session.progress, shard_size)


def file_of(path: Path) -> Path:
    """Return the file to load the model from that was written to `path`: the index if it has several files."""
    index = path.with_name(f"{path.name}.index.json")
    return index if index.exists() else path


def together(figures: Mapping[str, Any], more: Mapping[str, Any], key: str) -> int | None:
    """Return the sum of a cost in two sets of figures; None if neither has it."""
    found = [some[key] for some in (figures, more) if some.get(key) is not None]
    return sum(found) if found else None


def notes_on(name: str, made: Trained, before: Outcomes, measures: Measures) -> list[str]:
    """Return the notes about training the weights of the soup `name`."""
    figures = made.figures
    notes = [
        f"{name}: with the learning rate {lr:g}, the loss on fit was not finite after some steps."
        for lr in figures.get("diverged", ())
    ]
    if made.difference is None:
        return [*notes, f"{name}: no epoch of polish was better on select than the soup itself, so this is the soup."]
    figure = measures.select_by if measures.select_by in ("accuracy", "metric") else "nll"
    change = compared(made.outcomes["select"], before["select"], measures, figure)
    return [
        *notes,
        f"{name}: after mixing, all weights were trained on fit ({figures['best_epoch']} of {figures['epochs']} epochs, "
        f"learning rate {figures['lr']:g}). Select, after training against before: {change}. The model is no longer an "
        f"average of the ingredients: what training added is {figures['relative_norm']:.2%} of the norm of its weights.",
    ]


def _on_select(outcomes: Outcomes) -> dict[str, float]:
    found = {name: getattr(outcomes["select"], name) for name in ("nll", "accuracy", "metric")}
    return {name: value for name, value in found.items() if value is not None}


def _task(session: Session, coefficients: Coefficients, settings: Polish, lr: float) -> str:
    """Return the digest of everything that the trained weights depend on."""
    recipe, sources = session.recipe, {session.splits[name].source for name in ("fit", "select")}
    values = recipe.model_dump(mode="json", include=TASK_KEYS, exclude_defaults=True)
    rows = [session.splits[name].rows.tobytes().hex() for name in ("fit", "select")]
    contents = [session.setup.contents[source] for source in sorted(sources)]
    how = [lr, settings.wd, settings.epochs, settings.batch_size]
    mixed = [coefficients.values.tobytes().hex(), coefficients.ingredients, coefficients.blocks, coefficients.factor]
    return content_key(values, rows, contents, how, mixed, session.digests())
