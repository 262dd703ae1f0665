"""Every file that a run wrote, damaged in every way: read right, or refused with a sentence that names the file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.errors import RecipeError, SoupError
from ray_soup.mixing.coefficients import Coefficients, load_coefficients, save_coefficients
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups import finished, records
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.identity import begun
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.output import open_output
from ray_soup.soups.run import run
from ray_soup.soups.state import LearnState, load_state, save_state
from ray_soup.tune import records as training
from tests import tiny
from tests.conftest import values

FILES = (
    "run.json", "recipe.yaml", "results.jsonl", "coefficients.safetensors", "coefficients.parquet", "report.html",
    "README.md", "model.safetensors", "state/begun.json",
)  # fmt: skip


def flip(position: int) -> Callable[[bytes], bytes]:
    """Return a function that flips one bit of the byte at a position, from the end if it is negative."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position % len(data)] ^= 4
        return bytes(changed)

    return change


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by one byte": lambda data: data[:-1],
    "longer by one byte": lambda data: data + b"x",
    "a bit near the start": flip(3),
    "a bit in the middle": lambda data: flip(len(data) // 2)(data),
    "a bit near the end": flip(-3),
    "garbage": lambda data: random.Random(0).randbytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "deep": lambda data: b"[" * 100_000,
    "null": lambda data: b"null",
    "a list": lambda data: b"[]",
    "no keys": lambda data: b"{}",
    "NaN": lambda data: b'{"exit": NaN}',
    "another text": lambda data: b"<!DOCTYPE html><html>404</html>",
    "reversed": lambda data: data[::-1],
}


def replaced(path: Path, by: str) -> None:
    """Put something that is not a file in the place of a file."""
    path.unlink()
    if by == "a folder":
        path.mkdir()
    elif by == "a FIFO":
        os.mkfifo(path)
    elif by == "a link to nothing":
        path.symlink_to("/nowhere/at/all")
    elif by == "a link to a device":
        path.symlink_to("/dev/zero")


REPLACED = ("a folder", "a link to nothing", "a link to a device")


@pytest.fixture(scope="module")
def recipe(zoo: Path) -> Recipe:
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    return make_recipe({"method": "uniform", "model": tiny.SPEC, "ingredients": paths})


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished uniform soup, which tests only read."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(recipe, out)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


class Reached(Exception):
    """A command has accepted the folder."""


@contextmanager
def reached(*_: Any) -> Iterator[None]:
    raise Reached
    yield


def refused_or(work: Callable[[], Any], out: Path, name: str) -> Any:
    """Return what `work` returns; if it refuses, check that the message names the damaged file."""
    try:
        return work()
    except SoupError as error:
        said = str(error)
    place = out if name in ("run.json", "state/begun.json") else out / name
    assert str(place) in said, f"{name}: {said}"
    return None


