"""One run from recipe to output folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from ray_soup import __version__
from ray_soup.actors import Actors, Watch, connect, resolve_mesh
from ray_soup.bake import bake, mix_range
from ray_soup.blocks import Layout, Partition, partition
from ray_soup.checkpoints import (
    Ingredient,
    check_together,
    combined_sha256,
    open_ingredient,
    open_ingredients,
    sha256_file,
)
from ray_soup.coefficients import (
    Coefficients,
    load_coefficients,
    save_coefficients,
    to_coefficients,
    to_x,
)
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.greedy import best_single, individual_scores, one_hot, uniform
from ray_soup.learn import learn, summary
from ray_soup.models import describe
from ray_soup.recipe import Data, Recipe, dump_recipe, load_recipe
from ray_soup.report import model_card
from ray_soup.shard import Mesh, Ready, buffer_of

LEARNED = ("mehl", "mehl+")
MODEL, COEFFICIENTS = "model.safetensors", "coefficients.safetensors"


def silent(what: str, done: int, total: int) -> None: ...


@dataclass
class Soup:
    """A finished run: its folder, the lines of results.jsonl, and run.json."""

    out: Path
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    was_complete: bool = False


def prepare(recipe: Recipe) -> tuple[list[Ingredient], Layout]:
    """Open and check the ingredients against each other and the model, from headers alone."""
    ingredients = open_ingredients(recipe.ingredients)
    layout = describe(recipe.model)
    check_together(ingredients, layout.state_shapes, layout.tied)
    return ingredients, layout


def run(recipe: Recipe, out: str | Path, watch: Watch = silent) -> Soup:
    """Make the soup that `recipe` describes in the folder `out`; goes on where a run before this one was stopped, or
    returns what is complete. Raises SoupError."""
    out = Path(out).absolute()
    if recipe.data.fit is None and recipe.method != "uniform":
        raise RecipeError("The recipe names no data.fit, held-out data to learn on. Add it: .npz or .parquet.")
    ingredients, layout = prepare(recipe)
    with locked(out):
        complete = _completed(recipe, ingredients, out)
        if complete is not None:
            return complete
        try:
            return _make(recipe, ingredients, layout, out, watch)
        except BaseException as error:
            _record_failure(out, error)
            raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a folder. A lock dies with its process."""
    state = out / "state"
    existed = out.exists()
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"The output folder {out} cannot be made: {error.strerror}.") from error
    lock = FileLock(state / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"Another run is at work in {out}. Wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()
        if not existed and not any(f.name != "lock" for f in state.iterdir()) and len(list(out.iterdir())) == 1:
            shutil.rmtree(out)  # nothing came of it


def _completed(recipe: Recipe, ingredients: list[Ingredient], out: Path) -> Soup | None:
    """The finished soup in `out`, if there is one of this recipe. Raises RecipeError if there is one of another."""
    begun = _begun(recipe, ingredients)
    file = out / "state" / "begun.json"
    foreign = [f.name for f in out.iterdir() if f.name != "state"]
    if not file.exists():
        if foreign:
            raise RecipeError(
                f"{out} is not empty and holds no run of ray-soup (found {', '.join(sorted(foreign)[:4])}). Choose a new "
                "folder."
            )
        _write(file, json.dumps(begun))
        return None
    before = json.loads(file.read_text())
    if before["recipe"] != begun["recipe"]:
        raise RecipeError(f"{out} belongs to another recipe: {_difference(before['recipe'], begun['recipe'])}. "
                          "Choose a new folder, or the old recipe.")  # fmt: skip
    if before["ingredients"] != begun["ingredients"]:
        raise RecipeError(f"{out} was begun with ingredients that have changed since. Choose a new folder.")
    record = _read_record(out)
    if record is None or record.get("exit") != 0:
        return None
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return Soup(out, rows, record, record.get("notes", []), was_complete=True)


def _begun(recipe: Recipe, ingredients: list[Ingredient]) -> dict[str, Any]:
    """What a folder is begun with: the same command finds the same here."""
    return {"recipe": dump_recipe(recipe), "ingredients": [i.identity for i in ingredients]}


def _difference(old: str, new: str) -> str:
    import yaml

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for key, value in values.items():
            lines.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return lines

    a, b = flat(yaml.safe_load(old)), flat(yaml.safe_load(new))
    found = [f"{key} was {a.get(key)} and is now {b.get(key)}" for key in {**a, **b} if a.get(key) != b.get(key)]
    return "; ".join(found[:3])


def _read_record(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / "run.json").read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _record_failure(out: Path, error: BaseException) -> None:
    code = error.exit_code if isinstance(error, SoupError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    shutil.rmtree(out / "state" / "out", ignore_errors=True)
    with suppress(OSError):
        _write(out / "run.json", json.dumps({"exit": code, "error": f"{error}" or type(error).__name__}, indent=1))


def _make(recipe: Recipe, ingredients: list[Ingredient], layout: Layout, out: Path, watch: Watch) -> Soup:
    clock = Clock()
    learning = recipe.method in LEARNED
    folder = out / "state" / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def mix(values: np.ndarray, parts: Partition) -> Coefficients:
        coefficients = Coefficients(
            values,
            tuple(i.name for i in ingredients),
            parts.names,
            dict(zip(layout.names, parts.block.tolist(), strict=True)),
            recipe.buffers,
            layout.tied,
        )
        bake(coefficients, ingredients, folder / MODEL, watch=lambda done, total: watch("mixing", done, total))
        clock.lap("mixing")
        return coefficients

    row: dict[str, Any] = {"model_name": recipe.method}
    record: dict[str, Any] = {"method": recipe.method, "seed": recipe.learn.seed, "exit": 0}
    sha256: list[str] = []
    if recipe.data == Data():
        coefficients = mix(uniform(len(ingredients)), partition(layout, "model"))
        notes = ["The recipe names no data: this soup was not evaluated."]
    else:
        with connect():
            mesh, cpus, model_batch = _resolved(recipe, layout, len(ingredients), out, learning)
            actors = Actors(recipe, ingredients, mesh, cpus, learning)
            try:
                ready = actors.setup(watch)
                clock.lap("start")
                values, parts, figures, notes = _coefficients(
                    recipe, ingredients, layout, actors, ready, model_batch, out, watch
                )
                clock.lap(recipe.method)
                coefficients = mix(values, parts)
                for split in [s for s in ("select", "test") if s in ready.examples]:
                    score = actors.evaluate_file(str(folder / MODEL), split, ready.examples[split])
                    row |= {f"{split}_accuracy": score.accuracy, f"{split}_nll": score.nll}
                clock.lap("evaluation")
                peak = max(actors.peak_memory())
            finally:
                actors.close()
        clock.lap("stop")
        if mesh.shards > 1 and learning:  # gather and scatter among the shards
            figures["wire_bytes_per_step"] += 8 * layout.numel * (mesh.shards - 1) // mesh.shards
        record |= {
            "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus},
            "model_batch": model_batch if learning else None,
            "examples": ready.examples,
            "peak_memory_bytes": peak,
            **figures,
        }
        row |= {"steps": figures.get("steps"), "peak_memory_bytes": peak}
        sha256 = list(ready.sha256)
    sha256 = sha256 or hash_ingredients(ingredients, watch)
    clock.lap("hashing")
    notes += _duplicates(ingredients, sha256)
    record |= {
        "parameters": layout.numel,
        "blocks": len(coefficients.blocks),
        "wall_s": clock.total(),
        "seconds": clock.laps,
        "versions": versions(),
        "ingredients": [{"name": i.name, "path": i.path, "sha256": s} for i, s in zip(ingredients, sha256, strict=True)],
        "notes": notes,
    }
    row["seconds"] = clock.total()
    _publish(recipe, coefficients, [row], record, notes, folder, out)
    return Soup(out, [row], record, notes)


def _resolved(recipe: Recipe, layout: Layout, count: int, out: Path, learning: bool) -> tuple[Mesh, float, int]:
    """Mesh, CPUs of an actor and model batch: what `auto` meant when this run was begun."""
    file = out / "state" / "resolved.json"
    if file.exists():
        kept = json.loads(file.read_text())
        return Mesh(kept["replicas"], kept["shards"]), kept["cpus"], kept["model_batch"]
    mesh, cpus = resolve_mesh(recipe, layout.numel, count if learning else 0)
    asked = recipe.learn.model_batch
    model_batch = count if asked == "auto" else min(asked, count)
    _write(file, json.dumps(
        {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus, "model_batch": model_batch}
    ))  # fmt: skip
    return mesh, cpus, model_batch


def _coefficients(
    recipe: Recipe,
    ingredients: list[Ingredient],
    layout: Layout,
    actors: Actors,
    ready: Ready,
    model_batch: int,
    out: Path,
    watch: Watch,
) -> tuple[np.ndarray, Partition, dict[str, Any], list[str]]:
    """By method: coefficients float64 [K, B], their partition, figures for run.json, and what the user should know."""
    whole = partition(layout, "model")
    count = len(ingredients)
    if recipe.method == "uniform":
        return uniform(count), whole, {}, []
    if recipe.method == "best_single":
        scores = individual_scores(
            actors, ingredients, ready.examples, lambda done, total: watch("evaluating ingredients", done, total)
        )
        best = best_single(scores)
        held_out = {i.name: {"accuracy": s.accuracy, "nll": s.nll} for i, s in zip(ingredients, scores, strict=True)}
        note = f"Best single on fit and select together: {ingredients[best].name}."
        return one_hot(best, count), whole, {"best_single": ingredients[best].name, "held_out": held_out}, [note]
    assert ready.partition is not None
    assert ready.norms is not None
    if ready.partition.count == 0:
        raise IngredientError(f"All {count} ingredients hold the same numbers: there is nothing to learn.")
    state = learn(
        recipe,
        actors,
        ready.norms,
        ready.examples,
        model_batch,
        out / "state" / "learn.pt",
        lambda step, steps, _: watch("learning", step, steps),
    )
    notes = []
    if not state.y.any():
        notes.append("Learning found nothing better on select than the uniform soup: this is the uniform soup.")
    values = to_coefficients(to_x(state.y.numpy(), ready.norms))
    return values, ready.partition, summary(state), notes


def _publish(
    recipe: Recipe,
    coefficients: Coefficients,
    rows: list[dict[str, Any]],
    record: dict[str, Any],
    notes: list[str],
    folder: Path,
    out: Path,
) -> None:
    """Finish the files in `folder`, then move them into `out`, run.json last."""
    try:
        save_coefficients(coefficients, folder / COEFFICIENTS)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "README.md").write_text(model_card(recipe, coefficients, rows, notes))
        record["files"] = {f.name: sha256_file(str(f)) for f in sorted(folder.iterdir())}
        (folder / "run.json").write_text(json.dumps(record, indent=1))
        for file in sorted(folder.iterdir(), key=lambda f: f.name == "run.json"):
            file.replace(out / file.name)
        folder.rmdir()
        (out / "state" / "learn.pt").unlink(missing_ok=True)
    except OSError as error:
        raise SoupError(f"{out} could not be written ({error.strerror}). Free some room, then run it again.") from error


def hash_ingredients(ingredients: list[Ingredient], watch: Watch = silent) -> list[str]:
    """SHA-256 of each ingredient."""
    total = sum(i.nbytes for i in ingredients)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        watch("hashing", min(done, total), total)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda i: combined_sha256([sha256_file(f, count) for f in i.files]), ingredients))


