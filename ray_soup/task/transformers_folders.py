"""Folders of transformers among the ingredients, compared with the one that the recipe's model comes from.

`transformers:FOLDER` takes the config and the image processor or tokenizer from FOLDER. An ingredient's own folder holds
those of its training: where they act differently, the figures would be those of another model or preprocessing.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io import disk, storage
from ray_soup.io.hub_path import is_hub
from ray_soup.io.hugging_face import settings_folder
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.recipe.plain import shown
from ray_soup.task.libraries import structure
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.tokenizing import DEFAULT_LENGTH, UNLIMITED
from ray_soup.task.transformers_models import (
    TOKENIZER_FILES,
    length_of,
    load_config,
    load_image_processor,
    load_tokenizer,
    model_of,
    pixels,
)
from ray_soup.task.transformers_tasks import AUTO, auto_task

CONFIG = "config.json"
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = (*TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")
LARGEST = 1 << 26
"""Size in bytes up to which such a file is read; a vocabulary of 250,000 tokens takes 17 MB."""
UNIMPORTANT = re.compile(
    "_|.*drop|.*dtype|transformers_version|architectures|id2label|label2id|num_labels|problem_type|finetuning_task|output_|"
    "return_|.*processor_(class|type)|feature_extractor_type|tokenizer_class|name_or_path|.*data_format|device|backend|"
    "local_files_only|trust_remote_code|is_local|added_tokens_decoder|.*_file|model_max_length"
)
"""Settings that change nothing when a model is evaluated, or that are compared in another way."""
HUGE = re.compile(r"(?<![.\d])\d{5}")
"""A size of images, or a number of layers, that takes long to try."""
SIZES = ((97, 61), (400, 300))
"""Sizes of the images of noise that two image processors are compared on."""
TEXTS = (
    "The film isn't bad, it's GREAT!", "Un café à Zürich, 東京 and Москва: ½ № 42.", "  two  spaces\tand\na line  ",
    "e\u0301 \ufb01 🙂 @user #tag", "word " * 1000,
)  # fmt: skip
"""Texts that two tokenizers are compared on, besides their vocabularies."""

Difference = tuple[str, str, str, str]
"""A file, one of its settings, its value in the ingredient's folder, and the value in the folder of the recipe."""


@dataclass
class _Folder:
    """What is known about one folder with ingredients."""

    path: str
    files: dict[str, bytes] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    """The names of its classes, if it has any."""
    longest: int = 1 << 62
    """The number of tokens at which its tokenizer cuts texts."""
    differences: list[Difference] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    """Files that the library cannot read."""


def check_folders(
    spec: ModelSpec, ingredients: Sequence[Ingredient], preprocessed: bool
) -> tuple[list[str], dict[str, str]]:
    """Compare the config and the preprocessing in the folders of ingredients with those of `transformers:FOLDER`.

    Args:
        spec: the recipe key `model`.
        ingredients: the opened ingredients.
        preprocessed: whether the recipe has data that are preprocessed.

    Returns notes for the user, and the option `length` if the recipe does not state it and a shorter one was trained with.
    Raises RecipeError if they make another difference to the results.
    """
    transformers = spec.import_library()
    config = load_config(transformers, spec)
    task = auto_task(config, spec)
    names = () if not preprocessed else IMAGE_FILES if task == "ForImageClassification" else TEXT_FILES
    length = _length(transformers, spec, config, task) if names == TEXT_FILES else 0
    home = settings_folder(spec.name)
    own = _files(home, (CONFIG, *names)) if os.path.isdir(home) else {}
    folders: dict[tuple[tuple[str, bytes], ...], _Folder] = {}  # one of each content
    for path in dict.fromkeys(_folder_of(ingredient) for ingredient in ingredients):
        files = _files(path, (CONFIG, *names))
        if files:
            folders.setdefault(tuple(files.items()), _Folder(path, files))
    for folder in folders.values():
        if folder.files == own:
            continue
        with no_weight_warnings(), _copied(folder, config) as copy:
            changed = [name for name in (CONFIG, *names) if folder.files.get(name, own.get(name)) != own.get(name)]
            if changed[:1] == [CONFIG]:
                _compare_configs(transformers, config, task, copy, folder)
            file = next((name for name in changed if name != CONFIG), None)
            if file is not None and names == IMAGE_FILES:
                _compare_image_processors(transformers, spec, copy, file, folder)
            elif file is not None:
                _compare_tokenizers(transformers, spec, length, copy, file, folder)
    _refuse_differences(spec, [*folders.values()])
    _refuse_labels(spec, config, [*folders.values()])
    unread = [
        f"{storage.join(f.path, name)} cannot be read by transformers and was not compared with {spec.name}."
        for f in folders.values()
        for name in f.unread
    ]
    notes, shorter = _check_lengths(spec, [*folders.values()], length)
    return [*notes, *unread[:1]], shorter


def _folder_of(ingredient: Ingredient) -> str:
    folder = ingredient.files[0].rpartition("/")[0]
    return folder if storage.is_remote(folder) else os.path.abspath(folder)


