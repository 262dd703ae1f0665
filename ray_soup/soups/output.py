"""The output folder of a run: local or a URI, held under a lease, written atomically.

`Output` owns everything about OUT. One run at a time holds it; a folder belongs to one recipe and one set of ingredients;
files are finished in a staging folder and moved into place together, run.json last. For a URI the run works in a local
mirror that is uploaded while it runs.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ray_soup import __version__
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.find import check_apart
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lease import Lease
from ray_soup.io.mirror import Mirror
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.redact import check_uri
from ray_soup.recipe import Recipe, dump_recipe
from ray_soup.soups.records import (
    BegunRecord,
    ResultRow,
    RunRecord,
    read_begun,
    read_results,
    read_run_record,
    write_begun,
    write_results,
    write_run_record,
)
from ray_soup.task.functions import MOVED

MODEL, COEFFICIENTS, TABLE = "model.safetensors", "coefficients.safetensors", "coefficients.parquet"
BOARD = "tensorboard"
KEPT_STATE = ("begun.json", "resolved.json", "lock", "lease")  # of a finished run; the rest of state/ is removed


@dataclass
class Soup:
    """A finished run: its folder, the rows of results.jsonl, and run.json."""

    out: Path | str
    """The local folder, or the URI."""
    rows: list[ResultRow]
    record: RunRecord
    notes: list[str] = field(default_factory=list)
    was_complete: bool = False
    """True if the run had finished before, so that nothing was computed."""

    def at(self, out: str | Path) -> Soup:
        """Return the same soup under the name the user gave: a URI instead of the local folder that mirrors it."""
        return replace(self, out=str(out) if storage.is_remote(str(out)) else self.out)


@dataclass
class Output:
    """The output folder while a run holds it; create it with `open_output`."""

    folder: Path
    """Where this process writes: OUT itself, or the local mirror of a URI."""
    lease: Lease
    mirror: Mirror | None = None
    """None for a local OUT."""

    # Places

    def state(self, *names: str) -> Path:
        """Return a path below OUT/state, which holds what a resumed run needs."""
        return self.folder.joinpath("state", *names)

    def uri_of(self, *names: str) -> str:
        """Return a path or URI below OUT, which every node sees if it sees OUT."""
        return storage.join(str(self.folder) if self.mirror is None else self.mirror.uri, *names)

    def visible_to_actors(self, file: Path) -> str:
        """Return a path or URI where actors on any node find `file`; a file of a mirror is uploaded first."""
        if self.mirror is None:
            return str(file)
        uri = self.uri_of("state", "evaluated")
        parts = set(json.loads(file.read_text())["weight_map"].values()) if file.suffix == ".json" else set()
        for name in (*parts, file.name):
            storage.upload(file.with_name(name), storage.join(uri, name))
        return storage.join(uri, file.name)

    def shared_files(self) -> tuple[str, ...]:
        """Return local files of this folder that actors on every node must see."""
        return (str(self.state("resolved.json")),) if self.mirror is None else ()

    # Start and end

    def begin(self, now: BegunRecord) -> Soup | None:
        """Start the folder for this record, or find the finished run that was started with the same one.

        Returns None if there is work to do. Raises RecipeError if the folder belongs to something else.
        """
        file = self.state("begun.json")
        if not file.exists():
            foreign = sorted(f.name for f in self.folder.iterdir() if f.name != "state")
            if foreign:
                raise RecipeError(
                    f"{self.folder} is not empty and was not written by ray_soup (found {', '.join(foreign[:4])}). Choose a "
                    "new folder."
                )
            write_begun(now, file)
            return None
        _check_same(self.folder, read_begun(file), now)
        record = read_run_record(self.folder)
        if record is None or record.get("exit") != 0:
            return None
        return Soup(self.folder, read_results(self.folder), record, record.get("notes", []), was_complete=True)

    @contextmanager
    def recording_failures(self) -> Iterator[None]:
        """Write how the run ended into run.json if it fails inside this context."""
        try:
            yield
        except BaseException as error:
            code = exit_code_of(error)
            shutil.rmtree(self.state("out"), ignore_errors=True)
            with suppress(OSError):
                write_run_record({"exit": code, "error": f"{error}" or type(error).__name__}, self.folder / "run.json")
            raise

    def staging(self) -> Path:
        """Create an empty folder to finish files in, before `publish`."""
        folder = self.state("out")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self, recipe: Recipe, rows: Sequence[ResultRow], record: RunRecord, staging: Path) -> None:
        """Add recipe, results and run.json to the files in `staging`, then move all of them into OUT, run.json last.

        Raises SoupError if another run took over the folder, or if it cannot be written.
        """
        self.lease.check()
        try:
            (staging / "recipe.yaml").write_text(dump_recipe(recipe))
            write_results(rows, staging / "results.jsonl")
            record["files"] = {f.name: sha256_file(str(f)) for f in sorted(staging.iterdir())}
            write_run_record(record, staging / "run.json")
            for file in sorted(staging.iterdir(), key=lambda f: f.name == "run.json"):
                file.replace(self.folder / file.name)
            staging.rmdir()
            for left in self.state().iterdir():
                if left.name not in KEPT_STATE:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError as error:
            raise SoupError(
                f"{self.folder} could not be written ({error.strerror}). Free some disk space, then rerun the same command."
            ) from error


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of `ray-soup` for the exception that ended a run."""
    if isinstance(error, SoupError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 143 if isinstance(error, SystemExit) and error.code == signal.SIGTERM else 1  # Ray turns SIGTERM into exit(15)


def begun(recipe: Recipe, ingredients: Sequence[Ingredient], **options: Any) -> BegunRecord:
    """Return the record of a started folder: the recipe, identities of the ingredients, and options of the command."""
    record: BegunRecord = {"recipe": dump_recipe(recipe), "ingredients": [i.identity for i in ingredients]}
    return {**record, **options}  # type: ignore[typeddict-item]


def _check_same(out: Path, before: BegunRecord, now: BegunRecord) -> None:
    """Check that the folder was started with the same recipe, ingredients and options. Raises RecipeError."""
    difference = _difference(out, before["recipe"], now["recipe"])
    if difference:
        raise RecipeError(f"{out} belongs to another recipe: {difference}. Choose a new folder, or use the old recipe.")
    if before["ingredients"] != now["ingredients"]:
        old, new = (
            {file[0]: file for one in d["ingredients"] for file in one if isinstance(file, list) and file}
            for d in (before, now)
        )
        which = [path for path in {**old, **new} if old.get(path) != new.get(path)]
        raise RecipeError(
            f"{out} was started with ingredients that have changed since: {', '.join(which[:3])}. Choose a new folder that "
            "is not inside the ingredients' folder."
        )
    old_options, new_options = dict(before), dict(now)
    for key in [*old_options, *new_options]:
        if key not in ("recipe", "version") and old_options.get(key) != new_options.get(key):
            raise RecipeError(
                f"{out} was started with {key} {old_options.get(key)}, but this command has {new_options.get(key)}. Choose "
                "a new folder, or use the old options."
            )


def _difference(out: Path, old: str, new: str) -> str:
    """Describe what differs between two recipes, apart from `actors`, which may change; empty if nothing does."""
    import yaml

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for key, value in values.items():
            lines.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return lines

    try:
        a, b = flat(yaml.safe_load(old)), flat(yaml.safe_load(new))
    except (yaml.YAMLError, AttributeError) as error:
        file = out / "state" / "begun.json"
        raise RecipeError(f"{file} is damaged ({error}). Choose a new folder, or empty this one.") from error
    for values in (a, b):  # a function that moved since version 0.1 is still the same model
        values["model"] = MOVED.get(values.get("model", ""), values.get("model"))
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key) and not key.startswith("actors.")]
    return "; ".join(f"{key} was {a.get(key)} and is now {b.get(key)}" for key in changed[:3])


