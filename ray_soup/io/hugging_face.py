"""Files of repositories on the Hugging Face Hub: hf://ORG/NAME@REVISION/PATH, and hf://datasets/ORG/NAME@REVISION/PATH.

A revision is a branch, a tag or a commit, by default main. `pinned` replaces it by the commit that it names now; the driver
does so once, so that all processes of a run read the same files and the recipe of a run says which. Files are downloaded by
`huggingface_hub` into its own cache, on each node that reads them, as HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN and
HF_ENDPOINT say.
"""

from __future__ import annotations

import glob
import json
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.cache import cache_folder, cached, content_key
from ray_soup.io.disk import write_text
from ray_soup.io.hub_errors import constants, explained, hub_utils, may_pass, not_cached, repository
from ray_soup.io.hub_path import COMMIT, SCHEME, HubPath, is_hub
from ray_soup.io.progress import drain

if TYPE_CHECKING:
    from ray_soup.recipe import Recipe

PAUSES_S = (1, 4)  # between attempts to reach the Hub
REQUEST_S = 60  # timeout of one request
POLL_S = 0.5  # between two reports of the bytes downloaded so far
LARGE = 1 << 26
"""Size in bytes above which the first bytes of a file are read without downloading it: headers, to check before."""
BEGINNING = 1 << 24
"""The number of these bytes."""
SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab")
"""Suffixes of the files that describe a model, its tokenizer and its image processor."""
TEMPLATES = "additional_chat_templates"
"""The only folder in which such a file may be."""
_COMMITS: dict[tuple[str, str, str], str] = {}  # of the revisions that this process has resolved


# Revisions


def pinned(path: str) -> str:
    """Return a path or URI with the commit that its revision names; all that is not on the Hub unchanged.

    Raises RecipeError if the revision cannot be resolved.
    """
    if not is_hub(path):
        return path
    where = HubPath.parse(path)
    return str(replace(at_commit(where), inside="")) + HubPath.rest(path)


def pinned_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with the commits that the revisions in it name now.

    If the model is on the Hub, it also becomes the `base_model` of a recipe that has none. Raises RecipeError.
    """
    from ray_soup.recipe import with_changes

    _COMMITS.clear()
    changes: dict[str, Any] = {}
    library, _, name = recipe.model.partition(":")
    if is_hub(name):
        changes["model"] = f"{library}:{pinned(name)}"
        if recipe.base_model is None:
            changes["base_model"] = HubPath.parse(name).repo
    places = {"ingredients": recipe.ingredients}
    places |= {f"data.{key}": getattr(recipe.data, key) for key in ("train", "fit", "select", "test")}
    places |= {f"finetune.{key}": getattr(recipe.finetune, key) for key in ("init", "pretrained")}
    changes |= {key: _pinned_all(value) for key, value in places.items()}
    changes = {k: v for k, v in changes.items() if k not in places or v != places[k]}
    return with_changes(recipe, changes) if changes else recipe


def notes_of(recipe: Recipe) -> list[str]:
    """Return a note about which commits a recipe's model and data are from, if they are on the Hub."""
    texts = [recipe.model.partition(":")[2], recipe.data.train or "", *recipe.data.sources().values()]
    found = dict.fromkeys(str(replace(HubPath.parse(text), inside="")) for text in texts if is_hub(text))
    return [f"From the Hugging Face Hub: {', '.join(found)}."] if found else []


def _pinned_all(value: Any) -> Any:
    """Pin every text in a text, a list or a mapping."""
    if isinstance(value, str):
        return pinned(value)
    if isinstance(value, list):
        return [_pinned_all(one) for one in value]
    return {name: _pinned_all(one) for name, one in value.items()} if isinstance(value, dict) else value


def at_commit(where: HubPath) -> HubPath:
    """Return a path at the commit of its revision, which is resolved once in a process. Raises RecipeError."""
    key = (where.kind, where.repo, where.revision)
    if COMMIT.fullmatch(where.revision):
        return where
    if key not in _COMMITS:
        _COMMITS[key] = _commit_now(where)
    return replace(where, revision=_COMMITS[key])


def _commit_now(where: HubPath) -> str:
    """Ask the Hub for the commit of a revision; offline, its cache."""
    reference = repository(where) / "refs" / where.revision
    if constants().HF_HUB_OFFLINE:
        with suppress(OSError):
            return reference.read_text(encoding="utf-8").strip()
        raise not_cached(where)
    commit, files = _ask(where)
    _keep(replace(where, revision=commit), files)
    with suppress(OSError, SoupError):  # if the cache cannot be written, a later run that is offline has to name the commit
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, commit)
    return commit


# What is in a repository


def files_of(where: HubPath) -> Mapping[str, int]:
    """Return the sizes in bytes of all files of the repository, by path, sorted. Raises RecipeError."""
    at = at_commit(where)
    return _listing(at.kind, at.repo, at.revision, str(cache_folder()))


