"""Find ingredients: the checkpoints that a glob, a list, a folder or an experiment of Ray Tune or Train names."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from glob import has_magic
from typing import Any

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io import storage
from ray_soup.io.adapters import open_checkpoint
from ray_soup.io.checkpoint_files import (
    ADAPTER_FILES,
    INDEX,
    checkpoint_of,
    index_in_use,
    is_checkpoint,
    is_of_folder,
    refuse_piece,
    refuse_special,
    shards_of,
    split_key,
    stem,
    suffixes,
)
from ray_soup.io.formats import INDEX_SUFFIXES
from ray_soup.io.hub_path import is_hub, without_commit
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.runs import has_checkpoints, mixed_steps, natural, notes_of, run_in, runs_below, searched
from ray_soup.io.steps import named_step, split_per_trial
from ray_soup.io.sweeps import Sweep, Trial, fine_tuned, is_experiment, read_sweep, split_metric
from ray_soup.io.trajectories import Found, check_per_trial, steps_of_runs, steps_of_trials, would_be_step

Spec = str | Sequence[str]
"""A glob, a folder, a file or an experiment, or a list of them."""


def open_ingredients(spec: Spec | None, reserved: Collection[str] = (), notes: list[str] | None = None) -> list[Ingredient]:
    """Open all checkpoints that `spec` names; reads headers only.

    Args:
        spec: the recipe's key `ingredients`.
        reserved: names that an ingredient may not have, because results.jsonl uses them for methods.
        notes: receives lines about runs: which of their checkpoints are used, and what is left out.

    Raises RecipeError if there are none, IngredientError if one is broken or occurs twice.
    """
    if not spec:
        raise RecipeError("The recipe names no ingredients. Add the key `ingredients:` with a glob, a list or a folder.")
    lines: list[str] = []
    found = _find(spec, lines)
    if len(found) == 1 and lines:
        hint = " To mix steps of the run, append ?per_trial=all or ?per_trial=last:N to its folder."
        raise RecipeError(
            f"ingredients: a soup needs two or more ingredients; found one run. {' '.join(lines)}"
            f"{hint if found[0].step is None else ''}"
        )
    paths, trials = [one.path for one in found], [one.trial for one in found]
    if notes is not None:
        notes += [*lines, *mixed_steps([one.path for one in found if one.trial is None and one.step is None])]
    _check_names(paths)
    names = [t.name for t in trials if t is not None]
    if len(set(names)) < len(paths) or set(names) & set(reserved):
        several = len({one.step.run for one in found if one.step is not None}) > 1
        names = _unique_names(paths, reserved, several)
    opened = [open_checkpoint(path, name) for path, name in zip(paths, names, strict=True)]
    _check_distinct(opened)
    known = zip(opened, found, fine_tuned(paths), strict=True)
    return [one.with_trial(at.trial or noted, at.step or named_step(at.path)) for one, at, noted in known]


def find_checkpoints(spec: Spec) -> list[str]:
    """Return the paths that `spec` names, in natural order (model_2 before model_10).

    For an experiment of Ray Tune or Train these are the checkpoints of its trials. Raises RecipeError if there are none.
    """
    return [found.path for found in _find(spec, [])]


def find_sweeps(spec: Spec | None) -> list[Sweep]:
    """Return the experiments of Ray Tune or Train that `spec` names.

    Args:
        spec: the folder of an experiment, a folder of experiments, a glob or a list. With `?metric=NAME&mode=max` each trial
            is represented by its best checkpoint by that metric, otherwise by its last one.

    Raises RecipeError if there is a metric but no experiment.
    """
    if spec is None or not isinstance(spec, str):
        return [sweep for one in spec or () for sweep in find_sweeps(one)]
    pattern, metric, mode = split_metric(split_key(split_per_trial(spec)[0])[0])
    folders = [pattern] if storage.isdir(pattern) else sorted(_glob(pattern), key=natural)
    experiments = [f for f in folders if is_experiment(f)]
    alone = len(folders) == 1 and storage.isdir(folders[0]) and not is_of_folder(checkpoint_of(folders[0]))
    if not experiments and alone:
        children = sorted((storage.join(folders[0], child) for child in storage.listdir(folders[0])), key=natural)
        if not any(checkpoint_of(child) for child in children):
            experiments = [child for child in children if is_experiment(child)]
    if metric is not None and not experiments:
        raise RecipeError(
            f"ingredients: {spec}: found no experiment of Ray Tune or Train at {pattern}; ?metric= needs one. Check the "
            "path, or remove ?metric=."
        )
    return [read_sweep(folder, metric, mode) for folder in experiments]


def check_apart(spec: Spec | None, out: str) -> None:
    """Check that `spec` would not match a soup in the folder `out`, also by way of links. Raises RecipeError if it would."""
    if spec is None or not isinstance(spec, str):
        for one in spec or ():
            check_apart(one, out)
        return
    plain, of_runs = split_per_trial(spec)
    pattern = split_metric(split_key(plain)[0])[0]
    if storage.is_remote(pattern) != storage.is_remote(out):
        return
    if storage.is_remote(out):
        pattern, folder = pattern.rstrip("/"), out.rstrip("/")
        inside = folder.rpartition("/")[0] == pattern and storage.isdir(pattern)
        found = inside or folder == pattern or _would_match(pattern, folder) or _is_searched(pattern, folder, folder)
    else:
        pattern, folder = os.path.abspath(os.path.expanduser(pattern)), os.path.realpath(out)
        found = _is_searched(pattern, os.path.abspath(out), folder)
        if not has_magic(pattern) or os.path.lexists(pattern):
            named = os.path.realpath(pattern)
            inside = os.path.dirname(named) == folder and os.path.basename(named).startswith(("model", ADAPTER_FILES[0]))
            found = found or inside or named == folder
            pattern = os.path.join(glob.escape(pattern), "*")
        found = found or any(
            _would_match(pattern, path) for path in (os.path.abspath(out), folder, *_aliases(pattern, folder))
        )
    if found or (of_runs is not None and would_be_step(split_key(plain)[0], out)):
        raise RecipeError(
            f"OUT {out} is where the recipe looks for ingredients ({spec}): the next run would use the soup as one. "
            "Choose another folder."
        )


def _is_searched(pattern: str, out: str, folder: str) -> bool:
    """Return whether runs are found by searching folders that `pattern` names, and a soup in `out` would be found, too.

    `folder` is the target of `out` if that is a link, or below one.
    """
    real = str if storage.is_remote(folder) else os.path.realpath
    above = {p[: slash.start()] or "/" for p in (out, folder) for slash in re.finditer("/", p)}
    roots = [pattern] if storage.isdir(pattern) else _glob(pattern) if has_magic(pattern) else []
    roots = [root for root in roots if storage.isdir(root)]
    matched = any(real(root) in above for root in roots) or any(storage.matches(p, pattern) for p in above)
    if not matched and storage.is_remote(folder):  # where no link below can lead there
        return False
    if any(checkpoint_of(path) or is_experiment(path) for root in roots for path in (root, *_children(root, pattern))):
        return False
    if roots == [pattern] and run_in(pattern) is not None:
        return False
    places = [place for root in roots for place in searched(root)]
    matched = matched or any(real(place) in {*above, folder} for place, _ in places)
    return matched and any(has_checkpoints(place, names) for place, names in places)


def _children(folder: str, spec: str) -> list[str]:
    """Return what is in a folder if `spec` is the folder itself and no pattern that matches it."""
    return [storage.join(folder, name) for name in storage.listdir(folder)] if folder == spec else []


def _would_match(pattern: str, folder: str) -> bool:
    """Return whether a pattern matches a folder, or the model of a soup in it."""
    paths = (folder, f"{folder}/model.safetensors", f"{folder}/{ADAPTER_FILES[0]}")
    return any(storage.matches(path, pattern) for path in paths)


def _aliases(pattern: str, folder: str) -> Iterator[str]:
    """Yield the paths below the fixed part of a pattern that lead to `folder`, a real path, by way of links."""
    parts = pattern.split("/")
    for end in range(2, len(parts) + 1):
        start = "/".join(parts[:end])
        for path in _glob(start) if has_magic(start) else [start]:
            real = os.path.realpath(path)
            if real != path and (folder == real or folder.startswith(f"{real.rstrip('/')}/")):
                yield path + folder[len(real.rstrip("/")) :]


def _check_names(paths: list[str]) -> None:
    """Check that paths can be written into reports and shown in a terminal. Raises IngredientError."""
    for path in paths:
        if path != path.encode(errors="replace").decode():
            raise IngredientError(f"{path!a}: this name is not UTF-8 and cannot be written into reports. Rename the file.")
        if any(unicodedata.category(character) == "Cc" for character in path):
            raise IngredientError(f"{path!a}: this name contains a control character. Rename the file.")


def _find(spec: Spec, notes: list[str]) -> list[Found]:
    """Return the path of each checkpoint and the trial that it comes from; adds lines about runs to `notes`."""
    if not isinstance(spec, str):
        return [found for one in spec for found in ([Found(one)] if checkpoint_of(one) else _find(one, notes))]
    whole, (spec, asked) = spec, split_per_trial(spec)
    spec, key = split_key(spec)
    if key:
        again = spec if asked is None else f"{spec}{'&' if '?metric=' in spec else '?'}per_trial={asked}"
        return [found.with_key(key) for found in _find(again, notes)]
    if asked is not None:
        return _find_steps(whole, spec, asked, notes)
    if (
        is_hub(spec) and not has_magic(spec) and checkpoint_of(spec)
    ):  # a repository with one model, and other files beside it
        return [Found(spec)]
    sweeps = _with_trials(spec)
    if not sweeps:
        return [Found(path) for path in _find_files(spec, notes)]
    return [Found(_model_of(trial), trial) for sweep in sweeps for trial in sweep.trials]


def _with_trials(spec: str) -> list[Sweep]:
    """Return the experiments that `spec` names. Raises RecipeError if there are some, and none of them has a trial."""
    sweeps = find_sweeps(spec)
    if sweeps and not any(sweep.trials for sweep in sweeps):
        said = " ".join(sweep.note() or "" for sweep in sweeps)
        raise RecipeError(
            f"ingredients: no finished trial with a checkpoint in {spec}. {said} Finish the sweep first, or fix ?metric=."
        )
    return sweeps


def _find_steps(whole: str, spec: str, asked: str, notes: list[str]) -> list[Found]:
    """Return the steps of the runs or trials that `spec` names; `whole` has ?per_trial=`asked`, too. Raises RecipeError."""
    check_per_trial(whole, asked)
    if split_metric(spec)[1] is not None:
        raise RecipeError(
            f"ingredients: {whole}: ?metric= takes one checkpoint of each trial, and ?per_trial= takes steps. Remove one."
        )
    sweeps = _with_trials(spec)
    if sweeps:
        steps = steps_of_trials(whole, sweeps, asked, notes)
        return [replace(found, path=_model_of(found.trial)) for found in steps if found.trial is not None]
    folders = [spec] if storage.isdir(spec) else sorted(filter(storage.isdir, _glob(spec)), key=natural)
    if not folders and not storage.exists(spec) and not has_magic(spec):
        raise RecipeError(f"ingredients: {spec} does not exist; ?per_trial= needs the folder of a run. Check the path.")
    return steps_of_runs(whole, folders, asked, notes)


def _find_files(spec: str, notes: list[str]) -> list[str]:
    """Return the checkpoints that a glob, a folder or a file names; one of each run, if these are folders of runs."""
    if has_magic(spec) and not storage.exists(spec):
        matches = sorted(_glob(spec), key=natural)
        paths = _checkpoints_among(matches)
        notes += _steps_below(spec, paths, matches) if paths else []
        paths = paths or _of_runs(spec, [m for m in matches if storage.isdir(m)], notes)
    elif storage.isdir(spec):
        if is_of_folder(checkpoint_of(spec)):
            return [spec]
        children = [storage.join(spec, name) for name in storage.listdir(spec)]
        paths = [] if run_in(spec) else _checkpoints_among(children)
        notes += _steps_below(spec, paths, children) if paths else []
        paths = paths or _of_runs(spec, [spec], notes)
    elif storage.exists(spec):
        paths = [spec] if checkpoint_of(spec) else []
    else:
        if not storage.is_remote(spec) and os.path.lexists(spec):
            refuse_special(spec)
        raise RecipeError(
            f"ingredients: {spec} does not exist; expected a glob, a list or a folder of checkpoints. Check the path."
        )
    if not paths:
        refuse_piece(spec)
        folder = spec if storage.isdir(spec) else os.path.dirname(spec)
        there = "nothing that matches" if has_magic(folder) else "no such folder"
        if storage.isfile(spec):
            there = "a file of another kind"
        elif storage.isdir(folder):
            there = ", ".join(storage.listdir(folder)[:5]) or "an empty folder"
        raise RecipeError(
            f"ingredients: no checkpoints at {spec}; found {there}; expected files ending in {suffixes()}. Check the path."
        )
    return paths


def _of_runs(spec: str, folders: Sequence[str], notes: list[str]) -> list[str]:
    """Return one checkpoint of each run in or below folders, and add the rules to `notes`."""
    runs = []
    for folder in folders:
        own = run_in(folder)
        runs += runs_below(folder) if own is None else [own]
    notes += notes_of(spec, runs)
    return [run.chosen for run in runs]


def _steps_below(spec: str, used: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return notes about runs among local `paths` whose steps are not used, because the run's own folder has a model."""
    if storage.is_remote(spec):
        return []
    runs = [run for path in paths if os.path.isdir(path) and (run := run_in(path)) is not None]
    notes = notes_of(spec, [run for run in runs if run.chosen in used])
    notes += [
        f"{run.folder} is a run without a model in its own folder, and was left out. To use it, name {run.chosen}."
        for run in runs
        if run.chosen not in used
    ]
    return notes


