"""The folders that training scripts leave: of each run one checkpoint is used, chosen by a rule that is reported.

    transformers   RUN/checkpoint-N/model.safetensors       the model saved at the end, the best by its record, the last
    PEFT, TRL      RUN/checkpoint-N/adapter_model...        the same
    Lightning      RUN/checkpoints/epoch=3-step=12.ckpt     the best by its ModelCheckpoint, or the last
    timm           RUN/model_best.pth.tar, checkpoint-N     model_best, or the last
    torchvision    RUN/model_N.pth, checkpoint.pth          the last
    open_clip      RUN/checkpoints/epoch_N.pt               the last
    torchtitan     RUN/checkpoint/step-N/.metadata          the last
    others         RUN/best.pt, RUN/step_100.pt, ...        the only one, the best by its name, or the last step

Steps of one training are no independent ingredients, so a folder never contributes several of them unseen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.checkpoint_files import ADAPTER_FILES, MODEL_FILES, SHARDED_MODEL, checkpoint_of, is_checkpoint
from ray_soup.io.distributed import METADATA, STATE_FILE
from ray_soup.io.json_files import read_json
from ray_soup.io.progress import drain
from ray_soup.io.rank_files import is_rank_file

SHARDED = {METADATA, SHARDED_MODEL}
"""The names by which a folder is a distributed checkpoint of torch, or has one in it as Accelerate saves it."""
WEIGHTS = {*MODEL_FILES, *ADAPTER_FILES, *SHARDED}
"""The names by which a folder has a model of transformers, or an adapter of PEFT."""
STEP = re.compile(r"checkpoint-(\d+)")
"""Folders of the Trainer of transformers."""
STATE = "trainer_state.json"
NUMBERED = re.compile(r"(.*?(?:epoch|step|iter|iteration|ckpt|checkpoint|global_step)s?[-_=]?)0*(\d+)(\D*)", re.IGNORECASE)
"""Names that end in the number of a step: what stands before it, and after it."""
NO_MODELS = re.compile(r"(?i:.*(optim|sched|rng_state|random_state|scaler|training_args|trainer_state).*)")
"""Names of files in which a script keeps something else than a model."""
NOT_SEARCHED = ("wandb", "__pycache__")
MOST_FOLDERS = 20_000


@dataclass(frozen=True)
class Run:
    """One training run, and the checkpoint that represents it."""

    folder: str
    """Path or URI of the folder with the checkpoints."""
    chosen: str
    """The checkpoint, a file or a folder with a model."""
    rule: str
    """Why it was chosen, as in `the last epoch`."""
    left_out: tuple[str, ...] = ()
    """Names of the other checkpoints in the folder."""


def natural(path: str) -> list[Any]:
    """Return a sort key that puts model_2 before model_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def run_in(folder: str) -> Run | None:
    """Return the run whose checkpoints are in a folder itself, if it has the layout of a known library; otherwise None.

    Raises SoupError if the library's own record of the best checkpoint cannot be read.
    """
    names = storage.listdir(folder) if storage.isdir(folder) else []
    last = os.path.basename(folder.rstrip("/"))
    files = [name for name in names if is_checkpoint(name)]
    if any(map(STEP.fullmatch, names)):
        steps = _steps(folder, names)
        if any(STATE in beside for beside in steps.values()):
            return _of_transformers(folder, names, steps)
    if last == "checkpoints" and any(name.endswith(".ckpt") for name in files):
        return _of_lightning(folder, [name for name in files if name.endswith(".ckpt")])
    epochs = _numbered(files, r"epoch_(\d+)\.pt")
    if last == "checkpoints" and epochs:
        return _run(folder, files, epochs[-1], "the last epoch")
    saved = _numbered(files, r"checkpoint-(\d+)\.pth\.tar")
    if "model_best.pth.tar" in files:
        return _run(folder, files, "model_best.pth.tar", "model_best.pth.tar")
    if saved:
        return _run(folder, files, "last.pth.tar" if "last.pth.tar" in files else saved[-1], "the last epoch")
    epochs = _numbered(files, r"model_(\d+)\.pth")
    if epochs and "checkpoint.pth" in files:
        return _run(folder, files, epochs[-1], "the last epoch")
    sharded = _sharded_steps(folder, names)
    return _run(folder, sharded, sharded[-1], "the last step") if sharded else None


def runs_below(folder: str) -> list[Run]:
    """Return the runs in and below a folder, in natural order.

    Raises RecipeError if nothing says which of several checkpoints in a folder represents a run.
    """
    return [run for place, names in searched(folder) for run in _runs_at(place, names)]