def below(where: HubPath) -> list[str]:
    """List the files at or below a path. Raises RecipeError."""
    files = files_of(where)
    if where.inside in files:
        return [where.inside]
    return [name for name in files if not where.inside or name.startswith(f"{where.inside}/")]


@lru_cache(64)
def _listing(kind: str, repo: str, commit: str, _cache: str) -> Mapping[str, int]:
    where = HubPath(kind, repo, commit, "")
    return _keep(where, None)


def _keep(where: HubPath, known: dict[str, int] | None) -> dict[str, int]:
    """Return the files of a commit, by the cache of this node, which keeps them: a commit never changes."""

    def make(folder: Path) -> Iterator[None]:
        files = known if known is not None else _listed_by_hub(where)
        write_text(folder / "files.json", json.dumps(files))
        yield

    hold = drain(cached("hub", content_key(where.kind, where.repo, where.revision), 1 << 20, make))
    try:
        found: dict[str, int] = json.loads((hold.path / "files.json").read_text(encoding="utf-8"))
    finally:
        hold.close()
    return found


def _listed_by_hub(where: HubPath) -> dict[str, int]:
    if not constants().HF_HUB_OFFLINE:
        return _ask(where)[1]
    import huggingface_hub

    # A cache may have some files of a commit only, as of a killed download: without a list, they may not be enough.
    listed = getattr(huggingface_hub, "get_cached_repo_tree", None)  # of later versions
    try:
        found = None if listed is None else listed(**where.options)
    except Exception:
        found = None
    if found is None:
        raise not_cached(where)
    return dict(sorted((file.path, file.size) for file in found))


def _ask(where: HubPath) -> tuple[str, dict[str, int]]:
    """Ask the Hub for the commit of a revision and the sizes of its files. Raises RecipeError."""
    import huggingface_hub

    for pause in (*PAUSES_S, None):
        try:
            info: Any = huggingface_hub.HfApi().repo_info(**where.options, files_metadata=True, timeout=REQUEST_S)
        except Exception as error:
            if pause is None or not may_pass(error):
                raise explained(error, where) from error
            time.sleep(pause)
        else:
            if not COMMIT.fullmatch(info.sha or ""):
                raise RecipeError(f"{where}: {constants().ENDPOINT} names no commit. Check HF_ENDPOINT.")
            files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            return info.sha, dict(sorted(files.items()))
    raise AssertionError


# Downloads


def settings_folder(name: str) -> str:
    """Return a folder with the files that describe the model at `name`, downloaded if it is on the Hub.

    They are those that `from_pretrained` reads, without the weights. Raises RecipeError if there is no config.json.
    """
    if not is_hub(name):
        return name
    where = at_commit(HubPath.parse(name))
    names = []
    for file in below(where):
        path = PurePosixPath(file).relative_to(where.inside)
        if path.suffix in SETTINGS and str(path.parent) in (".", TEMPLATES) and not file.endswith(".index.json"):
            names.append(file)
    if where.kind != "model" or not any(PurePosixPath(file).name == "config.json" for file in names):
        raise RecipeError(
            f"{where} has no config.json. Choose a model of transformers, or add its folder, as in {name}/FOLDER."
        )
    return drain(download(str(where), names))


def download(uri: str, names: Sequence[str] | None = None) -> Generator[tuple[int, int], None, str]:
    """Download a file or folder of a repository into the cache of `huggingface_hub`, unless it is there.

    Args:
        uri: the file or folder.
        names: files of the repository; default: all at or below `uri`.

    Yields (bytes downloaded, bytes in total). The value is the local path of `uri`. Raises RecipeError if the Hub refuses,
    SoupError if it fails, FileNotFoundError if there is no such file or folder.
    """
    where = at_commit(HubPath.parse(uri))
    names, sizes = below(where) if names is None else names, files_of(where)
    if not names:
        raise FileNotFoundError(f"{where} does not exist")
    missing = [name for name in names if _in_cache(where, name) is None]
    if missing:
        yield from _fetched(where, missing, sum(sizes[name] for name in missing))
    for name in names:
        path = _in_cache(where, name)
        if path is None:
            raise SoupError(f"{where.repo}: {name} could not be downloaded from {constants().ENDPOINT}. Rerun the command.")
        if os.path.getsize(path) != sizes[name]:
            raise SoupError(
                f"{path} has {os.path.getsize(path):,} bytes; the Hub lists {sizes[name]:,} for {where}. Remove it, and "
                "rerun the command to download it again."
            )
    root = Path(str(path)).parents[len(PurePosixPath(name).parts) - 1]
    return str(root / where.inside)


def download_all(paths: Sequence[str]) -> Generator[tuple[int, int], None, None]:
    """Download those of the files that are on the Hub. Yields (bytes downloaded, bytes in total) of one at a time."""
    for path in paths:
        if is_hub(path):
            yield from download(path)


