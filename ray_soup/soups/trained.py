"""Rows of a comparison for models all of whose weights were trained on fit: the reference `trained`, and the polished soup.

`trained` shows what the same data buys without mixing: all weights are trained from the uniform soup, with a few learning
rates of which the best on select is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray_soup.actors.placement import MOMENTS_BYTES, actor_bytes, memory_of_each
from ray_soup.io import storage
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.coefficients import load_coefficients, save_coefficients
from ray_soup.mixing.difference import open_difference
from ray_soup.recipe import DEFAULT_METHOD, POLISHED, TRAINED, Polish, Recipe, for_method
from ray_soup.soups.clock import Clock
from ray_soup.soups.comparison import Comparison, SoupEntry, SoupResult
from ray_soup.soups.evaluations import reported
from ray_soup.soups.finished_polished import rebuild
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import Output
from ray_soup.soups.own_evaluation import folder_of_soup
from ray_soup.soups.polish import NoMemoryError, Trained, bake_soup, notes_on, together, train_weights
from ray_soup.soups.records import damaged, read_entry, write_entry
from ray_soup.soups.report.measures import measures_of
from ray_soup.soups.session import Session
from ray_soup.task.outcomes import load_outcomes, save_outcomes

RATES = [1e-4, 3e-4, 1e-3]
"""The learning rates of `trained`."""


@dataclass
class TrainedRows:
    """Results by the name of the row and the seed, and a note for each row that is missing."""

    results: dict[str, dict[int, SoupResult]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def trained_rows(session: Session, output: Output, made: Comparison, wanted: bool) -> TrainedRows:
    """Train all weights from the soups of a comparison.

    Rows that an earlier attempt finished are read from OUT/state/soups, where new ones are kept.

    Args:
        session: the session of the comparison.
        output: the output folder.
        made: its soups.
        wanted: whether there is to be a row `trained`.
    """
    found, recipe = TrainedRows(), session.recipe
    if recipe.polish is not None:
        found.results[POLISHED] = _row(session, output, made, POLISHED, DEFAULT_METHOD, recipe.polish)
    why = "the option --no-trained was given" if not wanted else _why_not(session)
    if why is None:
        learn = for_method(recipe, DEFAULT_METHOD).learn
        settings = Polish(epochs=learn.epochs, lr=RATES, batch_size=learn.batch_size)
        try:
            found.results[TRAINED] = _row(session, output, made, TRAINED, "uniform", settings)
        except NoMemoryError:
            why = "the memory of the GPU does not suffice to train all weights"
    if why is not None:
        found.notes.append(f"{TRAINED}: no row for training all weights on fit, because {why}.")
    return found


def _why_not(session: Session) -> str | None:
    """Return why the weights cannot be trained; None if they can."""
    recipe = session.recipe
    if session.inputs.frozen:
        return "the ingredients are adapters"
    if recipe.actors.by_layer:
        return "actors.by_layer is true"
    numel = session.inputs.layout.numel
    needed = actor_bytes(recipe, numel, session.model_batch, session.mesh.shards)
    needed += MOMENTS_BYTES * numel if recipe.polish is None else 0
    room = memory_of_each(recipe, session.mesh)
    if not recipe.actors.gpus and needed > room:
        return f"it takes about {needed / 1e9:,.1f} GB per actor, and the cluster has {room / 1e9:,.1f} GB"
    return None


def _row(
    session: Session, output: Output, made: Comparison, name: str, method: str, settings: Polish
) -> dict[int, SoupResult]:
    """Return the results of a row by seed: the soups that `method` made of all ingredients, trained further."""
    found, everything = {}, session.inputs.everything
    for seed in made.seeds:
        entries = [SoupEntry(method, everything, s, len(everything)) for s in (seed, made.seeds[0])]
        start = next(made.results[entry] for entry in entries if entry in made.results)
        one = session.with_soup(
            recipe=for_method(session.recipe, method, seed=seed), subset=everything, splits=made.splits[seed]
        )
        found[seed] = _result(one, output, start, name, output.state("soups", file_name_of(name, seed)), settings)
    return found


def file_name_of(name: str, seed: int) -> str:
    """Return the stem of the files of a row and seed in OUT/state/soups."""
    return f"{name.replace(' ', '_')}_seed{seed}"


def _result(session: Session, output: Output, start: SoupResult, name: str, file: Path, settings: Polish) -> SoupResult:
    """Return the result of one row and seed; train the weights unless the files named `file` exist."""
    coefficients, outcomes, made_so = (file.with_name(f"{file.name}.{end}") for end in ("safetensors", "npz", "json"))
    if not made_so.exists():
        assert start.coefficients is not None
        clock, path = Clock(), file.with_name("model.safetensors")
        session.pool.reset_peak()
        bake_soup(session, start.coefficients, path)
        before = {split: start.on(split, session.splits) for split in reported(session.splits)}
        mixture = Mixture(start.coefficients, dict(start.figures))
        made = train_weights(session, output, mixture, path, before, settings, file.name, f"training {name}")
        path.unlink()
        save_outcomes(made.outcomes, outcomes)
        save_coefficients(made.coefficients, coefficients)
        earlier = start.figures if name == POLISHED else {}
        figures = {
            **{key: together(earlier, made.figures, key) for key in ("steps", "image_passes")},
            "seconds": round(clock.lap("training") + earlier.get("seconds", 0.0), 3),
            "peak_memory_bytes": max(*session.pool.peak_memory(), earlier.get("peak_memory_bytes", 0)),
            "ingredients_used": len(made.coefficients.used()),
            "polish": made.figures,
        }
        if made.difference is not None:
            storage.download(made.difference, _difference_file(file))
            figures["difference_sha256"] = sha256_file(str(_difference_file(file)))
        notes = notes_on(name, made, before, measures_of(session.recipe)) if name == POLISHED else _notes_on_trained(made)
        write_entry({"figures": figures, "notes": notes}, made_so)
        output.remove_kept(f"{file.name}_")
    entry = read_entry(made_so)
    return SoupResult(load_outcomes(outcomes), entry["figures"], load_coefficients(coefficients), entry["notes"])


def _notes_on_trained(made: Trained) -> list[str]:
    figures = made.figures
    rates = ", ".join(f"{lr:g}" for lr in figures["rates"])
    if made.difference is None:
        return [f"{TRAINED}: with none of the learning rates {rates}, an epoch was better on select than the uniform soup."]
    return [
        f"{TRAINED} is a reference and no soup: all weights of the uniform soup, trained on fit for {figures['best_epoch']} "
        f"of {figures['epochs']} epochs with the learning rate {figures['lr']:g}, the best on select of {rates}."
    ]


def _difference_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.difference.safetensors")


def difference_of(result: SoupResult, file: Path, inputs: Inputs) -> Ingredient | None:
    """Open the differences of a row and seed, whose files are named `file`; None if the model is the soup.

    Raises RecipeError if the file was changed.
    """
    known, kept = result.figures.get("difference_sha256"), _difference_file(file)
    if known is None:
        return None
    if not kept.is_file() or sha256_file(str(kept)) != known:
        raise damaged(kept, "it is missing, or not as it was written", f"Remove {file}.json to train this model again.")
    return open_difference(str(kept), dict(zip(inputs.layout.names, inputs.layout.shapes, strict=True)))


@contextmanager
def folder_of_trained(
    staging: Path, recipe: Recipe, result: SoupResult, file: Path, inputs: Inputs, progress: ProgressCallback
) -> Iterator[Path]:
    """Write a trained model and its library's files into a folder below `staging`, which is removed afterwards."""
    assert result.coefficients is not None
    with folder_of_soup(staging, recipe, result.coefficients, inputs.ingredients, progress) as folder:
        rebuild(difference_of(result, file, inputs), folder)
        yield folder
