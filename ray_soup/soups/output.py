"""The output folder of a run: local or a URI, held under a lease, written atomically.

`Output` owns everything about OUT. One run at a time holds it; a folder belongs to one recipe and one set of ingredients;
files are finished in a staging folder and moved into place together, run.json last. For a URI the run works in a local
mirror that is uploaded while it runs.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ray_soup.errors import RecipeError, SoupError, Stopped, explain
from ray_soup.io import kept, storage
from ray_soup.io.cache import content_key
from ray_soup.io.checkpoint_files import ADAPTER_CONFIG, ADAPTER_FILES
from ray_soup.io.claims import CLAIM, HELD, LEASE, discard
from ray_soup.io.disk import read_json, write_bytes, writing
from ray_soup.io.distributed import METADATA, is_metadata
from ray_soup.io.find import check_apart
from ray_soup.io.formats import DISTRIBUTED_SUFFIX
from ray_soup.io.hashing import sha256_written
from ray_soup.io.lease import Lease
from ray_soup.io.mirror import OF_ACTORS, Mirror
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.redact import check_uri, redact_uris
from ray_soup.io.signals import last_words, uninterrupted
from ray_soup.recipe import Recipe, dump_recipe
from ray_soup.soups.identity import OtherRunError, check_extends, check_same
from ray_soup.soups.own_files import STARTED, clear, contents, has_work, put_back, replace_run, restore
from ray_soup.soups.place import check_own, check_place, local_folder, remove_new
from ray_soup.soups.records import (
    BegunRecord,
    ResultRow,
    RunRecord,
    check_files,
    finished_record,
    read_begun,
    read_results,
    read_run_record,
    rewrite_begun,
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
KEPT_STATE = (*STARTED, *HELD)  # of a finished run; the rest of state/ is removed


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
    overwrite: bool = False
    """Whether this run replaces what an earlier one wrote."""
    before: dict[str, bytes] = field(default_factory=dict)
    """The `contents` of state/ when this run began."""
    moved: list[Path] = field(default_factory=list)
    """The files that `publish` has moved into OUT."""
    finished: bool = False
    """True once run.json says that the run has finished."""
    extends: bool = False
    """True if run.json says that a smaller comparison has finished, which this run adds to."""

    # Places

    def state(self, *names: str) -> Path:
        """Return a path below the folder with what a resumed run needs: this run's own one in OUT/state."""
        own = Path(self.lease.folder) if self.mirror is None else self.folder / "state"
        return own.joinpath(*names)

    def uri_of(self, *names: str) -> str:
        """Return a path or URI below OUT, which every node sees if it sees OUT; below this run's own folder for `state`."""
        if names[:1] == ("state",):
            return storage.join(self.lease.folder, *names[1:])
        return storage.join(str(self.folder) if self.mirror is None else self.mirror.uri, *names)

    def put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of OUT: `write` is called with the path in this run's folder where it is finished first."""
        target = self.folder / name
        file = self.state(f"{CLAIM}{target.name}")
        with writing(target):
            write(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

    def token(self) -> str:
        """Return a text that only this run has, and has again when it is resumed."""
        begun = self.state("begun.json")
        place = str(self.folder.resolve()) if self.mirror is None else self.mirror.uri
        known = read_json(begun).get("token", begun.stat().st_mtime_ns) if begun.exists() else time.time_ns()
        return content_key("run", place, known)

    def visible_to_actors(self, file: Path) -> str:
        """Return a path or URI where actors on any node find `file`, until the next call; one of a mirror is uploaded."""
        distributed = is_metadata(str(file))
        if self.mirror is None:
            return str(file.parent if distributed else file)
        parts = read_json(file)["weight_map"].values() if file.suffix == ".json" else ()
        beside = [ADAPTER_CONFIG] if file.name in ADAPTER_FILES else []
        if distributed:
            beside = [path.name for path in file.parent.glob(f"*{DISTRIBUTED_SUFFIX}")]
        uri = self.mirror.show(file.parent, (*dict.fromkeys(parts), *beside, file.name))
        return uri if distributed else storage.join(uri, file.name)

    def kept_by_actors(self, name: str) -> str:
        """Return the path or URI without a suffix of files that only actors read and write, on any node."""
        if self.mirror is None:
            with writing(folder := self.state(OF_ACTORS)):
                folder.mkdir(exist_ok=True)
        return self.uri_of("state", OF_ACTORS, name)

    def remove_kept(self, beginning: str) -> None:
        """Remove the files of actors whose names begin so, after what was made from them is safe."""
        if self.mirror is not None:
            self.mirror.push("state/")
        for file in kept.found(self.kept_by_actors(beginning)):
            storage.remove(file)

    def shared_files(self) -> tuple[str, ...]:
        """Return local files of this folder that actors on every node must see."""
        return (str(self.state("resolved.json")),) if self.mirror is None else ()

    # Start and end

    def begin(self, now: BegunRecord) -> Soup | None:
        """Start the folder for this record, or find the finished run that was started with the same one.

        Returns None if there is work to do. A folder that was begun by another command, which never got to work, is started
        afresh. Raises RecipeError if the folder belongs to something else.
        """
        check_own(self.folder, zoo="kind" in now)
        new: BegunRecord = {**now, "token": secrets.token_hex(8)}
        file, self.before = self.state("begun.json"), contents(self.state())
        if self.overwrite:
            self._replace()
            self.before = contents(self.state())
        if file.name not in self.before:
            write_begun(new, file)
            return None
        before = read_begun(file)
        try:
            check_same(self.folder, before, now)
        except OtherRunError:
            if has_work(self.folder, self.state()):
                raise
            clear(self.folder, self.state())
            self.before = {}
            write_begun(new, file)
            return None
        record = read_run_record(self.folder)
        if record is not None and record["exit"] == 0:
            done = record.get("compare", before.get("compare"))
            if done is None or done == now["compare"]:
                return self._finished()
            check_extends(self.folder, done, now["compare"])
            self.extends = True
            if "compare" not in record:  # an earlier ray_soup wrote it
                self._write_record({**record, "compare": done})
        if before.get("compare") != now.get("compare"):
            rewrite_begun(now, before, file)
        return None

    def _finished(self) -> Soup:
        """Return the finished run in the folder. Raises SoupError if its files are not as they were written."""
        self.finished = True
        record = finished_record(self.folder)
        if self.mirror is None:  # which has no models
            check_files(self.folder, record)
        return Soup(self.folder, read_results(self.folder), record, record.get("notes", []), was_complete=True)

    def _replace(self) -> None:
        """Put aside what an earlier run wrote; in remote storage it is replaced or deleted when this run ends."""
        replace_run(self.folder, self.state(), self.mirror is not None)
        if self.mirror is not None:
            if self.mirror.has("run.json"):
                self._write_record({"exit": 1, "error": "A run that has not finished replaces the one that was here."})
                self.mirror.push("run.json")
            self.mirror.push("state/")  # before actors write files of the same names there

    def _write_record(self, record: RunRecord) -> None:
        self.put("run.json", partial(write_run_record, record))

    @contextmanager
    def recording_failures(self) -> Iterator[None]:
        """If the run fails inside this context, write how it ended into run.json.

        A run that was refused before it got to work leaves the folder as it was, one that was to replace another puts that
        back, and a finished run stays finished. A run that another one has replaced changes nothing.
        """
        try:
            with last_words(self._record_stop):
                yield
        except BaseException as error:
            text, code = explain(error)
            with suppress(OSError, SoupError):
                self.lease.check()
                self._clear(self.state("out"))
                if not ((code in (2, 3) or self.overwrite) and self._undo()):
                    self._record_end(text, code)
            raise

    @contextmanager
    def discarding_refused(self) -> Iterator[None]:
        """If the run is refused inside this context before it got to work, leave the folder as it was."""
        try:
            yield
        except BaseException as error:
            if explain(error)[1] in (2, 3) or self.overwrite:
                with suppress(OSError, SoupError):
                    self._undo()
            raise

    def _record_stop(self) -> None:
        """Write into run.json that a signal ended this run."""
        self._record_end(*explain(Stopped()))

    def _record_end(self, text: str, code: int) -> None:
        """Write into run.json how this run ended, unless the run.json there is that of a finished one."""
        if not (self.finished or self.extends):
            self._write_record({"exit": code, "error": text})

    def _undo(self) -> bool:
        """Restore the folder as it was before `begin`, unless the run got to work; return whether it did."""
        if self.finished or (self.mirror is not None and kept.found(self.kept_by_actors(""))):  # of which nothing is here
            return False
        if not restore(self.state(), self.before):
            return False
        if self.overwrite and self.mirror is None:
            for path in self.moved:  # by a publication that failed
                self._clear(path)
            put_back(self.folder, self.state())
        return True

    def discard(self) -> None:
        """Remove everything that this run has written, unless it has finished; what cannot be removed can be resumed."""
        started = [name for name in ("out", *reversed(STARTED)) if name not in self.before]  # begun.json last
        if not self.finished:
            with suppress(OSError, SoupError):
                for path in (*self.moved, *map(self.state, started)):
                    self._clear(path)
                if self.overwrite and self.mirror is None:
                    put_back(self.folder, self.state())

    def _clear(self, path: Path) -> None:
        """Remove a file, a link or a folder of OUT, if it exists. Raises SoupError."""
        discard(path, self.state())

    def staging(self) -> Path:
        """Create an empty folder to finish files in, before `publish`. Raises SoupError if it cannot be written."""
        folder = self.state("out")
        with writing(folder):
            self._clear(folder)
            folder.mkdir()
        if self.mirror is not None:
            self.mirror.clear_baked()
        return folder

    def publish(
        self, recipe: Recipe, rows: Sequence[ResultRow], record: RunRecord, staging: Path, also: Sequence[str] = ()
    ) -> None:
        """Add recipe, results and run.json to the files in `staging`, then move all of them into OUT, run.json last.

        Of state/, what is in KEPT_STATE and `also` stays. Raises SoupError if another run took over the folder, or if it
        cannot be written.
        """
        self.lease.check()
        with writing(self.folder):
            write_bytes(staging / "recipe.yaml", redact_uris(dump_recipe(recipe)).encode(errors="backslashreplace"))
            write_results(rows, staging / "results.jsonl")
            baked = {} if self.mirror is None else self.mirror.take_baked(staging)
            record["files"] = {f.name: baked.get(f.name) or sha256_written(f) for f in sorted(staging.iterdir())}
            write_run_record(record, staging / "run.json")
            usual = stat.S_IMODE((staging / "run.json").stat().st_mode)
            with uninterrupted():
                self._clear(self.folder / "run.json")  # of a failed run, or of what this one adds to
                for file in sorted(staging.iterdir(), key=lambda f: (f.name == "run.json", f.name == METADATA)):
                    file.chmod(usual)  # some libraries let nobody else read what they write
                    self.moved.append(file.replace(self.folder / file.name))
                self.finished = True
        with suppress(OSError, SoupError):  # the soup is finished, whatever is left
            staging.rmdir()
            own = f"{LEASE}.{os.getpid()}-"  # a heartbeat is being written
            for left in self.state().iterdir():
                if left.name not in (*KEPT_STATE, *also) and not left.name.startswith((CLAIM, own)):
                    self._clear(left)


@contextmanager
def open_output(
    out: str | Path,
    progress: ProgressCallback = no_progress,
    ingredients: str | Sequence[str] | None = None,
    overwrite: bool = False,
) -> Iterator[Output]:
    """Hold the output folder or URI `out` for one run, which replaces an earlier one there if it is to `overwrite` it.

    A URI is worked on in a local mirror, whose state is uploaded at every heartbeat and which is uploaded whole at the end.

    Raises RecipeError if another run holds `out`, or if `out` is where the recipe looks for `ingredients`.
    """
    if storage.is_remote(str(out)):
        check_apart(ingredients, str(out))
        with _open_remote(str(out).rstrip("/"), progress, overwrite) as output:
            yield output
    else:
        folder = local_folder(out)
        check_apart(ingredients, str(folder))
        check_place(folder)
        with _open_local(folder, progress, overwrite) as output:
            yield output


@contextmanager
def _open_remote(uri: str, progress: ProgressCallback, overwrite: bool) -> Iterator[Output]:
    check_uri(uri)
    mirror = Mirror(uri)
    with Lease(uri, progress, lambda: mirror.push("state/")) as lease:
        copy = f" (The local copy of {uri} is {mirror.folder}.)"  # whose disk may be full
        with lease.explaining({str(mirror.folder / "state"): lease.folder, str(mirror.folder): uri}, copy):
            mirror.fetch(lease)
            try:
                yield Output(mirror.folder, lease, mirror, overwrite)
            except BaseException:
                with suppress(SoupError, OSError):
                    mirror.push()
                raise
            lease.check()
            mirror.push(progress=progress)
            mirror.tidy()
    mirror.remove()


@contextmanager
def _open_local(out: Path, progress: ProgressCallback, overwrite: bool) -> Iterator[Output]:
    """Hold a local folder."""
    state = out / "state"
    new = [path for path in (state, out, *out.parents) if not os.path.lexists(path)]
    with ExitStack() as stack:
        try:
            stack.callback(remove_new, new)  # a run that left nothing leaves no trace
            state.mkdir(parents=True, exist_ok=True)
            lease = stack.enter_context(Lease(str(out), progress))
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(f"The output folder {out} cannot be created: {reason}. Choose another.") from error
        with lease.explaining({lease.folder: str(state)}):
            yield Output(out, lease, overwrite=overwrite)