def _in_cache(where: HubPath, name: str) -> str | None:
    """Return the local path of a file in the cache of `huggingface_hub`, if it is there."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(filename=name, **where.options)
    return found if isinstance(found, str) else None


def _fetched(where: HubPath, names: Sequence[str], total: int) -> Generator[tuple[int, int], None, None]:
    """Download files in a thread, whose progress is the size of what is in the cache."""
    if constants().HF_HUB_OFFLINE:
        raise not_cached(where, names[0])
    import huggingface_hub

    with suppress(Exception):
        hub_utils().disable_progress_bars()
    patterns, failures = [glob.escape(name) for name in names], list[BaseException]()

    def work() -> None:
        for pause in (*PAUSES_S, None):
            try:
                huggingface_hub.snapshot_download(**where.options, allow_patterns=patterns)
                return
            except BaseException as error:
                if pause is None or not may_pass(error):
                    failures.append(error)
                    return
                time.sleep(pause)

    blobs = repository(where) / "blobs"
    before = _bytes_in(blobs)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        yield min(max(_bytes_in(blobs) - before, 0), total), total
    if failures:
        raise explained(failures[0], where, downloading=True) from failures[0]


def _bytes_in(blobs: Path) -> int:
    """Return the bytes of the files in a folder, whole and in part."""
    total = 0
    with suppress(OSError), os.scandir(blobs) as entries:
        for entry in entries:
            with suppress(OSError):  # renamed just now
                total += entry.stat().st_size
    return total


# Reading, as from a file system of pyarrow


class HubFiles:
    """The methods of a file system of pyarrow by which storage reads; nothing can be written."""

    def get_file_info(self, what: Any) -> Any:
        """Return the pyarrow FileInfo of a path, or a list of them for a FileSelector."""
        from pyarrow import fs

        if isinstance(what, str):
            where = HubPath.parse(SCHEME + what)
            size = files_of(where).get(where.inside)
            if size is not None:
                return fs.FileInfo(what, fs.FileType.File, size=size)
            return fs.FileInfo(what, fs.FileType.Directory if below(where) else fs.FileType.NotFound)
        where = HubPath.parse(SCHEME + what.base_dir)
        found: dict[str, Any] = {}
        for name in below(where):
            parts = PurePosixPath(name).relative_to(where.inside).parts
            for end in range(1, len(parts) + 1 if what.recursive else min(len(parts), 1) + 1):
                path = "/".join((what.base_dir.rstrip("/"), *parts[:end]))
                of_file = {"type": fs.FileType.File, "size": files_of(where)[name]}
                found[path] = fs.FileInfo(path, **(of_file if end == len(parts) else {"type": fs.FileType.Directory}))
        return [found[path] for path in sorted(found)]

    def open_input_file(self, path: str) -> HubFile:
        """Open a file. Raises FileNotFoundError."""
        where = at_commit(HubPath.parse(SCHEME + path))
        if where.inside not in files_of(where):
            raise FileNotFoundError(f"{where} does not exist")
        return HubFile(where)

    def create_dir(self, path: str, **_: Any) -> None:
        """Refuse to write. Raises RecipeError."""
        raise RecipeError(f"{SCHEME}{path}: the Hub can be read, not written. Choose another folder.")


class HubFile:
    """A file of a repository, for reads by range from several threads."""

    def __init__(self, where: HubPath) -> None:
        self._where, self._size = where, files_of(where)[where.inside]
        self._local: Any = None
        self._opening = threading.Lock()

    def read_at(self, nbytes: int, offset: int) -> bytes:
        """Return `nbytes` bytes at `offset`; unless these are the first bytes of a large file, it is downloaded before."""
        with self._opening:
            if self._local is None and not (self._size > LARGE and offset + nbytes <= BEGINNING and self._is_online()):
                import pyarrow

                self._local = pyarrow.OSFile(drain(download(str(self._where))))
        data: bytes = self._range(nbytes, offset) if self._local is None else self._local.read_at(nbytes, offset)
        return data

    def _is_online(self) -> bool:
        """Return whether the file has to come from the Hub, and can."""
        return not constants().HF_HUB_OFFLINE and _in_cache(self._where, self._where.inside) is None

    def _range(self, nbytes: int, offset: int) -> bytes:
        import huggingface_hub

        utils = hub_utils()
        url = huggingface_hub.hf_hub_url(filename=self._where.inside, **self._where.options)
        headers = {**utils.build_hf_headers(), "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        for pause in (*PAUSES_S, None):
            try:
                answer = utils.get_session().get(url, headers=headers, timeout=REQUEST_S)
                utils.hf_raise_for_status(answer)
                content: bytes = answer.content
                return content if answer.status_code == 206 else content[offset : offset + nbytes]
            except Exception as error:
                if pause is None or not may_pass(error):
                    raise explained(error, self._where, downloading=True) from error
                time.sleep(pause)
        raise AssertionError
