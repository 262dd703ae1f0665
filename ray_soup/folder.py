"""The output folder of a run, local or in a storage: one run at a time, begun for one recipe, finished whole or not at
all."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ray_soup import __version__, storage
from ray_soup.actors import Watch, quiet
from ray_soup.cache import cache_folder, content_key
from ray_soup.checkpoints import Ingredient, check_apart, sha256_file
from ray_soup.errors import RecipeError, SoupError
from ray_soup.recipe import Recipe, dump_recipe

MODEL, COEFFICIENTS, TABLE = "model.safetensors", "coefficients.safetensors", "coefficients.parquet"
BOARD = "tensorboard"
BEAT_S, LEASE_S = 5, 30
SMALL = 1 << 26  # bytes up to which a file is not a model


@dataclass
class Soup:
    """A finished run: its folder, the lines of results.jsonl, and run.json."""

    out: Path | str
    rows: list[dict[str, Any]]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    was_complete: bool = False

    def at(self, out: str | Path) -> Soup:
        """The same, once it lies at `out`."""
        return replace(self, out=str(out) if storage.is_remote(str(out)) else self.out)


class Lease:
    """A file that says that a run is at work, rewritten every BEAT_S. One that stays as it is for LEASE_S is a dead run's
    and is taken over. `beat` is called after every rewriting."""

    def __init__(self, file: str, watch: Watch, beat: Callable[[], None] = lambda: None):
        self._file, self._watch, self._beat = file, watch, beat
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex, "beat": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        other = self._read()
        for waited in range(LEASE_S):
            if other is None or self._is_dead(other):
                break
            self._watch(f"is the run on {other['host']} alive", waited, LEASE_S)
            time.sleep(1)
            now = self._read()
            if now is not None and now != other:
                self._refuse(now)
            other = now
        self._write()
        if storage.is_remote(self._file):
            time.sleep(1)  # of two that begin at the same time the last writer goes on
        now = self._other()
        if now is not None:
            self._refuse(now)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(SoupError):
            if self._other() is None:
                storage.remove(self._file)

    def check(self) -> None:
        """Raises SoupError if the run was taken for dead, and its place is another's."""
        other = self._other()
        if other is not None:
            raise SoupError(
                f"This run gave no sign for {LEASE_S} s, and process {other['pid']} on {other['host']} took its place "
                f"in {self._file.removesuffix('/state/lease')}: nothing more is written there."
            )

    def _other(self) -> dict[str, Any] | None:
        found = self._read()
        return found if found is not None and found["run"] != self._mine["run"] else None

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(storage.read_bytes(self._file))
            return found if {"host", "pid", "run"} <= set(found) else None
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _write(self) -> None:
        self._mine["beat"] += 1
        storage.write_bytes(json.dumps(self._mine).encode(), self._file)

    def _is_dead(self, other: dict[str, Any]) -> bool:
        """A process of this machine that is no more. Beside a local file there is a lock, which is ours."""
        here = other["host"] == self._mine["host"]
        return here and not (storage.is_remote(self._file) and psutil.pid_exists(other["pid"]))

    def _refuse(self, other: dict[str, Any]) -> None:
        where = self._file.removesuffix("/state/lease")
        raise RecipeError(
            f"Another run is at work in {where}: process {other['pid']} on {other['host']}. Wait for it, or choose another "
            "folder."
        )

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(SoupError, OSError):  # the storage may be back at the next beat; what matters is tried at the end
                if self._other() is not None:  # this process was stopped, and taken for dead
                    return
                self._write()
                self._beat()