def _files(folder: str, names: Sequence[str]) -> dict[str, bytes]:
    """Read those files of a folder that have one of the names, except what is no regular file or too large."""
    found = {}
    for name in sorted(set(names) & set(storage.listdir(folder))):
        path = storage.join(folder, name)
        try:
            if storage.isfile(path) and storage.stat(path).size <= LARGEST:
                found[name] = storage.read_bytes(path)
        except OSError:
            continue
    return found


def _copied(folder: _Folder, config: Any) -> tempfile.TemporaryDirectory[str]:
    """Copy the files to a temporary folder, with the recipe's config if there is none, as processors depend on it."""
    with disk.writing(Path(tempfile.gettempdir())):
        copy = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.save_pretrained(copy.name)
        for name, content in folder.files.items():
            (Path(copy.name) / name).write_bytes(content)
    return copy


def _compare_configs(transformers: Any, config: Any, task: str, copy: str, folder: _Folder) -> None:
    """Add the settings of a config.json that change what a model of the same shapes computes."""
    theirs = _loaded(load_config, transformers, ModelSpec("", "transformers", copy, {}))
    if theirs is None:
        folder.unread.append(CONFIG)
        return
    folder.labels = _labels(theirs)
    if type(theirs) is not type(config):
        folder.differences.append((CONFIG, "model_type", str(theirs.model_type), str(config.model_type)))
        return
    fields = _differing(theirs.to_dict(), config.to_dict())
    if fields and _changes_model(transformers, config, task, {name: theirs.to_dict().get(name) for name in fields}):
        folder.differences += [(CONFIG, name, *values) for name, values in fields.items()]


