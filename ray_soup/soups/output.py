"""The output folder of a run: local or a URI, held under a lease, written atomically.

`Output` owns everything about OUT. One run at a time holds it; a folder belongs to one recipe and one set of ingredients;
files are finished in a staging folder and moved into place together, run.json last. For a URI the run works in a local
mirror that is uploaded while it runs.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ray_soup import __version__
from ray_soup.errors import RecipeError, SoupError, Stopped, explain
from ray_soup.io import storage
from ray_soup.io.cache import content_key
from ray_soup.io.checkpoint_files import ADAPTER_CONFIG, ADAPTER_FILES
from ray_soup.io.disk import read_json, write_bytes, writing
from ray_soup.io.distributed import METADATA, is_metadata
from ray_soup.io.find import check_apart
from ray_soup.io.formats import DISTRIBUTED_SUFFIX
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lease import Lease
from ray_soup.io.mirror import Mirror
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.redact import check_uri, redact_uris
from ray_soup.io.signals import last_words, uninterrupted
from ray_soup.recipe import Recipe, dump_recipe
from ray_soup.soups.identity import check_same
from ray_soup.soups.place import HELD, check_own, check_place, local_folder
from ray_soup.soups.records import (
    BegunRecord,
    ResultRow,
    RunRecord,
    check_files,
    finished_record,
    read_begun,
    read_results,
    read_run_record,
    write_begun,
    write_results,
    write_run_record,
)
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.notebook import as_html, as_text

MODEL_FILES = {"safetensors": "model.safetensors", "dcp": METADATA}
"""The file that a soup is loaded from, by the recipe's `out_format`."""
MODEL, COEFFICIENTS, TABLE = "model.safetensors", "coefficients.safetensors", "coefficients.parquet"
DIFFERENCE = "difference.safetensors"
"""The difference between the soup and the model, if all weights were trained."""
BOARD = "tensorboard"
KEPT_STATE = ("begun.json", "resolved.json", *HELD)  # of a finished run; the rest of state/ is removed
STARTED = ("begun.json", "resolved.json")  # what a run writes into state/ before it has learned anything


@dataclass(repr=False)
class Soup:
    """A finished run: its folder, the rows of results.jsonl, and run.json. A notebook shows it as a table."""

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

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())

    def _shown(self) -> tuple[str, Sequence[ResultRow], Measures]:
        """The title and the rows of its table, and what the figures are called."""
        made = self.record.get("chosen", self.record.get("method", ""))
        title = f"Soup in {self.out}: {made}, made from {len(self.record.get('ingredients', ()))} ingredients"
        return title, self.record.get("table", self.rows), measures_in(self.record)


