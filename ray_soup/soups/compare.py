"""Make every soup of the paper from the same ingredients, with references, in one table.

Work that the methods share is done once: evaluations of ingredients, directions, decoded data. Test data is read once for
each finished soup and used for reporting only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors.metrics import observed
from ray_soup.io.disk import read_array, write_array, write_bytes
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.adapter_bake import remove_adapter
from ray_soup.mixing.coefficients import load_coefficients, save_coefficients
from ray_soup.recipe import BEST_SINGLE, POLISHED, TRAINED, Recipe, for_method
from ray_soup.soups.baking import all_of, bakers
from ray_soup.soups.baseline import improvement, significance
from ray_soup.soups.clock import Clock
from ray_soup.soups.comparison import (
    NOT_LEARNED,
    REFERENCES,
    SEEDLESS,
    CompareOptions,
    Comparison,
    SharedResults,
    SoupEntry,
    SoupResult,
    diagnosis,
    file_name,
    methods_for,
    methods_on,
    table_entries,
    verdict,
    what_training_gains,
)
from ray_soup.soups.evaluations import cosines, ensemble_outcomes, recall, reported
from ray_soup.soups.finished_polished import rebuild
from ray_soup.soups.foreign import foreign_results
from ray_soup.soups.identity import begun
from ray_soup.soups.inputs import CALIBRATION, Inputs, open_inputs
from ray_soup.soups.kept_soups import check_unchanged, drop_states
from ray_soup.soups.live import LiveTrackers, check_loggers, live_trackers
from ray_soup.soups.make import make
from ray_soup.soups.methods.results import Model
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.outlook import Outlook, expected_work
from ray_soup.soups.output import BOARD, COEFFICIENTS, Output, Soup, open_output
from ray_soup.soups.own_evaluation import (
    check_same_names,
    figures_of_soup,
    folder_of_soup,
    recorded_function,
    recorded_method,
)
from ray_soup.soups.records import RunRecord, read_entry, versions, write_entry
from ray_soup.soups.report.measures import measures_of, recorded
from ray_soup.soups.report.page import Report, html
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.results import with_kinds
from ray_soup.soups.rows import open_rows, row_results
from ray_soup.soups.session import Session, open_session
from ray_soup.soups.trained import difference_of, file_name_of, folder_of_trained, trained_rows
from ray_soup.soups.write import (
    bake_and_evaluate,
    bake_model,
    evaluate_model,
    listed,
    mesh_record,
    remarks,
    stale_statistics,
    write_descriptions,
    write_library_files,
)
from ray_soup.task.adapters import about_base
from ray_soup.task.choices import cost, ranking
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.outcomes import judged, load_outcomes, save_outcomes
from ray_soup.task.preprocess_key import model_of
from ray_soup.task.preprocessing import completed


@shown_in_notebooks
def compare(
    recipe: Recipe,
    out: str | Path,
    options: CompareOptions = CompareOptions(),
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
) -> Soup:
    """Make every soup; write the table, the report and the soup that is best on select to `out`.

    Resumes an interrupted comparison, adds to one with fewer seeds or subsets, and returns a finished one without running
    anything, unless it is to `overwrite` an earlier run. Raises SoupError.
    """
    recipe = resolved_recipe(recipe)
    check_loggers(recipe)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe, needs_fit=True)
    rows = open_rows(recipe, inputs)
    identities = {"rows": {name: opened.identity for name, opened in rows.items()}} if rows else {}
    options.check(len(inputs.ingredients))
    with open_output(out, progress, recipe.ingredients, overwrite) as output:
        soup = output.begin(begun(recipe, inputs.ingredients, compare=options.recorded, **inputs.started, **identities))
        recipe = completed(recipe, inputs.adopted)
        if soup is None:
            with output.recording_failures(), live_trackers(recipe, output) as trackers:
                soup = _compare(recipe, inputs, rows, output, options, progress, trackers)
    return soup.at(out)


def _compare(
    recipe: Recipe,
    inputs: Inputs,
    rows_to_add: dict[str, Ingredient],
    output: Output,
    options: CompareOptions,
    progress: ProgressCallback,
    trackers: LiveTrackers,
) -> Soup:
    clock, staging, progress = Clock(), output.staging(), Outlook(observed(progress))
    with open_session(recipe, inputs, output, True, progress) as session:
        check_unchanged(session, output)
        session.open_store(inputs.everything, "tensor")
        clock.lap("start and directions")
        progress.expect(expected_work(session, options))
        shared = _shared_results(session, output)
        clock.lap("evaluating ingredients")
        made = _make_all(session, output, shared, options, trackers)
        foreign = foreign_results(session, output, output.state("soups"))
        made.foreign = foreign.results | row_results(session, output, rows_to_add)
        trained = trained_rows(session, output, made, options.trained)
        made.trained = trained.results
        clock.lap("soups")
        sha256, mesh, about_data = session.facts.sha256, mesh_record(session), session.setup.notes
        preprocessing = session.preprocessing
    candidates, first = made.candidates, made.first
    label = min(candidates, key=lambda name: cost(candidates[name].on("select", first), recipe.select_by))
    for name, result in made.own.items():
        if result.coefficients is not None:
            save_coefficients(result.coefficients, staging / f"{file_name(name)}.{COEFFICIENTS}")
    coefficients = candidates[label].coefficients
    assert coefficients is not None
    with bakers(recipe, inputs.ingredients, output, progress) as pool:
        writers = all_of(pool, inputs.ingredients, output)
        bake_model(staging, recipe, coefficients, inputs.ingredients, progress, writers)
    if label == POLISHED:
        kept = output.state("soups", file_name_of(label, made.seeds[0]))
        rebuild(difference_of(candidates[label], kept, inputs), staging)
    progress("writing", 0, 1)
    write_library_files(staging, recipe.model)
    clock.lap("mixing")
    _evaluate_rows(recipe, inputs, output, staging, made, progress)
    if recipe.evaluate is not None:
        clock.lap("evaluate")
    record = _record(recipe, inputs, made, label, sha256)
    record["compare"] = options.recorded
    record["notes"] += [*foreign.notes, *trained.notes, *about_data]
    record["preprocessing"] = preprocessing
    record |= {"mesh": mesh, "wall_s": clock.total(), "seconds": clock.laps}  # type: ignore[typeddict-item]
    write_bytes(staging / "report.html", html(_report(recipe, inputs, made, label, record)).encode())
    write_descriptions(staging, recipe, coefficients, record["table"], record, model_of(recipe))
    rows = with_kinds(made.rows(inputs.names), record)
    output.publish(recipe, rows, record, staging, also=("soups", "evaluate"))
    drop_states(output)
    return Soup(output.folder, rows, record, record["notes"])


def _evaluate_rows(
    recipe: Recipe, inputs: Inputs, output: Output, staging: Path, made: Comparison, progress: ProgressCallback
) -> None:
    """Call the recipe's function `evaluate` for each soup of all ingredients, and add what it returns to the soup's row."""
    if recipe.evaluate is None:
        return
    found = []
    soups = [(entry, result) for entry, result in made.results.items() if len(entry.subset) == len(made.individual)]
    for number, (entry, result) in enumerate(soups):
        if result.coefficients is None:  # a model that was removed
            continue
        progress(f"{number + 1}/{len(soups)} evaluate {entry.label}", 0, 1)
        in_folder = partial(folder_of_soup, staging, recipe, result.coefficients, inputs.ingredients, progress)
        found.append((entry.label, figures_of_soup(recipe, output, entry.file, result.coefficients, in_folder)))
        result.figures |= found[-1][1]
    for label, by_seed in made.trained.items():
        for seed, result in by_seed.items():
            assert result.coefficients is not None
            progress(f"evaluate {label}", 0, 1)
            name = file_name_of(label, seed)
            in_folder = partial(folder_of_trained, staging, recipe, result, output.state("soups", name), inputs, progress)
            found.append((label, figures_of_soup(recipe, output, name, result.coefficients, in_folder)))
            result.figures |= found[-1][1]
    check_same_names(recipe.evaluate, found)


def _record(recipe: Recipe, inputs: Inputs, made: Comparison, label: str, sha256: list[str]) -> RunRecord:
    """Return run.json without the mesh and the times."""
    first, own, table = made.first, made.own, made.table()
    ours, single = made.candidates[label].on("select", first), own[BEST_SINGLE].on("select", first)
    trained = made.own_trained
    change, measures = improvement(ours, single), measures_of(recipe)
    notes = [
        *(what_training_gains(label, ours, trained[TRAINED].on("select", first), measures) if TRAINED in trained else ()),
        verdict(label, ours, single, change, measures),
        *significance(change, measures),
        *diagnosis(made.ensemble.on("select", first), single, measures),
        *dict.fromkeys(note for result in [*own.values(), *trained.values()] for note in result.notes),
        *remarks(recipe, inputs, sha256),
        *stale_statistics(recipe, inputs),
    ]
    return {
        "method": label if label in made.methods else label.partition("-m")[0].removesuffix(" polished"),
        **recorded(measures),  # type: ignore[typeddict-item]
        **recorded_function(recipe),
        **_recorded_own(recipe, made),
        "chosen": label,
        "improvement": change,
        "seed": made.seeds[0],
        "seeds": made.seeds,
        "exit": 0,
        "examples": {name: len(split) for name, split in first.items()},
        "parameters": inputs.layout.numel,
        "table": table,
        "tests": made.tests(),
        "eliminations": made.series("dropped", "dropped", made.dropped),
        "counts": made.series("counted", "count", made.counted),
        **made.schedules(),
        **({"polish": trained[label].figures["polish"]} if label == POLISHED else {}),
        **({"trained": trained[TRAINED].figures["polish"]} if TRAINED in trained else {}),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in table if "peak_memory_bytes" in row),
        "versions": versions(),
        "ingredients": listed(inputs.ingredients, sha256),
        **about_base(inputs.ingredients),
        "notes": notes,
    }


def _recorded_own(recipe: Recipe, made: Comparison) -> dict[str, Any]:
    """Return what run.json says about a method of the user's."""
    return recorded_method(recipe, made.own[recipe.method].coefficients is not None) if recipe.info.is_own else {}


