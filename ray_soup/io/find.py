"""Find ingredients: the checkpoints that a glob, a list, a folder or an experiment of Ray Tune or Train names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from glob import has_magic
from typing import Any

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io import storage
from ray_soup.io.checkpoint_files import checkpoint_of, is_checkpoint, shards_of, split_key, stem, suffixes
from ray_soup.io.formats import INDEX_SUFFIXES
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.sweeps import Sweep, Trial, fine_tuned, is_experiment, read_sweep, split_metric

Spec = str | Sequence[str]
"""A glob, a folder, a file or an experiment, or a list of them."""


def open_ingredients(spec: Spec | None, reserved: Collection[str] = ()) -> list[Ingredient]:
    """Open all checkpoints that `spec` names; reads headers only.

    Args:
        spec: the recipe's key `ingredients`.
        reserved: names that an ingredient may not have, because results.jsonl uses them for methods.

    Raises RecipeError if there are none, IngredientError if one is broken or occurs twice.
    """
    if not spec:
        raise RecipeError("The recipe names no ingredients. Add the key `ingredients:` with a glob, a list or a folder.")
    found = _find(spec)
    paths, trials = [path for path, _ in found], [trial for _, trial in found]
    odd = next((path for path in paths if path != path.encode(errors="replace").decode()), None)
    if odd is not None:
        raise IngredientError(f"{odd!a}: this name is not UTF-8 and cannot be written into reports. Rename the file.")
    names = [t.name for t in trials if t is not None]
    if len(set(names)) < len(paths):
        names = _unique_names(paths, reserved)
    opened = [open_ingredient(path, name) for path, name in zip(paths, names, strict=True)]
    _check_distinct(opened)
    notes = zip(trials, fine_tuned(paths), strict=True)
    return [ingredient.with_trial(trial or noted) for ingredient, (trial, noted) in zip(opened, notes, strict=True)]


def find_checkpoints(spec: Spec) -> list[str]:
    """Return the paths that `spec` names, in natural order (model_2 before model_10).

    For an experiment of Ray Tune or Train these are the checkpoints of its trials. Raises RecipeError if there are none.
    """
    return [path for path, _ in _find(spec)]


def find_sweeps(spec: Spec | None) -> list[Sweep]:
    """Return the experiments of Ray Tune or Train that `spec` names.

    Args:
        spec: the folder of an experiment, a folder of experiments, a glob or a list. With `?metric=NAME&mode=max` each trial
            is represented by its best checkpoint by that metric, otherwise by its last one.

    Raises RecipeError if there is a metric but no experiment.
    """
    if spec is None or not isinstance(spec, str):
        return [sweep for one in spec or () for sweep in find_sweeps(one)]
    pattern, metric, mode = split_metric(split_key(spec)[0])
    folders = [pattern] if storage.isdir(pattern) else sorted(storage.glob(pattern), key=_natural)
    experiments = [f for f in folders if is_experiment(f)]
    if not experiments and len(folders) == 1 and storage.isdir(folders[0]):
        children = sorted((storage.join(folders[0], child) for child in storage.listdir(folders[0])), key=_natural)
        if not any(checkpoint_of(child) for child in children):
            experiments = [child for child in children if is_experiment(child)]
    if metric is not None and not experiments:
        raise RecipeError(
            f"ingredients: {spec}: found no experiment of Ray Tune or Train at {pattern}; ?metric= needs one. Check the "
            "path, or remove ?metric=."
        )
    return [read_sweep(folder, metric, mode) for folder in experiments]


def check_apart(spec: Spec | None, out: str) -> None:
    """Check that `spec` would not match a soup in the folder `out`. Raises RecipeError if it would."""
    if spec is None or not isinstance(spec, str):
        for one in spec or ():
            check_apart(one, out)
        return
    pattern, folder = (
        s.rstrip("/") if storage.is_remote(s) else os.path.abspath(s) for s in (split_metric(split_key(spec)[0])[0], out)
    )
    inside = storage.isdir(pattern) and folder.rpartition("/")[0] == pattern
    found = has_magic(pattern) and any(storage.matches(p, pattern) for p in (folder, f"{folder}/model.safetensors"))
    if inside or found:
        raise RecipeError(
            f"OUT {out} is where the recipe looks for ingredients ({spec}): the next run would use the soup as one. "
            "Choose another folder."
        )


def _find(spec: Spec) -> list[tuple[str, Trial | None]]:
    """Return the path of each checkpoint and the trial that it comes from."""
    if not isinstance(spec, str):
        return [found for one in spec for found in ([(one, None)] if checkpoint_of(one) else _find(one))]
    spec, key = split_key(spec)
    if key:
        return [(f"{path}?key={key}", trial) for path, trial in _find(spec)]
    sweeps = find_sweeps(spec)
    if not sweeps:
        return [(path, None) for path in _find_files(spec)]
    if not any(sweep.trials for sweep in sweeps):
        notes = " ".join(sweep.note() or "" for sweep in sweeps)
        raise RecipeError(f"ingredients: no finished trial with a checkpoint in {spec}. {notes} Finish the sweep first.")
    return [(_model_of(trial), trial) for sweep in sweeps for trial in sweep.trials]


def _find_files(spec: str) -> list[str]:
    """Return the checkpoints that a glob, a folder or a file names."""
    if has_magic(spec) and not storage.exists(spec):
        found = sorted(storage.glob(spec), key=_natural)
        paths = [p for p in _without_shards(_check_links(found)) if checkpoint_of(p)]
    elif storage.isdir(spec):
        children = sorted((storage.join(spec, child) for child in storage.listdir(spec)), key=_natural)
        paths = _without_shards([c for c in _check_links(children) if checkpoint_of(c)])
    elif storage.exists(spec):
        paths = [spec] if checkpoint_of(spec) else []
    else:
        raise RecipeError(
            f"ingredients: {spec} does not exist; expected a glob, a list or a folder of checkpoints. Check the path."
        )
    if not paths:
        folder = spec if storage.isdir(spec) else os.path.dirname(spec)
        there = "nothing that matches" if has_magic(folder) else "no such folder"
        if storage.isdir(folder):
            there = ", ".join(storage.listdir(folder)[:5]) or "an empty folder"
        raise RecipeError(
            f"ingredients: no checkpoints at {spec}; found {there}; expected files ending in {suffixes()}. Check the path."
        )
    return paths


def _without_shards(files: list[str]) -> list[str]:
    """Leave out the shards of the indexes among `files`."""
    shards = {shard for index in files if index.endswith(INDEX_SUFFIXES) for shard in shards_of(index)}
    return [f for f in files if f not in shards]


def _check_links(paths: list[str]) -> list[str]:
    """Return `paths`. Raises IngredientError for a broken link that has the name of a checkpoint."""
    for path in paths:
        if not storage.is_remote(path) and is_checkpoint(path) and os.path.islink(path) and not os.path.exists(path):
            raise IngredientError(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Restore that file, or remove the link."
            )
    return paths


def _model_of(trial: Trial) -> str:
    """Return the file that contains the model in a trial's checkpoint."""
    own = checkpoint_of(trial.path)
    if own is not None:
        return own
    files = sorted(name for name in storage.listdir(trial.path) if is_checkpoint(name))
    models = [name for name in files if "model" in name.lower()]
    chosen = files if len(files) == 1 else models
    if len(chosen) != 1:
        raise IngredientError(
            f"{trial.path}: cannot tell which file is the model. Found {', '.join(files) or 'no checkpoint'}; expected one "
            f"file ending in {suffixes()}, or one with `model` in its name. Use a glob instead."
        )
    return storage.join(trial.path, chosen[0])


def _check_distinct(ingredients: list[Ingredient]) -> None:
    """Check that no two ingredients are the same file. Raises IngredientError."""
    paths = [ingredient.path for ingredient in ingredients]
    seen: dict[Any, str] = {}
    for ingredient in ingredients:
        file = ingredient.files[0]
        found = None if storage.is_remote(file) else os.stat(file)
        other = seen.setdefault(((found.st_dev, found.st_ino) if found else file, ingredient.key), ingredient.path)
        if other != ingredient.path or paths.count(ingredient.path) > 1:
            raise IngredientError(f"{ingredient.path} and {other} are the same file, which would count twice. Exclude one.")


def _unique_names(paths: list[str], reserved: Collection[str]) -> list[str]:
    """Return file names without suffix if unique and not reserved, otherwise paths relative to the common folder."""
    bare = [split_key(path)[0].rstrip("/") for path in paths]
    stems = [stem(path) if is_checkpoint(path) else os.path.basename(path) for path in bare]
    if len(set(stems)) == len(stems) and not set(stems) & set(reserved):
        return stems
    root = os.path.commonpath([os.path.dirname(p) for p in paths]) if len(paths) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(p, root) for p in paths]


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
