"""Open a source of labeled examples, without decoding anything.

A source is an `.npz` file, Parquet, a folder of images, a dataset that `save_to_disk` of Hugging Face `datasets` wrote, or a
function.
"""

from __future__ import annotations

import glob
import os
import re
import socket
from collections.abc import Generator, Sequence
from pathlib import Path

from ray_soup.io import hugging_face, storage
from ray_soup.io.hub_path import HubPath, is_hub
from ray_soup.recipe import Data, is_function
from ray_soup.task import hub
from ray_soup.task.arrays import check_npz, read_npz
from ray_soup.task.classes import Classes, reference, renumbering
from ray_soup.task.dataset_functions import read_function
from ray_soup.task.folders import find_files
from ray_soup.task.image_folders import IMAGES, peek_image_folder, read_image_folder
from ray_soup.task.mask_folders import read_mask_folder
from ray_soup.task.raw_examples import KINDS, RawExamples, Source, check_regular
from ray_soup.task.tables import read_parquet, read_saved

PARQUET = ".parquet"


def key_of(name: str) -> str:
    """Return the recipe key of a source, such as data.test.v2 for test_v2."""
    return "data." + name.replace("test_", "test.", 1)


def named_sources(data: Data, targets: str = "classes") -> dict[str, Source]:
    """List the sources that a recipe names, by train, fit, select, test or test_NAME, with their kind of targets."""
    specs = {**({"train": data.train} if data.train is not None else {}), **data.sources()}
    return {name: Source(key_of(name), spec, targets) for name, spec in specs.items()}


def read_source(source: Source, kind: str = "image") -> Generator[tuple[int, int], None, RawExamples]:
    """Open a source of examples, from this machine or from a copy in the node's cache.

    Args:
        source: a path, a glob of Parquet files, a URI, or `module:function`.
        kind: "image" or "text": which column of a table to read.

    Yields (done, total) while it copies, checks arrays or calls a function. Raises RecipeError if the source cannot be read.
    """
    if is_function(source.spec):
        return (yield from read_function(source))
    path = yield from local_path(source)
    if isinstance(path, str) and path.endswith(".npz") and not os.path.isdir(path):
        check_regular(source, path)
        return (yield from read_npz(source, path))
    return _read_local(source, path, kind)


def check_sources(data: Data, targets: str = "classes") -> None:
    """Check the local sources of a recipe on this machine: headers, labels and names of classes; nothing is decoded.

    Raises RecipeError.
    """
    known: list[tuple[Classes, RawExamples]] = []
    sources = named_sources(data, targets)
    for source in filter(is_local, sources.values()):
        raw = _headers(source)
        if raw.classes is not None:
            known.append((raw.classes, raw))
    if all(map(is_local, sources.values())):  # the numbering may depend on every source
        shared = reference([classes for classes, _ in known])
        for classes, raw in known:
            assert shared is not None
            renumbering(classes, shared, set(raw.labels.tolist()))


def _headers(source: Source) -> RawExamples:
    """Read a local source without decoding it. Raises RecipeError."""
    path = existing(source)
    if isinstance(path, str) and path.endswith(".npz") and not os.path.isdir(path):
        check_regular(source, path)
        return check_npz(source, path)
    return _read_local(source, path, None, headers_only=True)


def count_examples(data: Data, targets: str = "classes") -> dict[str, int]:
    """Return the number of examples of each source of evaluation data, with their kind of targets.

    Raises RecipeError unless all are local files.
    """
    found = {}
    for name, spec in data.sources().items():
        source = Source(key_of(name), spec, targets)
        if not is_local(source):
            raise source.error("is not a file on this machine, so its size is not known. Use a local copy.")
        found[name] = len(_headers(source).labels)
    return found


def peek_classes(source: Source) -> Classes | None:
    """Return the names of the classes of a local source, if it exists and knows them, after reading as little as possible.

    Raises RecipeError if the source is damaged.
    """
    if not is_local(source) or not _matching(source.spec):
        return None
    path = existing(source)
    if isinstance(path, str) and (path.endswith(".npz") or not os.path.exists(path)):
        return None
    of_files = isinstance(path, str) and os.path.isdir(path) and not os.path.exists(os.path.join(path, "state.json"))
    if of_files and not find_files(source, Path(str(path)), (PARQUET,), first_only=True).everything(PARQUET):
        return peek_image_folder(source, Path(str(path)))
    return _read_local(source, path, None, headers_only=True).classes


def is_local(source: Source) -> bool:
    """Return whether a source is a path on this machine."""
    return not is_function(source.spec) and not storage.is_remote(source.spec)


def _matching(spec: str) -> list[str]:
    """Return the existing paths that a local path or glob names, sorted."""
    if os.path.lexists(spec):
        return [spec]
    return sorted(storage.glob(spec)) if glob.has_magic(spec) else []