@dataclass
class Output:
    """The output folder while a run holds it; create it with `open_output`."""

    folder: Path
    """Where this process writes: OUT itself, or the local mirror of a URI."""
    lease: Lease
    mirror: Mirror | None = None
    """None for a local OUT."""
    before: dict[str, bytes] = field(default_factory=dict)
    """The files of state/ when this run began: the content of those in STARTED, size and time of the others."""
    moved: list[Path] = field(default_factory=list)
    """The files that `publish` has moved into OUT."""
    finished: bool = False
    """True once run.json says that the run has finished."""

    # Places

    def state(self, *names: str) -> Path:
        """Return a path below OUT/state, which holds what a resumed run needs."""
        return self.folder.joinpath("state", *names)

    def uri_of(self, *names: str) -> str:
        """Return a path or URI below OUT, which every node sees if it sees OUT."""
        return storage.join(str(self.folder) if self.mirror is None else self.mirror.uri, *names)

    def token(self) -> str:
        """Return a text that only this run has, and has again when it is resumed."""
        begun = self.state("begun.json")
        place = str(self.folder.resolve()) if self.mirror is None else self.mirror.uri
        return content_key("run", place, begun.stat().st_mtime_ns if begun.exists() else time.time_ns())

    def visible_to_actors(self, file: Path) -> str:
        """Return a path or URI where actors on any node find `file`; a file of a mirror is uploaded first."""
        distributed = is_metadata(str(file))
        if self.mirror is None:
            return str(file.parent if distributed else file)
        uri = self.uri_of("state", "evaluated")
        parts = set(read_json(file)["weight_map"].values()) if file.suffix == ".json" else set()
        beside = [ADAPTER_CONFIG] if file.name in ADAPTER_FILES else []
        if distributed:
            beside = [path.name for path in file.parent.glob(f"*{DISTRIBUTED_SUFFIX}")]
        for name in (*parts, *beside, file.name):
            storage.upload(file.with_name(name), storage.join(uri, name))
        return uri if distributed else storage.join(uri, file.name)

    def shared_files(self) -> tuple[str, ...]:
        """Return local files of this folder that actors on every node must see."""
        return (str(self.state("resolved.json")),) if self.mirror is None else ()

    # Start and end

    def begin(self, now: BegunRecord) -> Soup | None:
        """Start the folder for this record, or find the finished run that was started with the same one.

        Returns None if there is work to do. Raises RecipeError if the folder belongs to something else.
        """
        check_own(self.folder, zoo="kind" in now)
        file = self.state("begun.json")
        self.before = self._contents()
        if file.name not in self.before:
            write_begun(now, file)
            return None
        check_same(self.folder, read_begun(file), now)
        record = read_run_record(self.folder)
        if record is None or record["exit"] != 0:
            return None
        self.finished = True
        record = finished_record(self.folder)
        if self.mirror is None:  # which has no models
            check_files(self.folder, record)
        return Soup(self.folder, read_results(self.folder), record, record.get("notes", []), was_complete=True)

    @contextmanager
    def recording_failures(self) -> Iterator[None]:
        """If the run fails inside this context, write how it ended into run.json.

        A run that was refused before it learned anything leaves the folder as it was, and a finished one stays finished.
        """
        try:
            with last_words(self._record_stop):
                yield
        except BaseException as error:
            text, code = explain(error)
            with suppress(OSError, SoupError):
                self._clear(self.state("out"))
                if not self.finished and not (code in (2, 3) and self._undo()):
                    write_run_record({"exit": code, "error": text}, self.folder / "run.json")
            raise

    @contextmanager
    def discarding_refused(self) -> Iterator[None]:
        """If the run is refused inside this context before it has learned anything, leave the folder as it was."""
        try:
            yield
        except BaseException as error:
            if explain(error)[1] in (2, 3):
                with suppress(OSError, SoupError):
                    self._undo()
            raise

    def _record_stop(self) -> None:
        """Write into run.json that a signal ended this run."""
        if not self.finished:
            text, code = explain(Stopped())
            write_run_record({"exit": code, "error": text}, self.folder / "run.json")

    def _contents(self) -> dict[str, bytes]:
        """Return the files of state/ that a run keeps there, with what tells whether they changed."""
        found = {}
        for file in self.state().rglob("*"):
            name = str(file.relative_to(self.state()))
            if not name.startswith("out/") and name not in HELD and not name.endswith(".tmp"):
                with suppress(FileNotFoundError):  # removed just now
                    seen = file.stat()
                    if stat.S_ISREG(seen.st_mode):
                        known = file.name in STARTED
                        found[name] = file.read_bytes() if known else f"{seen.st_size} {seen.st_mtime_ns}".encode()
        return found

    def _undo(self) -> bool:
        """Restore the folder as it was before `begin`, unless the run has learned something; return whether it did."""
        now = self._contents()
        changed = {name for name in (*now, *self.before) if now.get(name) != self.before.get(name)}
        if any(Path(name).name not in STARTED for name in changed):
            return False
        for name in changed:
            if name in self.before:
                write_bytes(self.state(name), self.before[name])
            else:
                self.state(name).unlink(missing_ok=True)
        for folder in sorted(self.state().rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return True

    def discard(self) -> None:
        """Remove everything that this run has written, unless it has finished; what cannot be removed can be resumed."""
        started = [name for name in ("out", *reversed(STARTED)) if name not in self.before]  # begun.json last
        if not self.finished:
            with suppress(OSError):
                for path in (*self.moved, *map(self.state, started)):
                    self._clear(path)

    @staticmethod
    def _clear(path: Path) -> None:
        """Remove a file, a link or a folder, if it exists."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def staging(self) -> Path:
        """Create an empty folder to finish files in, before `publish`. Raises SoupError if it cannot be written."""
        folder = self.state("out")
        with writing(folder):
            self._clear(folder)
            folder.mkdir()
        return folder

    def publish(self, recipe: Recipe, rows: Sequence[ResultRow], record: RunRecord, staging: Path) -> None:
        """Add recipe, results and run.json to the files in `staging`, then move all of them into OUT, run.json last.

        Raises SoupError if another run took over the folder, or if it cannot be written.
        """
        self.lease.check()
        with writing(self.folder):
            write_bytes(staging / "recipe.yaml", redact_uris(dump_recipe(recipe)).encode(errors="backslashreplace"))
            write_results(rows, staging / "results.jsonl")
            record["files"] = {f.name: sha256_file(str(f)) for f in sorted(staging.iterdir())}
            write_run_record(record, staging / "run.json")
            with uninterrupted():
                for file in sorted(staging.iterdir(), key=lambda f: (f.name == "run.json", f.name == METADATA)):
                    self.moved.append(file.replace(self.folder / file.name))
                self.finished = True
        with suppress(OSError):  # the soup is finished, whatever is left
            staging.rmdir()
            for left in self.state().iterdir():
                if left.name not in KEPT_STATE:
                    self._clear(left)


def begun(recipe: Recipe, ingredients: Sequence[Ingredient], **options: Any) -> BegunRecord:
    """Return the record of a started folder: the recipe, identities of the ingredients, and options of the command."""
    record: BegunRecord = {"recipe": redact_uris(dump_recipe(recipe)), "ingredients": [i.identity for i in ingredients]}
    return {**record, **options}  # type: ignore[typeddict-item]


def begun_zoo(recipe: Recipe) -> BegunRecord:
    """Return the record of a started folder of fine-tuned checkpoints: the parts of the recipe that `finetune` uses."""
    values = yaml.safe_load(redact_uris(dump_recipe(recipe)))
    used = {key: values[key] for key in ("model", "finetune", "precision", "ignore") if key in values}
    used["data"] = {key: values["data"][key] for key in ("train", "fit")}
    return {"recipe": yaml.safe_dump(used, sort_keys=False), "ingredients": [], "kind": "finetune"}


@contextmanager
def open_output(
    out: str | Path, progress: ProgressCallback = no_progress, ingredients: str | Sequence[str] | None = None
) -> Iterator[Output]:
    """Hold the output folder or URI `out` for one run.

    A URI is worked on in a local mirror, whose state is uploaded at every heartbeat and which is uploaded whole at the end.

    Raises RecipeError if another run holds `out`, or if `out` is where the recipe looks for `ingredients`.
    """
    if storage.is_remote(str(out)):
        check_apart(ingredients, str(out))
        with _open_remote(str(out).rstrip("/"), progress) as output:
            yield output
    else:
        folder = local_folder(out)
        check_apart(ingredients, str(folder))
        check_place(folder)
        with _open_local(folder, progress) as output:
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
            with suppress(SoupError, OSError):
                lease.check()
                mirror.push()
            if isinstance(error, SoupError):
                text = str(error).replace(str(mirror.folder), uri)
                if isinstance(error.__cause__, OSError) and text != str(error):  # the disk here may be full
                    text += f" (The local copy of {uri} is {mirror.folder}.)"
                raise type(error)(text) from error
            raise
        lease.check()
        mirror.push(progress=progress)
        mirror.tidy()
    shutil.rmtree(mirror.folder, ignore_errors=True)


@contextmanager
def _open_local(out: Path, progress: ProgressCallback) -> Iterator[Output]:
    """Hold a local folder by a file lock, which ends with its process, and a lease for machines that share the disk."""
    state, lock_file = out / "state", out / "state" / "lock"
    new = [path for path in (lock_file, state, out, *out.parents) if not os.path.lexists(path)]
    lock = FileLock(lock_file)
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"Another run is using {out}. Wait for it, or choose another folder.") from None
    except (OSError, NotImplementedError) as error:
        _remove_new(new)
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"The output folder {out} cannot be created: {reason}. Choose another.") from error
    try:
        with Lease(str(state / "lease"), progress) as lease:
            yield Output(out, lease)
    finally:
        _remove_new(new)  # a run that left nothing leaves no trace
        with suppress(OSError):  # the lock ends in any case
            lock.release()


def _remove_new(paths: Sequence[Path]) -> None:
    """Remove the lock file, if it is new, and the new folders that are empty again, from the inside out."""
    with suppress(OSError):
        for path in paths:
            if path.name == "lock":
                path.unlink(missing_ok=True)  # while the lock is held: another process notices that the file is gone
            elif os.path.lexists(path):
                path.rmdir()


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