def check(recipe: Recipe, whole: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every operation on a folder in which `name` was changed."""
    model = hashlib.sha256((whole / "model.safetensors").read_bytes()).hexdigest()
    lines = refused_or(lambda: verify(out), out, name)
    assert lines is None or name in ("run.json", "state/begun.json")  # whose unimportant letters may differ
    baked = refused_or(lambda: bake_copy(out, out.parent / "new"), out, name)
    if baked is None:
        assert not (out.parent / "new").exists()
    else:
        assert hashlib.sha256((out.parent / "new" / "model.safetensors").read_bytes()).hexdigest() == model
        shutil.rmtree(out.parent / "new")
    before = sorted(out.rglob("*"))
    again = refused_or(lambda: run(recipe, out), out, name)
    if again is None:
        assert sorted(out.rglob("*")) == before  # a folder that was refused is left as it was
    else:
        assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() == model
    monkeypatch.setattr(finished, "connect", reached)
    try:
        assert refused_or(lambda: evaluate(recipe, str(out), "test"), out, name) is None
    except Reached:
        assert name != "model.safetensors"


def changes_of(name: str, every: bool) -> list[Callable[[bytes], bytes]]:
    """All ways to damage a file, or two of them, so that the files together are damaged in all ways."""
    ways, number = list(CHANGES.values()), 2 * FILES.index(name)
    return ways if every else [ways[number % len(ways)], ways[(number + 1) % len(ways)]]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_finished_soup_is_refused_by_name(
    recipe: Recipe, whole: Path, out: Path, name: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (out / name).read_bytes()
    for change in changes_of(name, every):
        (out / name).write_bytes(change(content))
        check(recipe, whole, out, name, monkeypatch)
        shutil.rmtree(out)
        shutil.copytree(whole, out)


@pytest.mark.parametrize("by", ["nothing", "a FIFO", *(pytest.param(by, marks=pytest.mark.slow) for by in REPLACED)])
def test_a_file_that_is_missing_or_no_file_is_refused_by_name(
    recipe: Recipe, whole: Path, out: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        if by == "nothing" and name == "state/begun.json":
            continue  # a finished soup no longer needs its state
        replaced(out / name, by)
        check(recipe, whole, out, name, monkeypatch)
        shutil.rmtree(out)
        shutil.copytree(whole, out)


def test_a_file_of_another_run_is_refused_by_name(
    zoo: Path, recipe: Recipe, whole: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3, 6)]
    run(make_recipe({"method": "uniform", "model": tiny.SPEC, "ingredients": paths}), tmp_path / "other")
    for name in FILES:
        if (tmp_path / "other" / name).read_bytes() == (whole / name).read_bytes():
            continue  # two runs that took equally long write the same results.jsonl
        shutil.copyfile(tmp_path / "other" / name, out / name)
        if name == "run.json":
            with pytest.raises(SoupError, match="was changed: its SHA-256 is"):
                verify(out)
            with pytest.raises(SoupError, match="was changed: its SHA-256 is"):
                bake_copy(out, tmp_path / "new")
        else:
            check(recipe, whole, out, name, monkeypatch)
        shutil.rmtree(out)
        shutil.copytree(whole, out)


# Lists of files


def edit(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change run.json, and its seal with it."""
    record = json.loads((out / "run.json").read_text())
    record.pop("seal")
    change(record)
    records.write_run_record(record, out / "run.json")


def test_an_empty_or_shortened_list_of_files_is_not_all_is_well(out: Path) -> None:
    names = list(json.loads((out / "run.json").read_text())["files"])
    for name in names:
        edit(out, lambda record, name=name: record["files"].pop(name))
        with pytest.raises(RecipeError, match=r"run\.json is damaged \(it does not list \S+, which every finished soup has"):
            verify(out)
    edit(out, lambda record: record.update(files={}))
    with pytest.raises(RecipeError, match="does not list"):
        verify(out)


@pytest.mark.parametrize("name", ["../escape", "/etc/hostname", "state/begun.json"])
def test_a_listed_path_is_refused(out: Path, name: str) -> None:
    edit(out, lambda record: record["files"].update({name: "0" * 64}))
    with pytest.raises(RecipeError, match="expected the name of a file, not a path"):
        verify(out)


def test_a_model_that_is_not_listed_is_refused(out: Path) -> None:
    shutil.copyfile(out / "model.safetensors", out / "model-00001-of-00002.safetensors")
    with pytest.raises(RecipeError, match=r"model-00001-of-00002\.safetensors is not among the files in run\.json"):
        verify(out)


# Coefficients whose digest was changed with them

WRONG: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum 2": lambda c: 2 * c,
    "integers": lambda c: np.eye(len(c))[:, :1].astype(np.int64),
    "NaN": lambda c: np.where(np.arange(len(c))[:, None] == 0, np.nan, c),
    "another K": lambda c: np.concatenate([c, np.zeros_like(c)]),
    "other blocks": lambda c: np.concatenate([c, c], axis=1),
}