def _changes_model(transformers: Any, config: Any, task: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a config with some other settings makes a model of another structure, or none at all."""
    if any(HUGE.search(str(value)) for name, value in settings.items() if "layer" in name or "depth" in name):
        return True  # a model with that many layers takes long to create
    try:
        with torch.device("meta"):
            other = structure(model_of(transformers, type(config).from_dict({**config.to_dict(), **settings}), task))
            return other != structure(model_of(transformers, config, task))
    except Exception:
        return True


def _compare_image_processors(transformers: Any, spec: ModelSpec, copy: str, file: str, folder: _Folder) -> None:
    """Add the settings of an image processor, in `file`, that differ if the pixels of two images differ, too."""
    from PIL import Image

    ours, theirs = load_image_processor(transformers, spec.name), _loaded(load_image_processor, transformers, copy)
    if theirs is None:
        folder.unread.append(file)
    if ours is None or theirs is None:
        return
    fields = _differing(theirs.to_dict(), ours.to_dict())
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES if fields]
    if any(HUGE.search(value) for value, _ in fields.values()) or not all(_same(pixels, theirs, ours, i) for i in images):
        folder.differences += [(file, name, *values) for name, values in fields.items()]


def _compare_tokenizers(transformers: Any, spec: ModelSpec, length: int, copy: str, file: str, folder: _Folder) -> None:
    """Add the settings of a tokenizer, in `file` and others, that differ if its tokens of some texts differ, too.

    So are its vocabulary and its merges, from which other texts get other tokens.
    """
    ours, theirs = load_tokenizer(transformers, spec.name), _loaded(load_tokenizer, transformers, copy)
    if theirs is None:
        folder.unread.append(file)
    if ours is None or theirs is None:
        return
    longest = theirs.model_max_length
    if type(longest) is int and longest > 0 and longest != ours.model_max_length:
        folder.longest = longest
    if theirs.pad_token is None and ours.pad_token in theirs.get_vocab():
        theirs.pad_token = ours.pad_token
    words = [tokenizer.get_vocab() for tokenizer in (theirs, ours)]
    odd = next((word for word in sorted({*words[0], *words[1]}) if words[0].get(word) != words[1].get(word)), None)
    if odd is not None:
        one, other = (f"{shown(odd)} as token {found[odd]}" if odd in found else f"no {shown(odd)}" for found in words)
        folder.differences.append((file, "in its vocabulary", one, other))
    text = next((text for text in TEXTS if not _same(_tokens, theirs, ours, length, text)), None)
    merges = next(((a, b) for a, b in zip_longest(_merges(theirs), _merges(ours)) if a != b), None)
    if merges is not None:
        folder.differences.append((file, "the merge", shown(merges[0]), shown(merges[1])))
    if odd is None and text is None and merges is None:
        return
    settings = [{**k.init_kwargs, **k.special_tokens_map, "padding_side": k.padding_side} for k in (theirs, ours)]
    folder.differences += [(file, name, *values) for name, values in _differing(*settings).items()]
    if not folder.differences:
        folder.differences.append((file, "other tokens", f"for the text {shown(text)}", "its own"))


def _tokens(tokenizer: Any, length: int, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"])


def _length(transformers: Any, spec: ModelSpec, config: Any, task: str) -> int:
    """Return the most tokens of an example. Raises RecipeError."""
    with no_weight_warnings(), torch.device("meta"):
        model = model_of(transformers, config, task)
    most = DEFAULT_LENGTH if task == AUTO["causal_lm"] else UNLIMITED
    return length_of(spec, model, most)


def _loaded(load: Callable[[Any, Any], Any], transformers: Any, name: Any) -> Any:
    """Load something from an ingredient's folder; None if that fails: on a damaged file, the library can raise anything."""
    try:
        return load(transformers, name)
    except BaseException as error:
        _check_passing(error)
        return None


def _check_passing(error: BaseException) -> None:
    """Raise what has nothing to do with a file again; a panic of Rust is no Exception either."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
        raise error


def _merges(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [] if backend is None else json.loads(backend.to_str())["model"].get("merges") or []


def _same(preprocess: Callable[..., torch.Tensor], theirs: Any, ours: Any, *example: Any) -> bool:
    """Return whether two processors give the same result; what the recipe's own cannot process is no difference."""
    try:
        expected = preprocess(ours, *example)
    except Exception:
        return True
    try:
        return torch.equal(preprocess(theirs, *example), expected)
    except BaseException as error:
        _check_passing(error)
        return False


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the settings that differ, as texts; a missing one is None."""
    found = {}
    for name in sorted({*theirs, *ours}):
        one, other = (_plain(values.get(name)) for values in (theirs, ours))
        if one != other and not UNIMPORTANT.match(name):
            found[name] = (shown(one), shown(other))
    return found


def _plain(value: Any) -> Any:
    """Return a setting as plain values that can be compared, with floats of 9 digits."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def _refuse_differences(spec: ModelSpec, folders: Sequence[_Folder]) -> None:
    """Raise RecipeError if a folder differs from that of the recipe."""
    first = next((folder for folder in folders if folder.differences), None)
    if first is None:
        return
    file, name, theirs, ours = first.differences[0]
    more = "".join(f", and {n} {t} ({spec.name}: {o})" for _, n, t, o in first.differences[1:4])
    path = storage.join(first.path, file)
    said = f"{path} has {name} {theirs}; {spec.name}, which the recipe's model uses, has {ours}{more}."
    other = next((folder for folder in folders if folder.differences != first.differences), None)
    if other is not None:
        differ = "differ in other settings" if other.differences else "do not differ"
        cure = (
            f"Other ingredients {differ}, such as those in {other.path}. One model and one preprocessing must be used for "
            "all: leave out the ingredients that were trained otherwise, or correct that file if it is wrong."
        )
    elif CONFIG in first.files and (not storage.is_remote(first.path) or is_hub(first.path)):
        line = replace(spec, name=first.path).with_options({})
        cure = f"If the ingredients were trained so, set\n    model: {line}\nOtherwise, correct or remove that file."
    else:
        cure = f"If the ingredients were trained so, copy that file to {spec.name}; otherwise, correct or remove it."
    raise RecipeError(f"{said} {cure}")


def _refuse_labels(spec: ModelSpec, config: Any, folders: Sequence[_Folder]) -> None:
    """Raise RecipeError if the same classes have other numbers in another folder."""
    named = [folder for folder in (_Folder(spec.name, labels=_labels(config)), *folders) if folder.labels]
    for folder in named[1:]:
        first = next(f for f in named if sorted(f.labels) == sorted(folder.labels))
        if first.labels != folder.labels:
            one, other = (storage.join(f.path, CONFIG) for f in (folder, first))
            raise RecipeError(
                f"{one} numbers the classes {', '.join(folder.labels[:8])}; {other} numbers them "
                f"{', '.join(first.labels[:8])}. A soup needs one numbering: leave out the ingredients with the other, or "
                "correct id2label if it is wrong."
            )


def _labels(config: Any) -> list[str]:
    """Return the names of a config's classes; an empty list if they only have numbers."""
    named = config.id2label if isinstance(config.id2label, dict) else {}
    names = [str(name) for _, name in sorted(named.items())]
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _check_lengths(spec: ModelSpec, folders: Sequence[_Folder], length: int) -> tuple[list[str], dict[str, str]]:
    """Compare the lengths at which tokenizers cut texts. Returns notes, and the option `length` if the recipe has none.

    Raises RecipeError if it has none, and the tokenizers of two folders cut at different lengths.
    """
    shorter = [folder for folder in folders if folder.longest < length]
    if not shorter:
        return [], {}
    folder = shorter[0]
    said = f"The tokenizer in {folder.path} cuts texts at {folder.longest} tokens (model_max_length)"
    if "length" in spec.options:
        return [f"{said}; the recipe states {length}, which is used."], {}
    option = {"length": str(folder.longest)}
    tokenizing = [one for one in folders if not one.files.keys().isdisjoint(TEXT_FILES)]
    other = next((one for one in tokenizing if min(one.longest, length) != folder.longest), None)
    if other is not None:
        raise RecipeError(
            f"{said}, and that in {other.path} at {min(other.longest, length)}; one length must be used for all. Choose it "
            f"with the option `length`, as in\n    model: {spec.with_options(option)}"
        )
    return [f"{said}, which is used, because the recipe states no length."], option