def _glob(pattern: str) -> list[str]:
    """Return the paths that match a pattern, in no particular order. Raises IngredientError if `**` would go in circles."""
    if "**" in pattern and not storage.is_remote(pattern):
        _refuse_circles(os.path.expanduser(pattern[: pattern.index("**")].rpartition("/")[0]) or ".")
    return storage.glob(pattern)


def _refuse_circles(pattern: str) -> None:
    """Check that no link below the folders that match `pattern` leads to a folder that contains it. Raises IngredientError.

    Two such links would give 2^40 paths.
    """
    above: list[str] = []  # the real paths of the folders on the way to the current one
    done: set[str] = set()
    stack = [(folder, 0) for folder in glob.glob(pattern)]
    while stack:
        folder, depth = stack.pop()
        del above[depth:]
        real = os.path.realpath(folder)
        if real in above:
            raise IngredientError(f"{folder} is a link to {real}, a folder that contains it. Remove it, or use no `**`.")
        if real in done or not os.access(folder, os.R_OK | os.X_OK):
            continue
        done.add(real)
        above.append(real)
        with os.scandir(folder) as entries:
            # entry.is_dir() would raise an error for a link to itself
            stack += [(entry.path, depth + 1) for entry in entries if os.path.isdir(entry)]


def _checkpoints_among(paths: list[str]) -> list[str]:
    """Return the checkpoints among `paths`, in natural order, without the shards and the old indexes among them.

    Raises IngredientError for what has the name of a checkpoint and is none, such as a FIFO or a broken link.
    """
    found = sorted(paths, key=natural)
    names: dict[str, list[str]] = {}
    for path in found:
        names.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    left_out: set[str] = set()
    for index in (path for path in found if path.endswith(INDEX_SUFFIXES)):
        beside = names[os.path.dirname(index)]
        if os.path.basename(index).removesuffix(INDEX) in beside and not index_in_use(index, beside):
            left_out.add(index)
        else:
            left_out.update(shards_of(index))
    return [path for path in found if path not in left_out and checkpoint_of(path)]