def notes_of(spec: str, runs: Sequence[Run]) -> list[str]:
    """Return one line for each rule by which checkpoints of runs were chosen, with what was left out."""
    notes = []
    for rule in dict.fromkeys(run.rule for run in runs):
        some = [run for run in runs if run.rule == rule]
        left = [f"{storage.join(run.folder, name)}" for run in some for name in run.left_out]
        others = f" {len(left)} other{'s' * (len(left) > 1)} left out, such as {left[0]}." if left else ""
        count = f"{len(some)} runs, of each {rule}" if len(some) > 1 else f"one run, of it {rule}"
        notes.append(f"{spec}: {count}, such as {some[0].chosen}.{others} To choose otherwise, name files with a glob.")
    return notes


def mixed_steps(paths: Sequence[str]) -> list[str]:
    """Return a note if a list of checkpoints has several steps of one run beside other runs, by the names of folders."""
    by_run: dict[str, list[str]] = {}
    for path in paths:
        folder, name = os.path.split(path.rstrip("/"))
        if is_checkpoint(name) and os.path.basename(folder) != "checkpoints":
            folder, name = os.path.split(folder)
        is_step = STEP.fullmatch(name) or (os.path.basename(folder) == "checkpoints" and is_checkpoint(name))
        by_run.setdefault(folder if is_step else path, []).append(name)
    several = {folder: names for folder, names in by_run.items() if len(names) > 1}
    if not several or len(by_run) == 1:
        return []
    folder, names = next(iter(several.items()))
    return [
        f"{len(several)} of {len(by_run)} runs contribute several steps of one training, such as {folder}: "
        f"{', '.join(names[:4])}. To use one checkpoint of each run, name the folder above the runs instead."
    ]