def local_path(source: Source, suffixes: Sequence[str] = (PARQUET,)) -> Generator[tuple[int, int], None, str | list[Path]]:
    """Return the path of a source on this machine, or the files of a glob, all with one of `suffixes`.

    Raises RecipeError.
    """
    spec = source.spec
    if not storage.is_remote(spec):
        return existing(source, suffixes)
    if glob.has_magic(spec) and not storage.exists(spec):
        files, found = [], sorted(storage.glob(spec))
        _only_tables(source, [Path(uri) for uri in found], suffixes)
        for uri in found:
            files.append(Path((yield from storage.local_copy(uri))))
        return files
    try:
        if is_hub(spec):
            return (yield from _from_hub(source, suffixes))
        return (yield from storage.local_copy(spec))
    except FileNotFoundError:
        raise source.error(_missing()) from None


def _from_hub(source: Source, suffixes: Sequence[str]) -> Generator[tuple[int, int], None, str]:
    """Download a source from the Hugging Face Hub; of a folder with tables, only these and the dataset card.

    Raises RecipeError for a folder with tables of several splits, before anything is downloaded.
    """
    inside = HubPath.parse(source.spec).inside
    names = hugging_face.below(HubPath.parse(source.spec))
    tables = [name for name in names if Path(name).suffix.lower() in suffixes and not re.search(r"(^|/)\.", name)]
    if names != [inside] and tables:
        card, top = os.path.join(inside, "README.md"), source.spec
        if card in names:  # it lists the configurations
            top = yield from hugging_face.download(source.spec, [card])
        hub.one_split(source, Path(top), [Path(top, os.path.relpath(name, inside or None)) for name in tables], source.spec)
        names = [*tables, *([card] if card in names else [])]
    return (yield from hugging_face.download(source.spec, names))


def existing(source: Source, suffixes: Sequence[str] = (PARQUET,)) -> str | list[Path]:
    """Return the path of a local source, or the files of a glob. Raises RecipeError if there is none."""
    found = _matching(source.spec)
    if found == [source.spec]:
        return source.spec
    return _only_tables(source, [Path(path) for path in found], suffixes)


def _only_tables(source: Source, files: list[Path], suffixes: Sequence[str]) -> list[Path]:
    if not files:
        raise source.error(_missing())
    other = [file for file in files if file.suffix not in suffixes]
    if other:
        kinds = "Parquet" if len(suffixes) == 1 else "Parquet or JSON"
        raise source.error(f"{other[0].name} is not a {kinds} file. A pattern may match {kinds} files only: extend it.")
    fixed = re.split(r"[*?\[]", source.spec, maxsplit=1)[0]
    above = os.path.expanduser(fixed[: fixed.rfind("/") + 1])
    hub.one_split(source, Path(above), files, above)
    return files


def _missing() -> str:
    return (
        f"does not exist on {socket.gethostname()}. Expected {KINDS}. Put it where every node can read it: a shared disk, "
        "or a URI."
    )


def _read_local(source: Source, path: str | list[Path], kind: str | None, headers_only: bool = False) -> RawExamples:
    """Read a folder or Parquet. Raises RecipeError if it is neither."""
    if isinstance(path, list):
        return read_parquet(source, Path(os.path.commonpath([file.parent for file in path])), path, kind)
    if os.path.isdir(path):
        return _folder(source, Path(path), kind, headers_only)
    check_regular(source, path)
    if path.endswith(PARQUET):
        return read_parquet(source, Path(path).parent, [Path(path)], kind)
    raise source.error(f"is not a supported source. Expected {KINDS}. Convert it to one of these.")


def only_split(source: Source, folder: Path) -> Path:
    """Return the folder of the only split that `save_to_disk` wrote into a folder; the folder itself if it has no splits.

    Raises RecipeError if there are several splits.
    """
    if not (folder / "dataset_dict.json").exists():
        return folder
    splits = hub.read_json(source, folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not splits or not all(_is_name(split) for split in splits):
        raise source.error("dataset_dict.json names no splits. Save the dataset again.")
    if len(splits) == 1:
        return only_split(source, folder / splits[0])
    raise source.error(f"contains the splits {', '.join(splits)}. Choose one, as in {source.spec}/{splits[0]}.")


def _folder(source: Source, folder: Path, kind: str | None, headers_only: bool) -> RawExamples:
    folder = only_split(source, folder)
    if (folder / "state.json").exists():
        return read_saved(source, folder, kind)
    scan = find_files(source, folder, (*IMAGES, PARQUET))
    parquet = scan.everything(PARQUET)
    if not parquet and source.targets == "pixels":
        return read_mask_folder(source, folder, scan)
    if not parquet:
        return read_image_folder(source, folder, scan, headers_only)
    hub.one_split(source, folder, parquet, source.spec)
    return read_parquet(source, folder, parquet, kind)


def _is_name(value: object) -> bool:
    """Return whether a value is the name of an entry of a folder."""
    return isinstance(value, str) and value == os.path.basename(value) and value not in ("", ".", "..")