def _model_of(trial: Trial) -> str:
    """Return the file that contains the model in a trial's checkpoint."""
    own = checkpoint_of(trial.path)
    if own is not None:
        return trial.path if is_of_folder(own) else own
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
    """Check that no two ingredients are the same files. Raises IngredientError."""
    seen: dict[Any, str] = {}
    for ingredient in ingredients:
        found = [None if storage.is_remote(file) else os.stat(file) for file in ingredient.files]
        files = tuple((s.st_dev, s.st_ino) if s else file for s, file in zip(found, ingredient.files, strict=True))
        other = seen.get((files, ingredient.key))
        if other is not None:
            raise IngredientError(f"{ingredient.path} and {other} are the same file, which would count twice. Exclude one.")
        seen[files, ingredient.key] = ingredient.path


def _unique_names(paths: list[str], reserved: Collection[str], with_folders: bool = False) -> list[str]:
    """Return file names without suffix if unique and not reserved, otherwise paths, relative to the common folder if any.

    `with_folders` asks for paths in any case.
    """
    plain = [without_commit(path) for path in paths]
    paths = plain if len(set(plain)) == len(plain) else paths
    bare = [split_key(path)[0].rstrip("/") for path in paths]
    stems = [stem(path) if is_checkpoint(path) else os.path.basename(path) for path in bare]
    if not with_folders and len(set(stems)) == len(stems) and not set(stems) & set(reserved):
        return stems
    with suppress(ValueError):  # there is no common folder of a URI and a local path
        root = os.path.commonpath([os.path.dirname(p) for p in paths])
        relative = [os.path.relpath(p, root) for p in paths]
        if not set(relative) & set(reserved):
            return relative
    return paths
