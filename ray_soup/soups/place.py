"""Where an output folder may be: checked before anything is created in it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.claims import state_of

JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of a Ray job's working directory, which is deleted some time after the job."""
BEFORE_BEGUN = re.compile(r"lock|out|lease|replaced|run-[0-9]+|before-[0-9]+|\.claim-.*|(lease|begun\.json)\..*tmp")
"""What a run that failed before it wrote begun.json may leave in state/, and what it was to replace."""
ZOO_STATE = ("init.safetensors", "tune", "trials", "train", "failures.json")  # of `finetune` in ray_soup 0.1


def local_folder(out: str | Path, what: str = "OUT") -> Path:
    """Return the absolute path of a local folder that the user named; `~` is the home folder, as in a shell.

    Raises RecipeError if this cannot be the name of a folder.
    """
    text = os.fspath(out)
    if not text:
        raise RecipeError(f"{what} is empty; expected a folder, or a URI such as s3://bucket/folder.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecipeError(f"{what} {text!a}: this name is not UTF-8. Choose another.") from None
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise RecipeError(f"{what} {text!a}: this name contains control characters. Choose another.")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise RecipeError(
            f"{what} {text}: there is no user {user[1:] or 'with a home folder'}. Write ./{user} for a folder."
        )
    return Path(expanded).absolute()


def check_place(out: Path) -> None:
    """Check that a run may write into the local folder `out`, which may exist or not; changes nothing.

    Raises RecipeError if it is not a folder, is full of other files, leads elsewhere through a link, or would be deleted
    with a Ray job.
    """
    if JOB_FOLDER in f"{os.path.realpath(out)}/":
        raise RecipeError(
            f"{out} is inside the working directory of a Ray job, which Ray deletes after the job. Choose an absolute path "
            "on a disk that outlives the job, or a URI such as s3://bucket/folder."
        )
    try:
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise RecipeError(f"The output folder {out} cannot be created: {_kind(out)} is in its place. Choose another.")
        check_own(out)
        check_links(out)
    except OSError as error:
        raise RecipeError(f"The output folder {out} cannot be read: {error.strerror}. Choose another.") from error


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist,"
    return "a file" if path.is_file() else "something that is not a folder"


def check_own(out: Path, zoo: bool = True) -> None:
    """Check that ray_soup wrote the files in a folder.

    Args:
        out: the folder.
        zoo: True if it may be a folder of `finetune` of ray_soup 0.1, which has no begun.json.

    Raises RecipeError if it has other files.
    """
    state = out / "state"
    folders = [folder for folder in {state, state_of(out)} if folder.is_dir()]
    if any(os.path.lexists(folder / "begun.json") for folder in folders):
        return
    names = sorted(f.name for f in out.iterdir() if f.name != "state")
    inside = sorted(f.name for folder in folders for f in folder.iterdir() if not BEFORE_BEGUN.fullmatch(f.name))
    if state.is_symlink() or (os.path.lexists(state) and not state.is_dir()):
        names.append("state")
    if zoo and set(inside) & set(ZOO_STATE):
        return
    foreign = [*names, *(f"state/{name}" for name in inside)]
    if foreign:
        raise RecipeError(
            f"{out} is not empty and was not written by ray_soup (found {', '.join(foreign[:4])}). Choose a new folder."
        )


def check_links(out: Path) -> None:
    """Check that no folder or file in `out` that a run would write into is a link that leads out of it.

    Links among the finished files are no danger: they are replaced, not followed; nor are those that W&B makes in its own
    folder. Raises RecipeError.
    """
    inside = f"{os.path.realpath(out)}/"
    for folder, folders, files in os.walk(out):
        if Path(folder) == out / "wandb":
            folders.clear()
            continue
        below = files if Path(folder) != out else []
        for name in (*folders, *below):
            path = os.path.join(folder, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(inside):
                raise RecipeError(
                    f"{path} is a link to {os.readlink(path)}, outside of OUT: a run would write there. Remove the link."
                )


def is_within(path: Path, folder: Path) -> bool:
    """Return whether `path` is `folder` or inside it, with links resolved."""
    return f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(folder)}/")


def check_new(out: str | Path, source: Path, overwrite: bool = False) -> None:
    """Check that `out` is a folder apart from `source`, for a copy of the soup there. Raises RecipeError.

    Args:
        out: the folder or URI of the copy.
        source: the folder of the soup.
        overwrite: True if the folder may hold an earlier run; otherwise it must be new or empty.
    """
    if storage.is_remote(str(out)):
        return
    folder = local_folder(out)
    if is_within(folder, source):
        raise RecipeError(f"{out} is inside {source}, the soup that is to be rebuilt. Choose a folder outside of it.")
    check_place(folder)
    unfinished = os.path.lexists(state_of(folder) / "begun.json") and not os.path.lexists(folder / "run.json")
    if folder.is_dir() and not (unfinished or overwrite) and any(f.name != "state" for f in folder.iterdir()):
        raise RecipeError(f"{out} is not empty. Choose a new folder, or add --overwrite to replace what is there.")


def remove_new(paths: Sequence[Path]) -> None:
    """Remove the new folders that are empty again, from the inside out."""
    with suppress(OSError):
        for path in paths:
            path.rmdir()