def _report(recipe: Recipe, inputs: Inputs, made: Comparison, label: str, record: RunRecord) -> Report:
    own, first = made.own, made.first
    return Report(
        f"{len(inputs.ingredients)} ingredients compared",
        recipe,
        record["table"],
        record,
        {n: r.coefficients for n, r in own.items() if r.coefficients is not None and n not in NOT_LEARNED},
        {name: result.figures["curve"] for name, result in own.items() if "curve" in result.figures}
        | {name: result.figures["polish"]["curve"] for name, result in made.own_trained.items()},
        {n: r.on(judged(first)[0], first) for n, r in (own | made.candidates).items() if n in (BEST_SINGLE, label)},
        made.similarity,
        inputs.steps,
        {n: r.coefficients for n, r in own.items() if r.coefficients is not None and n not in REFERENCES},
        inputs.unit_of_steps,
    )


def _make_all(
    session: Session, output: Output, shared: SharedResults, options: CompareOptions, trackers: LiveTrackers
) -> Comparison:
    learn, count = session.recipe.learn, len(session.inputs.ingredients)
    model_batch = -(-count // 4) if learn.model_batch == "auto" else min(learn.model_batch, count)  # a quarter: the paper's
    seeds = [learn.seed + n for n in range(options.seeds)]
    ranked = ranking(dict(enumerate(session.individual())), session.recipe.select_by)
    shuffled = np.random.default_rng([learn.seed, 4]).permutation(count).tolist()
    dropped = {n: tuple(sorted(ranked[n:])) for n in options.drop_top}
    counted = {n: tuple(sorted(shuffled[:n])) for n in options.by_count}
    methods = methods_for(session.inputs.steps, session.recipe)
    entries = [entry for seed in seeds for entry in table_entries(count, model_batch, seed, methods)]
    for series, subsets in (("dropped", dropped), ("counted", counted)):
        for subset in subsets.values():
            entries += [SoupEntry(method, subset, learn.seed, len(subset)) for method in methods_on(series)]
    entries = list(dict.fromkeys(replace(e, seed=learn.seed) if e.method in SEEDLESS else e for e in entries))
    splits = {seed: session.cut(seed) for seed in seeds}
    results: dict[SoupEntry, SoupResult] = {}
    for number, entry in enumerate(entries):
        prefix = f"{number + 1}/{len(entries)} "

        def progress(what: str, done: int, total: int, prefix: str = prefix) -> None:
            session.progress(prefix + what, done, total)

        one = session.with_soup(
            recipe=for_method(session.recipe, entry.method, seed=entry.seed),
            subset=entry.subset,
            splits=splits[entry.seed],
            model_batch=entry.model_batch,
            state_file=output.state("soups", f"{entry.file}.pt"),
            after_epoch=trackers.curve(scalars(output.folder / BOARD / entry.file, output.state()), entry.file),
            progress=progress,
        )
        results[entry] = _result(one, output, output.state("soups", entry.file))
    return Comparison(**vars(shared), seeds=seeds, model_batch=model_batch, dropped=dropped, counted=counted, splits=splits,
                      results=results, methods=methods)  # fmt: skip


def _shared_results(session: Session, output: Output) -> SharedResults:
    """Evaluate every ingredient and the ensemble on every source, unless an earlier attempt did so."""
    folder = output.state("soups")
    folder.mkdir(exist_ok=True)
    splits = [session.whole(source) for source in session.setup.sizes]
    keys, file = session.keys(splits), folder / "ensemble.npz"
    known = [[outcome for key in row if (outcome := recall(key)) is not None] for row in keys]
    if file.exists() and (folder / "cosines.npy").exists() and all(len(row) == len(splits) for row in known):
        ensemble, similarity = load_outcomes(file), read_array(folder / "cosines.npy")
    else:
        similarity = cosines(session.pool.gram())
        write_array(folder / "cosines.npy", similarity)
        paths = [ingredient.path for ingredient in session.inputs.ingredients]
        known, together = ensemble_outcomes(
            session.pool, paths, keys, splits, lambda done, total: session.progress("evaluating ingredients", done, total),
            output.kept_by_actors(file.stem),
        )  # fmt: skip
        ensemble = {split.source: outcome for split, outcome in zip(splits, together, strict=True)}
        save_outcomes(ensemble, file)
        output.remove_kept(f"{file.stem}.")
    individual = [{s.source: o for s, o in zip(splits, row, strict=True)} for row in known]
    session.facts.outcomes |= {s.source: [outcomes[s.source] for outcomes in individual] for s in splits}
    joint = SoupResult(ensemble, {"ingredients_used": len(individual)})
    return SharedResults([SoupResult(outcomes) for outcomes in individual], joint, similarity)


def _result(session: Session, output: Output, file: Path) -> SoupResult:
    """Return the result of the session's soup; make the soup unless the files named `file` exist."""
    coefficients, outcomes, made_so = (file.with_name(f"{file.name}.{end}") for end in ("safetensors", "npz", "json"))
    if not made_so.exists():
        clock = Clock()
        session.progress(f"preparing {session.recipe.method}", 0, 1)
        session.pool.reset_peak()
        mixture = make(session)
        used = len(mixture.coefficients.used() if isinstance(mixture, Mixture) else session.subset)
        mixture.figures |= {
            "seconds": round(clock.lap("making"), 3),
            "peak_memory_bytes": max(session.pool.peak_memory()),
            "ingredients_used": used,
        }
        model, method = file.with_name("model.safetensors"), session.recipe.method
        on = {s: session.whole(s) for s in session.setup.sizes} if method in SEEDLESS else reported(session.splits)
        if isinstance(mixture, Model):
            mixture.notes.append(
                f"The row of {method} can be compared, and is never chosen; to write it, use `ray-soup learn`."
            )
            found = evaluate_model(session, output, mixture, model, on)
        else:
            found = bake_and_evaluate(session, output, mixture, model, on, session.calibration(CALIBRATION))
            save_coefficients(mixture.coefficients, coefficients)
        save_outcomes(found, outcomes)
        model.unlink(missing_ok=True)
        remove_adapter(model.parent)
        write_entry({"figures": mixture.figures, "notes": mixture.notes}, made_so)
    entry = read_entry(made_so)
    figures: dict[str, Any] = entry["figures"]
    kept = load_coefficients(coefficients) if coefficients.exists() else None
    return SoupResult(load_outcomes(outcomes), figures, kept, entry["notes"])
