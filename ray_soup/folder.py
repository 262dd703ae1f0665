"""The output folder of a run: one run at a time, begun for one recipe, finished whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ray_soup import __version__
from ray_soup.checkpoints import Ingredient, sha256_file
from ray_soup.errors import RecipeError, SoupError
from ray_soup.recipe import Recipe, dump_recipe

MODEL, COEFFICIENTS = "model.safetensors", "coefficients.safetensors"


@dataclass
class Soup:
    """A finished run: its folder, the lines of results.jsonl, and run.json."""

    out: Path
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    was_complete: bool = False


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


@contextmanager
def failures_recorded(out: Path) -> Iterator[None]:
    """Write how a run ended into its run.json, if it did not end well."""
    try:
        yield
    except BaseException as error:
        code = error.exit_code if isinstance(error, SoupError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        shutil.rmtree(out / "state" / "out", ignore_errors=True)
        with suppress(OSError):
            write(out / "run.json", json.dumps({"exit": code, "error": f"{error}" or type(error).__name__}, indent=1))
        raise


def begun(recipe: Recipe, ingredients: list[Ingredient], **options: Any) -> dict[str, Any]:
    """What a folder is begun with: the same command finds the same here."""
    return {"recipe": dump_recipe(recipe), "ingredients": [i.identity for i in ingredients], **options}


def completed(out: Path, now: dict[str, Any]) -> Soup | None:
    """The finished run in `out`, if there is one that was begun with the same; else the folder is begun.

    Raises RecipeError if there is another one.
    """
    file = out / "state" / "begun.json"
    foreign = [f.name for f in out.iterdir() if f.name != "state"]
    if not file.exists():
        if foreign:
            raise RecipeError(
                f"{out} is not empty and holds no run of ray-soup (found {', '.join(sorted(foreign)[:4])}). Choose a new "
                "folder."
            )
        write(file, json.dumps(now))
        return None
    before = json.loads(file.read_text())
    if before["recipe"] != now["recipe"]:
        raise RecipeError(f"{out} belongs to another recipe: {_difference(before['recipe'], now['recipe'])}. "
                          "Choose a new folder, or the old recipe.")  # fmt: skip
    if before["ingredients"] != now["ingredients"]:
        raise RecipeError(f"{out} was begun with ingredients that have changed since. Choose a new folder.")
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        raise RecipeError(
            f"{out} was begun with {other[0]} {before.get(other[0])}, and it is now {now.get(other[0])}. Choose a new "
            "folder, or the old options."
        )
    record = read_record(out)
    if record is None or record.get("exit") != 0:
        return None
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return Soup(out, rows, record, record.get("notes", []), was_complete=True)


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


def read_record(out: Path) -> dict[str, Any] | None:
    """run.json, if it is there and whole."""
    try:
        return json.loads((out / "run.json").read_text())
    except (OSError, ValueError):
        return None


def finished_record(out: Path) -> dict[str, Any]:
    """run.json of a run that ended well. Raises RecipeError."""
    record = read_record(out)
    if record is None or record.get("exit") != 0:
        found = "no run.json" if record is None else f"a run that ended with exit code {record.get('exit')}"
        raise RecipeError(f"{out} is not a finished soup: found {found}. Run the command that makes it again.")
    return record


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def new_folder(out: Path) -> Path:
    """An empty folder to finish files in, before `publish`."""
    folder = out / "state" / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def publish(recipe: Recipe, rows: Sequence[dict[str, Any]], record: dict[str, Any], folder: Path, out: Path) -> None:
    """Add recipe, results and run.json to the files in `folder`, then move all into `out`, run.json last."""
    try:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record["files"] = {f.name: sha256_file(str(f)) for f in sorted(folder.iterdir())}
        (folder / "run.json").write_text(json.dumps(record, indent=1))
        for file in sorted(folder.iterdir(), key=lambda f: f.name == "run.json"):
            file.replace(out / file.name)
        folder.rmdir()
        for left in (out / "state").iterdir():
            if left.name not in ("begun.json", "resolved.json", "lock"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise SoupError(f"{out} could not be written ({error.strerror}). Free some room, then run it again.") from error


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("ray", "torch", "open_clip_torch", "numpy", "safetensors", "numba")
    return {"ray_soup": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> float:
        now = time.monotonic()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._last, 3)
        passed, self._last = now - self._last, now
        return passed

    def total(self) -> float:
        return round(time.monotonic() - self._start, 3)
