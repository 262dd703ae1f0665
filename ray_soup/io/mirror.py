"""A local mirror of an output folder in remote storage."""

from __future__ import annotations

import shutil
import threading
from contextlib import suppress
from pathlib import Path

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.cache import cache_folder, content_key
from ray_soup.io.disk import writing
from ray_soup.io.hub_path import is_hub
from ray_soup.io.lease import LEASE_FILE
from ray_soup.io.progress import ProgressCallback, no_progress

SMALL = 1 << 26
"""Largest size in bytes of a .safetensors file that is fetched; larger ones are models, which are not read here."""


class Mirror:
    """A local copy of the output folder at a URI, in this node's cache; `folder` is its path.

    Raises RecipeError for the Hugging Face Hub, which is read only.
    """

    def __init__(self, uri: str) -> None:
        if is_hub(uri):
            raise RecipeError(
                f"{uri}: a run cannot write to the Hugging Face Hub. Choose a folder or another storage, and upload the "
                "finished soup, as in `hf upload ORG/NAME FOLDER`."
            )
        self.uri, self.folder = uri, cache_folder() / "out" / content_key(uri)
        self._known: dict[str, tuple[int, int]] = {}
        self._pushing = threading.Lock()

    def fetch(self) -> None:
        """Replace the local copy by a new download; models become empty files.

        Raises SoupError if the copy cannot be written, RecipeError if a name would lead out of it.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        with writing(self.folder):
            (self.folder / "state").mkdir(parents=True)
        for name, found in storage.walk(self.uri).items():
            if name == LEASE_FILE:
                continue
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise RecipeError(
                    f"{self.uri} has an object named {name!r}, which is no path of a file. Choose another OUT."
                )
            is_model = name.endswith((".safetensors", ".distcp")) and found.size > SMALL
            data = b"" if is_model else storage.read_bytes(storage.join(self.uri, name))
            target = self.folder / name
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                self._known[name] = self._state(target)

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
        with self._pushing:
            here = self._uploadable(only)
            changed = {}
            for name in sorted(here, key=lambda name: name == "run.json"):
                with suppress(FileNotFoundError):  # deleted just now
                    if self._known.get(name) != (state := self._state(here[name])):
                        changed[name] = state
            total, done = sum(size for size, _ in changed.values()), 0
            for name, state in changed.items():
                progress("uploading", done, total)
                with suppress(FileNotFoundError):
                    storage.upload(self.folder / name, storage.join(self.uri, name))
                    self._known[name] = state
                done += state[0]
            for name in [n for n in self._known if n.startswith(only) and n not in here]:
                storage.remove(storage.join(self.uri, name))
                del self._known[name]

    def _uploadable(self, only: str) -> dict[str, Path]:
        """Return the files whose relative paths begin with `only`, except locks and files that are being written."""
        files = {str(f.relative_to(self.folder)): f for f in self.folder.rglob("*") if f.is_file()}
        return {
            name: file
            for name, file in files.items()
            if name.startswith(only) and not name.startswith("state/out/") and not name.endswith((".tmp", "/lock"))
        }

    def tidy(self) -> None:
        """Delete the remote state files that do not exist locally, except the lease."""
        for name in storage.walk(f"{self.uri}/state"):
            if name != "lease" and not (self.folder / "state" / name).exists():
                storage.remove(f"{self.uri}/state/{name}")