def searched(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and each folder below it in which a run may be, with the names in it; no folder twice.

    A folder with checkpoints is not searched further.
    """
    remote = _tree(root) if storage.is_remote(root) else None
    stack, seen, count = [root], set(), 0
    while stack:
        folder = stack.pop()
        real = folder if remote is not None else os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        count += 1
        if count > MOST_FOLDERS:
            raise RecipeError(
                f"ingredients: {root} has no checkpoints in it, and more than {MOST_FOLDERS:,} folders below it to search. "
                "Name the checkpoints with a glob."
            )
        try:
            names = sorted(remote.get(folder, ())) if remote is not None else storage.listdir(folder)
        except OSError:
            continue
        yield folder, names
        if not has_checkpoints(folder, names):
            below = [n for n in sorted(names, key=natural) if not n.startswith(".") and n not in NOT_SEARCHED]
            paths = [storage.join(folder, name) for name in reversed(below)]
            stack += [path for path in paths if (path in remote if remote is not None else os.path.isdir(path))]


def _tree(root: str) -> dict[str, set[str]]:
    """Return the names in each folder of remote storage below `root`, by one request."""
    tree: dict[str, set[str]] = {root: set()}
    for file in storage.walk(root):
        parts = file.split("/")
        for end in range(len(parts)):
            tree.setdefault(storage.join(root, *parts[:end]) if end else root, set()).add(parts[end])
    return tree


def has_checkpoints(folder: str, names: Collection[str]) -> bool:
    """Return whether a folder has checkpoints in it, or is the run of a library that has a folder for each of them."""
    if any(n in SHARDED or (is_checkpoint(n) and not NO_MODELS.fullmatch(n)) for n in names):
        return True
    return (any(map(STEP.fullmatch, names)) and bool(_steps(folder, names))) or bool(_sharded_steps(folder, names))


def _runs_at(folder: str, names: list[str]) -> list[Run]:
    """Return the run whose checkpoints are in a folder; none if it has no checkpoints. Raises RecipeError."""
    if not has_checkpoints(folder, names):
        return []
    known = run_in(folder)
    if known is not None:
        return [known]
    if any(map(STEP.fullmatch, names)) and (steps := _steps(folder, names)):
        return [_of_transformers(folder, names, steps)]
    whole = checkpoint_of(folder)
    if whole is not None and is_rank_file(whole):
        raise RecipeError(
            f"ingredients: {folder} has the parts of one checkpoint that processes of FSDP saved, and nothing says which of "
            f"such folders are steps of one run. Name the folders of the checkpoints, as in {folder}."
        )
    if whole is not None:
        return [Run(folder, folder, "the model in its folder")]
    files = [name for name in names if is_checkpoint(name) and not NO_MODELS.fullmatch(name)]
    chosen, rule = _by_words(folder, files)
    return [_run(folder, files, chosen, rule)]


def _by_words(folder: str, files: list[str]) -> tuple[str, str]:
    """Return the file that represents a run of an unknown script, and the rule. Raises RecipeError if nothing tells."""
    if len(files) == 1:
        return files[0], "the only checkpoint"
    for word in ("best", "final", "last", "latest"):
        named = [name for name in files if word in re.split(r"[\W_\d]+", name.lower())]
        if len(named) == 1:
            return named[0], f"the one called {word}"
    found = [NUMBERED.fullmatch(name) for name in files]
    if len({(m[1], m[3]) for m in found if m is not None}) == 1 and None not in found:
        return max((m for m in found if m is not None), key=lambda m: int(m[2]))[0], "the last step"
    raise RecipeError(
        f"ingredients: {folder} has {len(files)} checkpoints, and nothing says whether they are steps of one run, or which "
        f"one to use: {', '.join(files[:5])}. Name the ingredients with a glob."
    )


def _run(folder: str, files: Sequence[str], chosen: str, rule: str) -> Run:
    return Run(folder, storage.join(folder, chosen), rule, tuple(name for name in files if name != chosen))


def _numbered(files: Sequence[str], pattern: str) -> list[str]:
    """Return the files whose whole name matches, in the order of the number in them."""
    found = [match for name in files if (match := re.fullmatch(pattern, name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def _steps(folder: str, names: Collection[str]) -> dict[str, list[str]]:
    """Return the folders checkpoint-N that contain a model, in order of N, with the names in each."""
    steps = sorted((int(match[1]), name) for name in names if (match := STEP.fullmatch(name)))
    inside = {name: storage.listdir(storage.join(folder, name)) for _, name in steps}
    return {name: beside for name, beside in inside.items() if WEIGHTS & set(beside)}


def _sharded_steps(folder: str, names: Collection[str]) -> list[str]:
    """Return the distributed checkpoints in folders that are named after a step, as in step-100, in the order of the steps.

    Raises RecipeError if their names do not say that they are steps of one run.
    """
    found = [m for name in names if not is_checkpoint(name) and (m := NUMBERED.fullmatch(name)) and not m[3]]
    found = [m for m in found if SHARDED & set(storage.listdir(storage.join(folder, m[0])))]
    if len({m[1] for m in found}) > 1:
        raise RecipeError(
            f"ingredients: {folder} has {len(found)} checkpoints, and nothing says whether they are steps of one run: "
            f"{', '.join(m[0] for m in found[:5])}. Name the ingredients with a glob."
        )
    return [m[0] for m in sorted(found, key=lambda m: int(m[2]))]


def _of_transformers(folder: str, names: Sequence[str], steps: Mapping[str, list[str]]) -> Run:
    """Choose the model that was saved in the run's own folder, the best step by its record, or the last step."""
    if WEIGHTS & set(names):
        return Run(folder, folder, "the model saved at the end", tuple(steps))
    last = list(steps)[-1]
    if STATE in steps[last]:
        state = {}
        with suppress(OSError, SoupError, ValueError):
            state = read_json(storage.join(folder, last, STATE))
        best = state.get("best_model_checkpoint") if isinstance(state, dict) else None
        name = os.path.basename(best.replace("\\", "/").rstrip("/")) if isinstance(best, str) else ""
        if name in steps:
            return _run(folder, list(steps), name, f"the best by {STATE}")
    return _run(folder, list(steps), last, "the last step")


def _of_lightning(folder: str, files: list[str]) -> Run:
    """Choose the best checkpoint by the record of Lightning's ModelCheckpoint, or the last step. Raises SoupError."""
    others = [name for name in files if not re.match(r"last(-v\d+)?\.ckpt$", name)]
    if len(others) <= 1:
        return _run(folder, files, (others or files)[-1], "the checkpoint that Lightning kept")
    in_order = sorted(others, key=lambda name: (_number(name, "step"), _number(name, "epoch"), natural(name)))
    newest = "last.ckpt" if "last.ckpt" in files else in_order[-1]
    best = {os.path.basename(path.replace("\\", "/")) for path in _best_of_lightning(storage.join(folder, newest))}
    known = best & set(others)
    if len(known) == 1:
        return _run(folder, files, known.pop(), "the best by Lightning's ModelCheckpoint")
    if known or _number(in_order[-1], "step") < 0:
        what = f"several ModelCheckpoints name {', '.join(sorted(known))}" if known else "their names have no step"
        raise RecipeError(f"ingredients: cannot tell which checkpoint in {folder} to use: {what}. Name files with a glob.")
    return _run(folder, files, in_order[-1], "the last step")


def _number(name: str, word: str) -> int:
    """Return the number after a word in a file name, as in epoch=3-step=12.ckpt; -1 if there is none."""
    found = re.search(rf"{word}=(\d+)", name)
    return int(found[1]) if found else -1


def _best_of_lightning(path: str) -> list[str]:
    """Return the paths that the ModelCheckpoints with a monitored figure name as the best, from a checkpoint's state."""
    from ray_soup.io.torch_files import load_torch

    if storage.isdir(path):  # a distributed checkpoint
        path = storage.join(path, STATE_FILE)
    loaded, _ = load_torch(path, drain(storage.local_copy(path)))
    callbacks = loaded.get("callbacks")
    states = [state for state in callbacks.values() if isinstance(state, dict)] if isinstance(callbacks, dict) else []
    found = [str(state["best_model_path"]) for state in states if state.get("monitor") and state.get("best_model_path")]
    return list(dict.fromkeys(found))