def _duplicates(ingredients: list[Ingredient], sha256: list[str]) -> list[str]:
    first: dict[str, str] = {}
    notes = []
    for ingredient, digest in zip(ingredients, sha256, strict=True):
        if digest in first:
            notes.append(f"{ingredient.name} and {first[digest]} hold the same bytes: one model counts twice.")
        first.setdefault(digest, ingredient.name)
    return notes


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("ray", "torch", "open_clip_torch", "numpy", "safetensors", "numba")
    return {"ray_soup": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now

    def total(self) -> float:
        return round(time.monotonic() - self._start, 3)


# A finished soup


def evaluate(recipe: Recipe, model: str, split: str, watch: Watch = silent) -> dict[str, Any]:
    """Accuracy and NLL of a checkpoint, or of a soup's folder, on one split."""
    path = str(Path(model) / MODEL) if (Path(model) / "run.json").exists() else model
    open_ingredient(path)
    layout = describe(recipe.model)
    with connect():
        mesh, cpus = resolve_mesh(recipe, layout.numel, 0)
        actors = Actors(recipe, [], Mesh(mesh.size, 1), cpus, learning=False)
        try:
            ready = actors.setup(watch)
            if split not in ready.examples:
                raise RecipeError(f"The recipe names no data.{split}; it has {', '.join(ready.examples) or 'none'}.")
            score = actors.evaluate_file(path, split, ready.examples[split])
        finally:
            actors.close()
    return {
        "model_name": model,
        f"{split}_accuracy": score.accuracy,
        f"{split}_nll": score.nll,
        "examples": score.count,
    }


def _finished_record(out: Path) -> dict[str, Any]:
    record = _read_record(out)
    if record is None or record.get("exit") != 0:
        found = "no run.json" if record is None else f"a run that ended with exit code {record.get('exit')}"
        raise RecipeError(f"{out} is not a finished soup: found {found}. Run the command that makes it again.")
    return record


def _of_folder(out: Path) -> tuple[Recipe, dict[str, Any], Coefficients, list[Ingredient]]:
    """Recipe, run.json, coefficients and ingredients of a finished soup."""
    record = _finished_record(out)
    recipe = load_recipe(out / "recipe.yaml")
    coefficients = load_coefficients(out / COEFFICIENTS)
    ingredients = [open_ingredient(i["path"], i["name"]) for i in record["ingredients"]]
    if tuple(i.name for i in ingredients) != coefficients.ingredients:
        raise RecipeError(f"{out}: run.json and {COEFFICIENTS} name different ingredients.")
    names = open_ingredient(str(out / MODEL)).tensors
    check_together(ingredients, {name: info.shape for name, info in names.items()}, coefficients.tied)
    return recipe, record, coefficients, ingredients


def bake_again(out: str | Path, new_out: str | Path, watch: Watch = silent) -> Soup:
    """The soup in `out` again, from its coefficients and the ingredients alone, in a new folder."""
    out, new_out = Path(out).absolute(), Path(new_out).absolute()
    recipe, record, coefficients, ingredients = _of_folder(out)
    with locked(new_out):
        if any(f.name != "state" for f in new_out.iterdir()):
            raise RecipeError(f"{new_out} is not empty. Choose a new folder.")
        sha256 = hash_ingredients(ingredients, watch)
        _same_ingredients(record, ingredients, sha256)
        folder = new_out / "state" / "out"
        folder.mkdir()
        bake(coefficients, ingredients, folder / MODEL, watch=lambda done, total: watch("mixing", done, total))
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        _write(new_out / "state" / "begun.json", json.dumps(_begun(recipe, ingredients)))
        _publish(recipe, coefficients, rows, record, record.get("notes", []), folder, new_out)
    return Soup(new_out, rows, record)


def _same_ingredients(record: dict[str, Any], ingredients: list[Ingredient], sha256: list[str]) -> None:
    for known, ingredient, digest in zip(record["ingredients"], ingredients, sha256, strict=True):
        if known["sha256"] != digest:
            raise IngredientError(
                f"{ingredient.path} has changed since the soup was made: SHA-256 is {digest[:16]}..., was "
                f"{known['sha256'][:16]}.... Bring the old file back."
            )


def verify(out: str | Path, watch: Watch = silent) -> list[str]:
    """Hold a finished soup against itself: hashes of its files, column sums, hashes of the ingredients, and the model
    against its coefficients, bit for bit. Returns what was checked; raises SoupError for the first thing that is wrong."""
    out = Path(out).absolute()
    record = _finished_record(out)
    for name, digest in record["files"].items():
        found = sha256_file(str(out / name)) if (out / name).exists() else "missing"
        if found != digest:
            raise SoupError(f"{out / name}: SHA-256 is {found[:16]}, run.json says {digest[:16]}: the file was changed.")
    _, _, coefficients, ingredients = _of_folder(out)
    off = float(np.abs(coefficients.values.sum(axis=0) - 1).max())
    if off > 1e-12:
        raise SoupError(f"{out / COEFFICIENTS}: a column sums to 1 within {off:.1e} only; expected 1e-12.")
    _same_ingredients(record, ingredients, hash_ingredients(ingredients, watch))
    model = open_ingredient(str(out / MODEL))
    total = len(model.tensors)
    for done, (name, info) in enumerate(model.tensors.items()):
        if name in coefficients.block_of:
            again = mix_range(ingredients, name, coefficients.of(name), 0, info.numel)
        else:
            again = buffer_of(ingredients, name, coefficients.buffers).to(info.dtype)
        if not torch.equal(again.view(torch.uint8), model.read(name).view(torch.uint8)):
            raise SoupError(f"{out / MODEL}: the tensor {name} is not what coefficients and ingredients make.")
        watch("comparing", done + 1, total)
    return [
        f"{len(record['files'])} files have the hashes of run.json",
        f"{coefficients.values.shape[1]} columns sum to 1 within {off:.0e}",
        f"{len(ingredients)} ingredients have the hashes of run.json",
        f"{total} tensors are what coefficients and ingredients make, bit for bit",
    ]
