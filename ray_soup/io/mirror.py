"""A local mirror of an output folder in remote storage."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.cache import cache_folder, content_key
from ray_soup.io.claims import CLAIM
from ray_soup.io.disk import files_below, writing
from ray_soup.io.hub_path import is_hub
from ray_soup.io.lease import Lease
from ray_soup.io.progress import ProgressCallback, no_progress

SMALL = 1 << 26
"""Largest size in bytes of a .safetensors file that is fetched; larger ones are models, which are not read here."""
OF_ACTORS = "actors"
"""The folder in state/ with files that only actors write and read."""
ELSEWHERE = re.compile(rf"state/({OF_ACTORS}|trials|train)/.*|state/init\..*|model_\d+\.safetensors")
"""Names of files that actors, and the workers of `search` and `finetune`, write and read at the URI."""
READ_HERE = re.compile(r"state/soups/.*\.difference\.safetensors")
"""Names of files of any size that a resumed comparison reads on this node."""
SHOWN = "evaluated"
"""The folder below the run's own one with a model that actors are to evaluate."""
BAKED = "out"
"""The folder below the run's own one where actors write files of the model that this node never has."""
STAGED = "state/out/"
"""Begins the names of files that are being finished, or wait for their names."""


class Mirror:
    """A local copy of the output folder at a URI, in this node's cache; `folder` is its path, which no other run has.

    The files in its folder state/ are uploaded to the run's own folder, the others given their names by `Lease.publish`.
    Files that this node does not read, such as models, are empty in the copy, or only as long as the real ones.

    Raises RecipeError for the Hugging Face Hub, which is read only.
    """

    def __init__(self, uri: str) -> None:
        if is_hub(uri):
            raise RecipeError(
                f"{uri}: a run cannot write to the Hugging Face Hub. Choose a folder or another storage, and upload the "
                "finished soup, as in `hf upload ORG/NAME FOLDER`."
            )
        self.uri, self.folder = uri, cache_folder() / "out" / content_key(uri) / secrets.token_hex(4)
        self.baked: dict[str, str] = {}
        """SHA-256 of the files below `baked_uri`, of which this node only has the headers."""
        self._lease: Lease | None = None
        self._known: dict[str, tuple[int, int]] = {}
        self._pushing = threading.Lock()

    def fetch(self, lease: Lease) -> None:
        """Replace local copies by a new download; models, and what workers keep, become empty files.

        Raises SoupError if the copy cannot be written, RecipeError if a name would lead out of it.
        """
        shutil.rmtree(self.folder.parent, ignore_errors=True)  # of earlier runs, too
        own = f"state/{lease.folder.rpartition('/')[2]}/"
        with writing(self.folder):
            (self.folder / "state").mkdir(parents=True)
        for path, found in storage.walk(self.uri).items():
            name = path if not path.startswith(own) else f"state/{path.removeprefix(own)}"
            if name.startswith((STAGED, f"state/{SHOWN}/")) or (path.startswith("state/") and name == path):
                continue
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise RecipeError(
                    f"{self.uri} has an object named {name!r}, which is no path of a file. Choose another OUT."
                )
            is_model = name.endswith((".safetensors", ".distcp")) and found.size > SMALL and not READ_HERE.fullmatch(name)
            target = self.folder / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                if is_model or ELSEWHERE.fullmatch(name):
                    target.touch()
                else:
                    storage.download(storage.join(self.uri, path), target)
                self._known[name] = self._state(target)
        self._lease = lease

    def remove(self) -> None:
        """Delete the local copy; the next run on this node may have one already."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Return whether the file is in the storage, as far as this run knows."""
        return name in self._known

    @property
    def baked_uri(self) -> str:
        """Where actors write files of the model, in the run's own folder."""
        assert self._lease is not None
        return f"{self._lease.folder}/{BAKED}"

    def clear_baked(self) -> None:
        """Delete what an earlier attempt left below `baked_uri`."""
        self.baked.clear()
        for name in storage.walk(self.baked_uri):
            storage.remove(f"{self.baked_uri}/{name}")

    def show(self, folder: Path, names: Sequence[str]) -> str:
        """Upload files of a folder for actors, and delete those of the last call; return the URI of their folder.

        That is a new one each time: caches know a copy by path, size and time. What actors baked stays where it is.
        """
        assert self._lease is not None
        shown = f"{self._lease.folder}/{SHOWN}"
        uri = self.baked_uri if self.baked.keys() & {*names} else f"{shown}/{secrets.token_hex(4)}"
        for name in names:
            if name not in self.baked:
                storage.upload(folder / name, f"{uri}/{name}")
        for name in storage.walk(shown):
            if not f"{shown}/{name}".startswith(f"{uri}/"):
                storage.remove(f"{shown}/{name}")
        return uri

    def take_baked(self, staging: Path) -> dict[str, str]:
        """Give the files in `baked` their names in OUT; those in `staging`, which are moved there, stand for them here.

        Returns the SHA-256 of each. Raises SoupError if another run took over.
        """
        if self.baked:
            self.take({name: f"{BAKED}/{name}" for name in self.baked}, staging)
        return self.baked

    def take(self, files: Mapping[str, str], folder: Path) -> None:
        """Give objects below the run's own folder names in OUT, too; `tidy` deletes the old ones.

        In the local copy, files that are never uploaded stand for them: those of the same names in `folder`, or empty ones.

        Args:
            files: for each name in OUT, the path of the object below the run's own folder.
            folder: the local copy, or a folder in it whose files are moved there.

        Raises SoupError if another run took over.
        """
        assert self._lease is not None
        with self._pushing:
            self._lease.publish(files, [])
            with writing(folder):
                for name in files:
                    (folder / name).touch()
                    self._known[name] = self._state(folder / name)

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        """Return size in bytes and modification time in ns."""
        found = file.stat()
        return found.st_size, found.st_mtime_ns

    def push(self, only: str = "", progress: ProgressCallback = no_progress) -> None:
        """Upload the files that changed since the last call, run.json last, and delete remotely what was deleted locally.

        Any thread may call this.

        Args:
            only: prefix of the relative paths to upload, such as `state/`.
            progress: called with bytes uploaded and in total.
        """
        if self._lease is None:
            return
        with self._pushing:
            here = self._uploadable(only)
            changed = {}
            for name in sorted(here, key=lambda name: (name.endswith(".json"), name)):  # records after what they are about
                with suppress(FileNotFoundError):  # deleted just now
                    if self._known.get(name) != (state := self._state(here[name])):
                        changed[name] = state
            total, done = sum(size for size, _ in changed.values()), 0
            for name, state in list(changed.items()):
                progress("uploading", done, total)
                self._lease.check()
                try:
                    storage.upload(self.folder / name, storage.join(self._lease.folder, _place(name)))
                except FileNotFoundError:
                    del changed[name]
                done += state[0]
            gone = [name for name in self._known if name.startswith(only) and name not in here]
            for name in gone:
                if name.startswith("state/"):
                    storage.remove(storage.join(self._lease.folder, _place(name)))
            files = {name: _place(name) for name in changed if not name.startswith("state/")}
            removed = [name for name in gone if not name.startswith("state/")]
            if files or removed:
                self._lease.publish(files, removed)
                for staged in files.values():
                    storage.remove(storage.join(self._lease.folder, staged))
            self._known.update(changed)
            for name in gone:
                del self._known[name]

    def _uploadable(self, only: str) -> dict[str, Path]:
        """Return the files whose relative paths begin with `only`, except locks and files that are being written."""
        files = {str(f.relative_to(self.folder)): f for f in files_below(self.folder)}
        return {
            name: file
            for name, file in files.items()
            if name.startswith(only) and not name.startswith((STAGED, f"state/{CLAIM}")) and not name.endswith(".tmp")
        }

    def tidy(self) -> None:
        """Delete the state in the storage that does not exist locally, and that of earlier runs.

        Raises SoupError if another run took over.
        """
        assert self._lease is not None
        own = f"{self._lease.folder.rpartition('/')[2]}/"
        found = storage.walk(f"{self.uri}/state")
        self._lease.check()  # after the list was made: it has nothing of a successor, however late this run deletes
        for name in found:
            here = name.startswith(own) and (self.folder / "state" / name.removeprefix(own)).exists()
            if name != "lease" and not here:
                storage.remove(f"{self.uri}/state/{name}")


def _place(name: str) -> str:
    """Return the path below the run's own folder to which a file is uploaded."""
    return name.removeprefix("state/") if name.startswith("state/") else f"out/{name}"