class Mirror:
    """A folder on this machine that stands for an output folder in a storage."""

    def __init__(self, uri: str):
        self.uri, self.folder = uri, cache_folder() / "out" / content_key(uri)
        self._known: dict[str, tuple[int, int]] = {}
        self._pushing = threading.Lock()

    def fetch(self) -> None:
        """What is in the storage; of models only that they are there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "state").mkdir(parents=True)
        for name, found in storage.walk(self.uri).items():
            if name == "state/lease":
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            is_model = name.endswith(".safetensors") and found.size > SMALL
            target.write_bytes(b"" if is_model else storage.read_bytes(storage.join(self.uri, name)))
            self._known[name] = self._state(target)

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        found = file.stat()
        return found.st_size, found.st_mtime_ns

    def push(self, only: str = "", watch: Watch = quiet) -> None:
        """Upload what has changed since, run.json last; what is gone here goes there."""
        with self._pushing:
            files = {str(f.relative_to(self.folder)): f for f in self.folder.rglob("*") if f.is_file()}
            here = {
                name: file
                for name, file in files.items()
                if name.startswith(only) and not name.startswith("state/out/") and not name.endswith((".tmp", "/lock"))
            }
            changed = {}
            for name, file in sorted(here.items(), key=lambda item: item[0] == "run.json"):
                with suppress(FileNotFoundError):  # thrown away just now
                    if self._known.get(name) != (state := self._state(file)):
                        changed[name] = state
            total, done = sum(size for size, _ in changed.values()), 0
            for name, state in changed.items():
                watch("uploading", done, total)
                with suppress(FileNotFoundError):
                    storage.upload(self.folder / name, storage.join(self.uri, name))
                    self._known[name] = state
                done += state[0]
            for name in [n for n in self._known if n.startswith(only) and n not in here]:
                storage.remove(storage.join(self.uri, name))
                del self._known[name]

    def tidy(self) -> None:
        """What is left of the state in the storage and is not here goes."""
        for name in storage.walk(f"{self.uri}/state"):
            if name != "lease" and not (self.folder / "state" / name).exists():
                storage.remove(f"{self.uri}/state/{name}")


_MIRRORS: dict[Path, Mirror] = {}  # of the runs at work in this process, by their folders
_LEASES: dict[Path, Lease] = {}  # likewise


@contextmanager
def locked(out: str | Path, watch: Watch = quiet, ingredients: str | Sequence[str] | None = None) -> Iterator[Path]:
    """One run at a time in the output folder `out`, which may not lie where the recipe looks for `ingredients`. Yields the
    folder to work in: itself, or for a URI one on this machine, whose state is uploaded every BEAT_S, and all of it at the
    end."""
    if not str(out):
        raise RecipeError("OUT is empty; expected a folder, or a URI such as s3://bucket/folder.")
    check_apart(ingredients, str(out))
    if not storage.is_remote(str(out)):
        with _locked_here(Path(out).absolute(), watch) as folder:
            yield folder
        return
    uri = str(out).rstrip("/")
    storage.check_uri(uri)
    mirror = Mirror(uri)
    with Lease(f"{uri}/state/lease", watch, lambda: mirror.push("state/")) as lease:
        mirror.fetch()
        _MIRRORS[mirror.folder], _LEASES[mirror.folder] = mirror, lease
        try:
            yield mirror.folder
        except BaseException as error:
            with suppress(SoupError):
                lease.check()
                mirror.push()
            if isinstance(error, SoupError):
                raise type(error)(str(error).replace(str(mirror.folder), uri)) from error
            raise
        else:
            lease.check()
            mirror.push(watch=watch)
            mirror.tidy()
        finally:
            del _MIRRORS[mirror.folder], _LEASES[mirror.folder]
    shutil.rmtree(mirror.folder, ignore_errors=True)


def seen_by_actors(file: Path) -> str:
    """The path or URI that actors on any node find a file of an output folder under."""
    for folder, mirror in _MIRRORS.items():
        if folder in file.parents:
            uri = storage.join(mirror.uri, "state", "evaluated")
            parts = set(json.loads(file.read_text())["weight_map"].values()) if file.suffix == ".json" else set()
            for name in (*parts, file.name):
                storage.upload(file.with_name(name), storage.join(uri, name))
            return storage.join(uri, file.name)
    return str(file)


def shared_files(out: Path) -> tuple[str, ...]:
    """A file of a local output folder, which actors on every node should see."""
    mirrored = any(folder in (out, *out.parents) for folder in _MIRRORS)
    return () if mirrored else (str(out / "state" / "resolved.json"),)


@contextmanager
def _locked_here(out: Path, watch: Watch) -> Iterator[Path]:
    """A lock dies with its process; the lease beside it is for other machines that see the same disk."""
    state = out / "state"
    try:
        existed = out.exists()
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"The output folder {out} cannot be made: {error.strerror}.") from error
    lock = FileLock(state / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"Another run is at work in {out}. Wait for it, or choose another folder.") from None
    try:
        with Lease(str(state / "lease"), watch) as _LEASES[out]:
            yield out
    finally:
        _LEASES.pop(out, None)
        if not any(f.name != "lock" for f in state.iterdir()):  # nothing came of it
            shutil.rmtree(state)
            if not existed and not any(out.iterdir()):
                out.rmdir()
        lock.release()


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
    try:
        before = json.loads(file.read_text())
        difference = _difference(before["recipe"], now["recipe"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is damaged ({error}). Choose a new folder, or empty this one.") from error
    if difference:
        raise RecipeError(f"{out} belongs to another recipe: {difference}. Choose a new folder, or the old recipe.")
    if before["ingredients"] != now["ingredients"]:
        old, new = (
            {file[0]: file for one in d["ingredients"] for file in one if isinstance(file, list)} for d in (before, now)
        )
        which = [path for path in {**old, **new} if old.get(path) != new.get(path)]
        raise RecipeError(
            f"{out} was begun with ingredients that have changed since: {', '.join(which[:3])}. Choose a "
            "new folder, outside that of the ingredients."
        )
    other = [key for key in {**before, **now} if key != "recipe" and before.get(key) != now.get(key)]
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
    """What differs, but for the actors, which may be others at every start; empty where nothing does."""
    import yaml

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for key, value in values.items():
            lines.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return lines

    a, b = flat(yaml.safe_load(old)), flat(yaml.safe_load(new))
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key) and not key.startswith("actors.")]
    found = [f"{key} was {a.get(key)} and is now {b.get(key)}" for key in changed]
    return "; ".join(found[:3])


def read_record(out: Path) -> dict[str, Any] | None:
    """run.json, if it is there and whole."""
    try:
        found = json.loads((out / "run.json").read_text())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def finished_record(out: Path) -> dict[str, Any]:
    """run.json of a run that ended well. Raises RecipeError."""
    record = read_record(out)
    if record is None or record.get("exit") != 0 or not {"files", "ingredients"} <= set(record):
        ended = record is not None and record.get("exit") != 0
        found = f"a run that ended with exit code {record.get('exit')}" if ended else "no run.json of one"  # type: ignore[union-attr]
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
    if out in _LEASES:
        _LEASES[out].check()
    try:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record["files"] = {f.name: sha256_file(str(f)) for f in sorted(folder.iterdir())}
        (folder / "run.json").write_text(json.dumps(record, indent=1))
        for file in sorted(folder.iterdir(), key=lambda f: f.name == "run.json"):
            file.replace(out / file.name)
        folder.rmdir()
        for left in (out / "state").iterdir():
            if left.name not in ("begun.json", "resolved.json", "lock", "lease"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise SoupError(f"{out} could not be written ({error.strerror}). Free some room, then run it again.") from error


def scalars(board: Path) -> Callable[[int, int, Any], None]:
    """A hook for after every epoch that writes the scalars of a state's curve, by steps, to the folder `board` for
    TensorBoard: all of them at its first call, after a resume too, then what is new."""
    writer: Any = None
    written = 0

    def after_epoch(step: int, steps: int, state: Any) -> None:
        nonlocal writer, written
        if writer is None:
            from tensorboardX import SummaryWriter

            shutil.rmtree(board, ignore_errors=True)
            writer = SummaryWriter(str(board))
        for line in state.curve[written:]:
            for name in ("fit_nll", "select_nll", "select_accuracy", "lr"):
                if name in line:
                    writer.add_scalar(name, line[name], line["steps"])
        written = len(state.curve)
        writer.flush()
        if step >= steps:
            writer.close()

    return after_epoch


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ["ray", "torch", "open_clip_torch", "numpy", "safetensors", "numba"]
    names += [name for name in ("timm", "torchvision", "transformers") if name in sys.modules]
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
