"""The mappings in and beside checkpoints that may say how they were trained."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import yaml

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.ingredient import Ingredient

ARGUMENTS = ("args", "hyper_parameters", "datamodule_hyper_parameters", "hparams", "config", "params")
"""Keys that training scripts write their arguments under."""
OF_TRAINERS = ("args.yaml", "hparams.yaml")
"""Files in which timm's train.py and Lightning write the arguments of a training."""
BESIDE = {
    "open_clip": ("open_clip_config.json", "params.txt", *OF_TRAINERS),
    "timm": ("config.json", *OF_TRAINERS),
    "torchvision": OF_TRAINERS,
}
"""Files that each library, and trainers, write next to a model, with the settings of its preprocessing."""
PREPROCESSING = "preprocessing.json"
OWN = ("run.json", PREPROCESSING)
"""Files in which this package records the preprocessing of a soup, and of the checkpoints that it fine-tuned."""
EVERY = ("open_clip_config.json", "params.txt", "config.json", "preprocessor_config.json", *OF_TRAINERS)
"""Those of all libraries, from which a user's function may take its model."""
RECORD = "preprocessing"
"""The key of the record in these files."""
ABOVE = ("params.txt", "hparams.yaml")
"""Files that may also be in the folder above `checkpoints`."""
LARGEST, MOST_VALUES = 1_000_000, 100_000
"""Size in bytes up to which such a file is read, and the number of values of a YAML file."""


def sources(
    ingredient: Ingredient, beside: Callable[[str], list[tuple[str, Mapping[str, Any]]]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the mappings in and beside a checkpoint that may say how it was trained, with their places."""
    return [*_arguments(ingredient.metadata), *beside(ingredient.files[0].rpartition("/")[0])]


def settings_in_files(ingredients: Sequence[Ingredient]) -> list[dict[str, Any]]:
    """Return the training arguments stored in each ingredient's file that differ between the ingredients.

    Only arguments that every ingredient has count: numbers, booleans, and texts that some ingredients share, so that names
    of runs and folders are left out.
    """
    found = []
    for ingredient in ingredients:
        arguments = _nested(ingredient.metadata) + _decoded(ingredient.metadata)
        found.append(dict(arguments[0][1]) if arguments else {})

    def is_setting(key: str) -> bool:
        values = [some.get(key) for some in found]
        is_text = any(isinstance(value, str) for value in values)
        distinct = len({str(value) for value in values})
        return all(isinstance(v, (bool, int, float, str)) for v in values) and 1 < distinct < len(values) + (not is_text)

    varied = [key for key in found[0] if is_setting(key)]
    return [{key: some[key] for key in varied} for some in found]


def _arguments(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the mappings in a checkpoint that may be a script's arguments, with their places."""
    found = [*_nested(metadata), *_decoded(metadata), ("its metadata", metadata)]
    return [(place, values) for place, values in found if values]


def _nested(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"its {key}", metadata[key]) for key in ARGUMENTS if isinstance(metadata.get(key), Mapping)]


def _decoded(metadata: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the JSON objects in the metadata of a safetensors file, which are texts."""
    decoded = []
    for key, value in metadata.items():
        if isinstance(value, str) and value[:1] == "{" and len(value) < LARGEST:
            decoded.append((f"its {key}", _parsed(value)))
    return decoded


def beside_in(names: Sequence[str], folder: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the settings in the files of a folder with checkpoints, with the files' names.

    The params.txt of open_clip's training script and the hparams.yaml of Lightning may also be in the folder above, if this
    one is called checkpoints. Raises RecipeError for a YAML file that cannot be read.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name in (*names, *OWN) if folder else ():
        above, _, last = folder.rpartition("/")
        for place in (folder, above) if name in ABOVE and above and last == "checkpoints" else (folder,):
            path = storage.join(place, name)
            try:
                if storage.isfile(path) and storage.stat(path).size <= LARGEST:
                    values = _parse(path, storage.read_bytes(path))
                    found.append((name, {k: v for k, v in values.items() if name not in OWN or k == RECORD}))
            except (OSError, ValueError):
                continue
    return found


def _parse(path: str, content: bytes) -> Mapping[str, Any]:
    """Parse a file by its name. Raises RecipeError for one of OF_TRAINERS that cannot be read, else ValueError."""
    if path.endswith(OF_TRAINERS):
        return _parsed_yaml(path, content)
    return _parsed(content.decode()) if path.endswith(".json") else _parsed_lines(content.decode())


def _parsed_yaml(path: str, content: bytes) -> Mapping[str, Any]:
    """Parse a YAML file; of other tags than YAML's own, nothing is made but lists of those of tuples."""
    try:
        value = yaml.load(content, _Arguments)
        if sum(1 for _ in islice(_walk(value), MOST_VALUES + 1)) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, with aliases written out")
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"{path} cannot be read as YAML ({reason:.200}); expected the arguments of the training. Repair it, or move it "
            "away."
        ) from error
    return value if isinstance(value, dict) else {}


def _walk(value: Any) -> Iterator[Any]:
    """Yield a value and all those in it, with aliases written out."""
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _walk(inner)


class _Arguments(yaml.SafeLoader):
    """Reads what Lightning writes: Python's tuples as lists, and other objects of Python as null."""

    def flatten_mapping(self, node: Any) -> None:
        """Leave `<<`, by which a small file can merge any number of mappings, unread: it is then refused."""


def _tuple(loader: _Arguments, node: Any) -> list[Any]:
    return loader.construct_sequence(node)


_Arguments.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)
_Arguments.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)  # 1e-3, which is text in YAML 1.1
_Arguments.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
_Arguments.add_multi_constructor("!", lambda loader, suffix, node: None)


def _parsed_lines(text: str) -> Mapping[str, Any]:
    """Parse lines of the form `name: value`, as open_clip prints its arguments."""
    values: dict[str, Any] = {}
    for name, colon, value in (line.partition(": ") for line in text.splitlines()):
        if colon:
            values[name] = value.strip()
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # words are not Python
                values[name] = ast.literal_eval(value.strip())
    return values


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
