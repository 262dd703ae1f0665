"""Every command, run once for each of its writes on a disk on which that write fails.

A command fails with a sentence that names a path, and leaves nothing half-written; once the disk works again, a rerun gives
the same result as a run on a disk that never failed. What Ray's actors and trials do is done in this process, so that their
writes are counted, too, always in the same order.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_soup.actors import on_ray, ray_session
from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import explain
from ray_soup.io import lease, storage
from ray_soup.io.cache import cache_at
from ray_soup.io.progress import drain
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups import finished, model_batch, session
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.output import COEFFICIENTS
from ray_soup.soups.report import figures
from ray_soup.soups.run import run
from ray_soup.tune import finetune, search, trainable
from ray_soup.tune.train import train
from tests import tiny
from tests.conftest import values
from tests.faults import FaultyDisk, faulty

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EDQUOT)
Command = Callable[[Path], Any]
"""Writes below a folder; returns what must be the same, however often it failed before."""


# What runs on Ray, in this process


@contextmanager
def in_this_process(beat_s: float = 3600) -> Iterator[None]:
    """Run actors and trials in this process, without heartbeats unless `beat_s` is short, and draw no figures."""

    def pool(recipe: Recipe, ingredients: Any, mesh: Mesh, cpus: float) -> InProcessPool:
        return InProcessPool(recipe, ingredients, mesh, 1)

    def mesh(*_: Any, **__: Any) -> tuple[Mesh, float]:
        return Mesh(1, 1), 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "BEAT_S", beat_s)
        patch.setattr(figures, "drawn", lambda *_: "<svg></svg>")
        for module in (session, finished, search, finetune, ray_session):
            patch.setattr(module, "connect", nullcontext)
        for module in (session, finished, trainable):
            patch.setattr(module, "resolve_mesh", mesh)
        for module in (session, on_ray, trainable):
            patch.setattr(module, "RayPool", pool)
        patch.setattr(model_batch, "memory_of_each", lambda *_: 1 << 40)
        for module in (search, finetune):
            patch.setattr(module, "settle", lambda: None)
            patch.setattr(module, "check_seen", lambda *_: None)
            patch.setattr(module, "wait_for_room", lambda *_: None)
        patch.setattr(search, "_run_trials", _search_trials)
        patch.setattr(finetune, "room_for", lambda _: 1)
        patch.setattr(finetune, "_initialization", _initialization)
        patch.setattr(finetune, "_run_trials", _training_runs)
        yield


def _search_trials(recipe: Recipe, configs: list[Any], output: Any, states: str, progress: Any) -> list[dict[str, Any]]:
    """Learn the soup of each trial as on Ray, one after the other."""
    trials = []
    for number, config in enumerate(configs):
        reported: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainable.tune, "get_context", lambda n=number: SimpleNamespace(get_trial_id=lambda: f"trial{n}"))
            patch.setattr(trainable.tune, "report", lambda metrics, r=reported, **_: r.append(metrics))
            trainable.soup_trainable(recipe, states)({"soup": config})
        trials.append({"trial": number, "id": f"trial{number}", **config, "error": None, **reported[-1]})
    return trials


def _initialization(recipe: Recipe, file: str, progress: Any) -> str:
    drain(train(recipe, {**recipe.finetune.trunk.model_dump(), "seed": 0}, None, file))  # type: ignore[typeddict-item]
    return file


def _training_runs(recipe: Recipe, configs: list[Any], init: str, output: Any, *_: Any, **__: Any) -> list[Any]:
    output.state("trials").mkdir(exist_ok=True)
    found = []
    for number, hyper in enumerate(configs):
        name = f"trials/{number}.safetensors"
        metrics = drain(train(recipe, hyper, init, str(output.state(name))))
        digest = metrics.pop("sha256")
        found.append(finetune._FineTuned(hyper, metrics, name, digest))
    return found


# The commands


def digests(out: Path) -> dict[str, str]:
    """The digests of the files of the model, and of its coefficients."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("model*")}
    assert found
    coefficients = load_coefficients(out / COEFFICIENTS).values
    return {**found, COEFFICIENTS: hashlib.sha256(coefficients.tobytes()).hexdigest()}


def without_data(zoo: Path) -> Recipe:
    """Return the recipe of a uniform soup of three ingredients, in several files."""
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    return make_recipe({"method": "uniform", "model": tiny.SPEC, "ingredients": paths, "shard_size": "10KB"})