@contextmanager
def open_output(
    out: str | Path, progress: ProgressCallback = no_progress, ingredients: str | Sequence[str] | None = None
) -> Iterator[Output]:
    """Hold the output folder or URI `out` for one run.

    A URI is worked on in a local mirror, whose state is uploaded at every heartbeat and which is uploaded whole at the end.

    Raises RecipeError if another run holds `out`, or if `out` is where the recipe looks for `ingredients`.
    """
    if not str(out):
        raise RecipeError("OUT is empty; expected a folder, or a URI such as s3://bucket/folder.")
    check_apart(ingredients, str(out))
    if storage.is_remote(str(out)):
        with _open_remote(str(out).rstrip("/"), progress) as output:
            yield output
    else:
        with _open_local(Path(out).absolute(), progress) as output:
            yield output


@contextmanager
def _open_remote(uri: str, progress: ProgressCallback) -> Iterator[Output]:
    check_uri(uri)
    mirror = Mirror(uri)
    with Lease(f"{uri}/state/lease", progress, lambda: mirror.push("state/")) as lease:
        mirror.fetch()
        try:
            yield Output(mirror.folder, lease, mirror)
        except BaseException as error:
            with suppress(SoupError):
                lease.check()
                mirror.push()
            if isinstance(error, SoupError):
                raise type(error)(str(error).replace(str(mirror.folder), uri)) from error
            raise
        lease.check()
        mirror.push(progress=progress)
        mirror.tidy()
    shutil.rmtree(mirror.folder, ignore_errors=True)


@contextmanager
def _open_local(out: Path, progress: ProgressCallback) -> Iterator[Output]:
    """Hold a local folder by a file lock, which ends with its process, and a lease for machines that share the disk."""
    state = out / "state"
    try:
        existed = out.exists()
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"The output folder {out} cannot be created: {error.strerror}. Choose another.") from error
    lock = FileLock(state / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"Another run is using {out}. Wait for it, or choose another folder.") from None
    try:
        with Lease(str(state / "lease"), progress) as lease:
            yield Output(out, lease)
    finally:
        if not any(f.name != "lock" for f in state.iterdir()):  # the run left nothing: leave no trace
            shutil.rmtree(state)
            if not existed and not any(out.iterdir()):
                out.rmdir()
        lock.release()


def versions() -> dict[str, str]:
    """Return the versions of ray_soup, Python and the libraries that this run used."""
    from importlib.metadata import version

    names = ["ray", "torch", "open_clip_torch", "numpy", "safetensors", "numba"]
    names += [name for name in ("timm", "torchvision", "transformers") if name in sys.modules]
    return {"ray_soup": __version__, "python": platform.python_version(), **{n: version(n) for n in names}}


class Clock:
    """A stopwatch for the parts of a run, in seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """Add the seconds since the last lap to `name`, and return them."""
        now = time.monotonic()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._last, 3)
        passed, self._last = now - self._last, now
        return passed

    def total(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self._start, 3)
