"""The files of an output folder that runs of ray_soup wrote, by their own records, and whether a run got to work there.

A folder that was begun by a mistake must not block the next try, and a new run that replaces an old one must not delete
anything else. The old files are kept in state/replaced until the new run has finished.

Throughout, `out` is the output folder, or its local mirror, and `state` the folder with the state of the run that holds it.
Names are those that the files have after the run: state/learn.pt.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.claims import CLAIM, HELD, discard
from ray_soup.io.disk import files_below, read_json, write_bytes, writing
from ray_soup.io.hashing import sha256_file
from ray_soup.io.mirror import OF_ACTORS
from ray_soup.soups.records import read_begun, read_run_record

STARTED = ("begun.json", "resolved.json")  # what a run writes into state/ before it has done any work
REPLACED = "replaced"
"""The folder in state/ with the files that a new run replaces."""
_STATE = (
    *STARTED, *HELD, REPLACED, OF_ACTORS, "out", "soups", "evaluate", "evaluated", "learn.pt", "first", "tune", "trials",
    "train", "init.safetensors", "failures.json", "trackers.json",
)  # fmt: skip
_TEMPORARY = re.compile(r".+\.\d+-[0-9a-f]{8}\.tmp")
_NO_WORK = re.compile(r"tune/.*|soups/(cosines\.npy|contents\.json)|trackers\.json")
"""Files in state/ that say nothing about a finished step or figure; the trials of a search keep their own state."""


# Whether a run got to work


def contents(state: Path) -> dict[str, bytes]:
    """Return the files that a run keeps in a folder state/, with what tells whether they changed.

    This is the content of those in STARTED, and size and time of the others.
    """
    found = {}
    for file in files_below(state):
        name = str(file.relative_to(state))
        if not name.startswith(("out/", f"{REPLACED}/", CLAIM)) and name not in HELD and not name.endswith(".tmp"):
            with suppress(FileNotFoundError):  # removed just now
                seen, known = file.stat(), file.name in STARTED
                found[name] = file.read_bytes() if known else f"{seen.st_size} {seen.st_mtime_ns}".encode()
    return found


def has_work(out: Path, state: Path) -> bool:
    """Return whether a folder holds a finished run, or a finished step or figure of an unfinished one."""
    with suppress(RecipeError):
        read_run_record(out)
        return _is_finished(out) or any(_is_work(state, name) for name in contents(state))
    return True


def _is_work(state: Path, name: str) -> bool:
    if Path(name).name in STARTED or _NO_WORK.fullmatch(name):
        return False
    if name != "learn.pt" and not (name.startswith("soups/") and name.endswith(".pt")):
        return True
    from ray_soup.soups.state import load_state

    try:
        learned = load_state(state / name)
    except SoupError:  # damaged
        return True
    return bool(learned.steps or learned.curve or learned.began)


def restore(state: Path, before: dict[str, bytes]) -> bool:
    """Restore a folder state/ to its `contents` before a run, unless the run got to work; return whether it did."""
    now = contents(state)
    changed = {name for name in (*now, *before) if now.get(name) != before.get(name)}
    if any(_is_work(state, name) for name in changed if name in now):
        return False
    for name in changed:
        file = state / name
        if name in before and file.name in STARTED:
            seen = file.stat().st_mtime_ns if file.exists() else None
            write_bytes(file, before[name])
            if seen is not None:
                os.utime(file, ns=(seen, seen))  # the time of begun.json identifies the run
        else:
            file.unlink(missing_ok=True)
    _remove_empty(state)
    return True


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders in a folder, from the inside out."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


# Whose files these are


def own_files(out: Path, state: Path, hashed: bool = True) -> tuple[list[str], list[str]]:
    """Return the names of the files of an output folder that runs of ray_soup wrote, and of the others.

    Args:
        out: the folder.
        state: the folder with the state.
        hashed: True if a finished file must still have the SHA-256 that its record lists.
    """
    listed = _listed(out, state)
    own: list[str] = []
    others: list[str] = []
    for name in (*(one for one in _files(out) if not one.startswith("state/")), *(f"state/{one}" for one in _files(state))):
        file = _at(name, out, state)
        (own if _is_own(file, name, listed, hashed) else others).append(name)
    return own, others


def _at(name: str, out: Path, state: Path) -> Path:
    """Return where the file of a name is now."""
    return state / name.removeprefix("state/") if name.startswith("state/") else out / name


def _is_own(file: Path, name: str, listed: dict[str, str | None], hashed: bool) -> bool:
    top, _, inside = name.partition("/")
    if _TEMPORARY.fullmatch(file.name):
        return True
    if top == "state":
        first = inside.partition("/")[0]
        return first in _STATE or first.startswith(("polish.", "polish_", CLAIM))
    if inside:
        return (top == "tensorboard" and ".tfevents." in file.name) or f"{top}/" in listed
    digest = listed.get(name)
    return name in listed and (not hashed or digest is None or (file.is_file() and sha256_file(str(file)) == digest))


def _listed(out: Path, state: Path) -> dict[str, str | None]:
    """Return the names of finished files with their SHA-256, as far as records say, and of folders, which end in `/`."""
    found: dict[str, str | None] = {}
    for folder in (state / "out", out):  # the first is where an interrupted publication left its record
        with suppress(RecipeError):
            record = read_run_record(folder)
            if record is not None:
                found |= {**record.get("files", {}), "run.json": None}
    with suppress(OSError, ValueError):
        entries: Any = read_json(out / "manifest.json")
        if isinstance(entries, list):
            found |= {
                one["file"]: one["sha256"] for one in entries if isinstance(one, dict) and {"file", "sha256"} <= one.keys()
            }
            found |= dict.fromkeys(("manifest.json", "preprocessing.json"))
    with suppress(RecipeError):
        begun = read_begun(state / "begun.json")
        if begun.get("kind") == "search" or re.search(r"^loggers:\n(- \w+\n)*- wandb$", begun["recipe"], re.MULTILINE):
            found["wandb/"] = None
    return found


# Replacing an earlier run

_LAST_MOVED = ("run.json", "manifest.json", "state/begun.json")
"""What stays in place until everything else has been moved, so that an interrupted move can be repeated."""


def clear(out: Path, state: Path) -> None:
    """Delete what runs of ray_soup wrote in a folder that this run holds, and nothing else; what waits there stays."""
    with writing(out):
        for name in own_files(out, state)[0]:
            if not _is_held(name):
                discard(_at(name, out, state), state)
        _remove_empty(state)


def replace_run(out: Path, state: Path, is_mirror: bool) -> None:
    """Move what runs of ray_soup wrote in a folder that this run holds into state/replaced, for a new run.

    In a local mirror of remote storage, where large files are not complete, they are deleted. Files of an interrupted run
    that was to replace others are deleted, too.

    Raises RecipeError, and changes nothing, if there are other files, or files that were changed since.
    """
    own, others = own_files(out, state, hashed=not is_mirror)
    if others:
        raise RecipeError(
            f"--overwrite deletes only what ray_soup wrote, but {out} has other files, or files that were changed since: "
            f"{', '.join(others[:4])}{', ...' if len(others) > 4 else ''}. Move them elsewhere, or choose a new folder."
        )
    kept = state / REPLACED
    again = (kept / "state" / "begun.json").exists()
    with writing(kept):
        if again and _is_finished(out):  # what waits there was to go when this one was finished
            shutil.rmtree(kept)
            again = False
        for name in sorted(own, key=lambda name: _LAST_MOVED.index(name) if name in _LAST_MOVED else -1):
            if _is_held(name):
                continue
            if is_mirror or again:
                discard(_at(name, out, state), state)
            else:
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                _at(name, out, state).replace(kept / name)
        _remove_empty(out)
        state.mkdir(exist_ok=True)  # a mirror has no lease there


def _is_finished(out: Path) -> bool:
    """Return whether a folder has a finished soup, or finished checkpoints."""
    with suppress(RecipeError):
        record = read_run_record(out)
        return (record is not None and record["exit"] == 0) or os.path.lexists(out / "manifest.json")
    return False


def put_back(out: Path, state: Path) -> None:
    """Move the files in state/replaced back to where they were, run.json last."""
    kept = state / REPLACED
    for name in sorted(_files(kept), key=lambda name: (name == "run.json", name)):
        target = _at(name, out, state)
        target.parent.mkdir(parents=True, exist_ok=True)
        (kept / name).replace(target)
    shutil.rmtree(kept, ignore_errors=True)


def _files(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() or not file.is_dir():
            yield str(file.relative_to(folder))


def _is_held(name: str) -> bool:
    """Return whether this file belongs to the claim of the run, or waits to be put back."""
    return name in {f"state/{one}" for one in HELD} or name.startswith((f"state/{CLAIM}", f"state/{REPLACED}/"))