def resave(out: Path, **changes: Any) -> None:
    file = out / "coefficients.safetensors"
    found = load_coefficients(file)
    save_coefficients(Coefficients(**{**found.__dict__, **changes}), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(out, lambda record: record["files"].update({file.name: digest}))


@pytest.mark.parametrize("fault", WRONG)
def test_coefficients_that_describe_no_soup_are_not_baked(out: Path, tmp_path: Path, fault: str) -> None:
    resave(out, values=WRONG[fault](load_coefficients(out / "coefficients.safetensors").values))
    for operation in (verify, lambda folder: bake_copy(folder, tmp_path / "new")):
        with pytest.raises(RecipeError, match=rf"{out}/coefficients\.safetensors cannot be read as coefficients"):
            operation(out)
    assert not (tmp_path / "new").exists()


def test_coefficients_for_other_tensors_are_not_baked(out: Path, tmp_path: Path) -> None:
    found = load_coefficients(out / "coefficients.safetensors")
    resave(out, block_of={**found.block_of, "another.weight": 0})
    with pytest.raises(RecipeError, match=r"is for another model: it has a tensor another\.weight"):
        bake_copy(out, tmp_path / "new")
    resave(out, block_of={name: b for name, b in found.block_of.items() if name != "head.bias"})
    with pytest.raises(SoupError, match=r"head\.bias"):
        bake_copy(out, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# State


def damages(file: Path) -> Iterator[str]:
    """Damage a file in every way, and in 60 random ones; yields what was done, and restores the file at the end."""
    content = file.read_bytes()
    draw = random.Random(0)
    ways = {**CHANGES, **{f"bit {n}": flip(draw.randrange(len(content))) for n in range(60)}}
    for what, change in ways.items():
        file.write_bytes(change(content))
        if file.read_bytes() != content:
            yield what
    file.write_bytes(content)


def test_a_damaged_state_is_never_continued(tmp_path: Path) -> None:
    file, y = tmp_path / "learn.pt", torch.zeros(3, 2, dtype=torch.float64)
    state = LearnState(y, "float32", moving=y[:2] + 1, best=y[:2], task="a", curve=[{"turn": 0, "epoch": -1}])
    save_state(state, file)
    outcomes = set()
    for what in damages(file):
        try:
            found = load_state(file, "a", (3, 2))
            assert torch.equal(found.y, y), what
            assert (found.precision, found.curve, found.task) == (state.precision, state.curve, "a"), what
            outcomes.add("right")
        except RecipeError as error:
            outcomes.add(str(error).partition(" is damaged")[0])
    assert str(file) in outcomes
    assert outcomes <= {str(file), "right"}
    for task, shape, said in (
        ("b", (3, 2), "belongs to another recipe"),
        ("a", (4, 2), r"y is \[3, 2\]; expected \[4, 2\]"),
    ):
        with pytest.raises(RecipeError, match=rf"{file} is damaged \(.*{said}"):
            load_state(file, task, shape)


@pytest.mark.parametrize(
    "change",
    [
        {"turn": -1}, {"steps": 1.5}, {"best_cost": float("nan")}, {"y": [[0.0]]}, {"factor": None}, {"precision": 3},
        {"y": torch.full((3, 2), float("nan"), dtype=torch.float64)}, {"y": torch.zeros(3, 2)}, {"curve": [1]},
        {"optimizer": [1]}, {"statistics": {"a": 1}}, {"version": "2"}, {"version": 0}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_state(LearnState(torch.zeros(3, 2, dtype=torch.float64)), tmp_path / "learn.pt")
    torch.save({**torch.load(tmp_path / "learn.pt", weights_only=True), **change}, tmp_path / "learn.pt")
    with pytest.raises(RecipeError, match=r"learn\.pt is damaged"):
        load_state(tmp_path / "learn.pt")


METRICS: training.TrainingMetrics = {"train_loss": 0.5, "accuracy": 0.25}
HYPER: training.Hyperparameters = {
    "lr": 0.1, "wd": 0.0, "epochs": 2, "label_smoothing": 0.0, "mixup": 0.0, "shift": 0, "randaugment": 0, "seed": 1,
}  # fmt: skip
RECORDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "run.json": (
        lambda file: records.write_run_record({"exit": 0}, file), lambda file: records.read_run_record(file.parent),
    ),
    "results.jsonl": (
        lambda file: records.write_results([{"model_name": "a"}], file), lambda file: records.read_results(file.parent),
    ),
    "begun.json": (lambda file: records.write_begun({"recipe": "model: a", "ingredients": []}, file), records.read_begun),
    "resolved.json": (
        lambda file: records.write_resolved({"mesh": [1, 1], "cpus": 1.0, "model_batch": 2, "actors": {}}, file),
        records.read_resolved,
    ),
    "entry.json": (lambda file: records.write_entry({"figures": {"steps": 3}, "notes": []}, file), records.read_entry),
    "metrics.json": (lambda file: training.write_metrics(METRICS, str(file)), training.read_metrics),
    "failures.json": (
        lambda file: training.write_failures([{**HYPER, "error": "e"}], file),
        lambda file: training.read_failures(str(file)),
    ),
    "manifest.json": (
        lambda file: training.write_manifest(
            [{**HYPER, **METRICS, "file": f"model_{k}.safetensors", "sha256": "0" * 64} for k in range(2)], file
        ),
        lambda file: training.read_manifest(str(file)),
    ),
}  # fmt: skip
EDITABLE = ("run.json", "results.jsonl", "begun.json", "metrics.json", "failures.json", "manifest.json")
"""Records without a seal: a changed letter or digit may be read."""


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write, read = RECORDS[name]
    for k in range(2):
        (tmp_path / f"model_{k}.safetensors").touch()
    write(tmp_path / name)
    right = read(tmp_path / name)
    outcomes = set()
    for what in damages(tmp_path / name):
        try:
            assert read(tmp_path / name) == right or what.startswith(("bit", "a bit")) or name in EDITABLE, what
            outcomes.add("read")
        except RecipeError as error:
            outcomes.add(str(tmp_path) in str(error))
    assert True in outcomes
    assert outcomes <= ({True, "read"} if name in EDITABLE else {True})


def test_a_manifest_whose_checkpoints_are_gone_is_refused(tmp_path: Path) -> None:
    RECORDS["manifest.json"][0](tmp_path / "manifest.json")
    with pytest.raises(RecipeError, match=r"model_0\.safetensors is missing, but \S+manifest\.json lists it"):
        training.read_manifest(str(tmp_path / "manifest.json"))


@pytest.mark.slow
def test_a_damaged_start_of_an_unfinished_run_is_refused_by_name(recipe: Recipe, tmp_path: Path) -> None:
    out, now = tmp_path / "out", begun(recipe, open_inputs(recipe).ingredients)
    with open_output(out) as output:
        output.begin(now)
    outcomes = set()
    for _ in damages(out / "state" / "begun.json"):
        try:
            with open_output(out) as output:
                outcomes.add(output.begin(now))
        except RecipeError as error:
            outcomes.add(str(out) in str(error))
    assert outcomes <= {None, True}


# Numbers


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_verify_compares_with_what_the_files_own_libraries_load(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A reader that errs in the same way in every command is noticed."""
    from safetensors.torch import load_file

    from ray_soup.io.ingredient import Ingredient

    for k in range(3):
        state = load_file(zoo / "zoo" / f"model_{k}.safetensors")
        if kind == "pt":
            state["head.weight"] = state["head.weight"].t().contiguous().t()  # strided
            torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / f"{k}.pt")
        else:
            shutil.copyfile(zoo / "zoo" / f"model_{k}.safetensors", tmp_path / f"{k}.safetensors")
    recipe = make_recipe({"method": "uniform", "model": tiny.SPEC, "ingredients": str(tmp_path / f"*.{kind}")})
    run(recipe, tmp_path / "right")
    assert verify(tmp_path / "right")[-1] == (
        "12 sampled tensors equal those computed from the ingredients as their own libraries load them"
    )
    for name in ("read", "read_array"):

        def shifted(self: Ingredient, tensor: str, *where: Any, read: Callable[..., Any] = getattr(Ingredient, name)) -> Any:
            found = read(self, tensor, *where)
            return found + 0.5 if tensor == "query.weight" and self.name == "1" else found

        monkeypatch.setattr(Ingredient, name, shifted)
    run(recipe, tmp_path / "wrong")
    with pytest.raises(SoupError, match=r"model\.safetensors: the tensor query\.weight has \S+ where the ingredients, as"):
        verify(tmp_path / "wrong")


def test_a_sample_has_the_largest_and_the_smallest_tensor(zoo: Path) -> None:
    from ray_soup.io.ingredient import open_ingredient
    from ray_soup.soups.proof import sample_of

    model = open_ingredient(str(zoo / "zoo" / "model_0.safetensors"))
    names = [name for name, info in model.tensors.items() if info.dtype.is_floating_point and name != "mean"]
    c = Coefficients(np.ones((1, 1)), ("a",), ("x",), dict.fromkeys(names, 0))
    chosen = sample_of(c, model)
    sizes = [model.tensors[name].numel for name in names]
    assert {min(sizes), max(sizes)} <= {model.tensors[name].numel for name in chosen}
    assert len(chosen) == len(set(chosen)) == 12


def test_the_new_folder_of_bake_is_apart(out: Path, tmp_path: Path, zoo: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for new in (out, out / "state", out / "new", tmp_path / "out" / ".." / "out" / "new"):
        with pytest.raises(RecipeError, match=r"is inside .*, the soup that is to be rebuilt"):
            bake_copy(out, new)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        bake_copy(out, tmp_path / "full")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "full", tmp_path / "full" / "a"])


def test_a_bake_that_fails_leaves_nothing(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for where in ("bake_model", "write_descriptions"):
        with monkeypatch.context() as patch:
            patch.setattr(finished, where, fail)
            with pytest.raises(OSError, match="No space"):
                bake_copy(out, tmp_path / "a" / "new")
        assert not (tmp_path / "a").exists()


def test_the_files_of_a_soup_have_the_mode_that_the_umask_leaves(recipe: Recipe, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run(recipe, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "out").rglob("*") if f.name not in ("lock", "state")}
    assert modes == dict.fromkeys(modes, 0o644)


def test_a_recipe_of_the_zoo_is_still_evaluated_by_a_relative_path(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Actors have other working directories."""
    seen: list[str] = []
    open_checkpoint = finished.open_checkpoint

    def opened(path: str) -> Any:
        seen.append(path)
        return open_checkpoint(path)

    monkeypatch.setattr(finished, "open_checkpoint", opened)
    monkeypatch.setattr(finished, "connect", reached)
    monkeypatch.chdir(zoo / "zoo")
    with pytest.raises(Reached):
        evaluate(make_recipe({**values(zoo), "model": tiny.SPEC}), "../zoo/model_1.safetensors", "test")
    assert seen == [str(zoo / "zoo" / "model_1.safetensors")]