def commands_of(zoo: Path, scratch: Path) -> dict[str, Command]:
    """Return the commands, for the zoo of the fixture `zoo`; `scratch` is an empty folder for their inputs."""
    plain = without_data(zoo)
    paths = plain.ingredients
    small = values(zoo, ingredients=paths, learn__epochs=1, learn__batch_size=150)
    grid = {"learn.lr": {"grid": [0.03]}, "scheduler": "none"}
    data = {"train": str(zoo / "train.npz"), "fit": str(zoo / "heldout.npz")}
    epochs = {"trials": 2, "epochs": 1, "randaugment": 0, "trunk": {"epochs": 1, "randaugment": 0}, "batch_size": 150}
    tuned = make_recipe(values(zoo, ingredients=paths, data=data, finetune=epochs))
    whole = scratch / "whole"
    run(plain, whole)

    def soup(make: Callable[[Path], Any]) -> Command:
        def command(folder: Path) -> dict[str, str]:
            make(folder / "out")
            return digests(folder / "out")

        return command

    def same_again(folder: Path) -> list[Any]:
        """Read a finished soup into an empty cache."""
        return [verify(whole), evaluate(make_recipe(small), str(whole), "test")]

    return {
        "uniform": soup(lambda out: run(plain, out)),
        "bake": soup(lambda out: bake_copy(whole, out)),
        "learn": soup(lambda out: run(make_recipe(small), out)),
        "greedy": soup(lambda out: run(make_recipe({**small, "method": "greedy"}), out)),
        "compare": soup(lambda out: compare(make_recipe(small), out)),
        "search": soup(lambda out: search.search(make_recipe({**small, "search": grid}), out)),
        "finetune": lambda folder: finetune.finetune(tuned, folder / "out"),
        "verify and evaluate": same_again,
    }


# The faults


@contextmanager
def on(folder: Path) -> Iterator[None]:
    """Keep the cache and temporary files in `folder`, too."""
    (folder / "tmp").mkdir(exist_ok=True)
    with cache_at(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        patch.setattr(storage, "_HELD", {})  # the copies of remote files in the cache
        yield
    while trainable._KEPT:  # as the end of a worker does
        trainable._KEPT.pop().pool.close()


def fail(command: Command, folder: Path, number: int, fails_at: int, lasts: int = 1) -> tuple[FaultyDisk, str | None, Any]:
    """Run a command with a new cache on a disk on which the writes from `fails_at` on fail.

    Returns the disk, the sentence of a failure, and the result of a success.
    """
    disk = FaultyDisk([folder], number, fails_at, lasts)
    try:
        with on(folder), faulty(disk):
            return disk, None, command(folder)
    except Exception as error:
        sentence, code = explain(error)
        assert code in (1, 2), sentence
        assert "Unexpected error" not in sentence, sentence
        return disk, sentence, None


def check_fault(command: Command, right: Any, folder: Path, number: int, fails_at: int, lasts: int = 1) -> None:
    """Check what a command does if its write `fails_at` fails. Raises AssertionError, which names that write."""
    folder.mkdir()
    disk, sentence, result = fail(command, folder, number, fails_at, lasts)
    assert disk.count > fails_at, f"write {fails_at} was not reached"
    failed = f"{disk.calls[fails_at]} ({' < '.join(disk.places[fails_at][1:4])}): {sentence}"
    if sentence is not None:  # None: nobody needs this file
        assert str(folder) in sentence, failed
        finished = folder / "out" / "run.json"
        assert not finished.exists() or '"exit": 0' not in finished.read_text(), failed
        left = [f for f in folder.rglob("*.tmp*") if f.is_file() and not {"cache", "tmp"} & set(f.parts)]
        assert left == [] or lasts > 1 or failed.startswith("unlink"), failed  # a broken disk cannot be tidied up
        with on(folder):
            result = command(folder)
    assert result == right, failed
    if lasts == 1 and fails_at % 5 == 0 and (folder / "out" / "run.json").exists():
        verify(folder / "out")
    shutil.rmtree(folder)


def writes_of(command: Command, folder: Path) -> tuple[FaultyDisk, Any]:
    """Run a command on a disk that works; return its writes, and its result."""
    folder.mkdir()
    disk, sentence, right = fail(command, folder, errno.EIO, -1, 0)
    assert sentence is None, sentence
    shutil.rmtree(folder)
    return disk, right


def check_faults(command: Command, folder: Path, sample: int | None = None, lasts: int = 1) -> int:
    """Let each write of a command fail, or `sample` of them at even distances; return how many failed."""
    disk, right = writes_of(command, folder / "right")
    assert disk.count > 10
    step = 1 if sample is None else max(1, disk.count // sample)
    chosen = range(step // 2, disk.count, step)
    for fails_at in chosen:
        check_fault(command, right, folder / "one", ERRORS[fails_at % len(ERRORS)], fails_at, lasts)
    return len(chosen)
