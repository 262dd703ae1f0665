"""A first recipe for a folder of checkpoints: what was found, what was assumed, and what is left to fill in."""

from __future__ import annotations

import glob
import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.checkpoint_files import is_checkpoint
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.recipe import RESERVED_NAMES, Recipe, as_recipe, is_function
from ray_soup.recipe.yaml_reader import resolve
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.hub import SPLITS
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocessing import examine
from ray_soup.task.recognize import Recognized, recognize

MODEL, DATA = "my_package.my_module:build", "heldout.parquet"
"""What stands in a recipe for a model, or data, that was not found."""
LINE = re.compile(r"\n    model: (\S.*)")
"""The line to write into the recipe, in an error about evidence that the model's options do not state."""
CORRECTIONS = 4
HELD_OUT = ("heldout", "held_out", "holdout")
"""Further words for held-out data in the names of files."""


@dataclass
class FirstRecipe:
    """The text of a recipe, and what the user should know about it."""

    text: str = ""
    gaps: list[str] = field(default_factory=list)
    """The lines that could not be filled, each as key, what is wrong and what to do."""
    notes: list[str] = field(default_factory=list)
    """What was chosen or assumed."""


def first_recipe(
    ingredients: Sequence[str], data: str | None, test: str | None, out: str, model: str | None = None
) -> FirstRecipe:
    """Return a recipe for checkpoints.

    Args:
        ingredients: paths, globs or URIs, relative to the current folder; the recipe has them relative to its own.
        data: held-out data, or a folder with a file or folder for each split; None if there is none.
        test: data for reporting only; None if there is none, or `data` has it.
        out: the path of the recipe.
        model: the recipe key `model`, if the user names it.

    Raises RecipeError if there are no ingredients or no data at these paths, IngredientError if one is broken.
    """
    result = FirstRecipe()
    spec = _joined(ingredients)
    found = open_ingredients(spec, RESERVED_NAMES, result.notes)
    sources = _sources(data, test)
    known = Recognized(model, "Named on the command line.") if model else recognize(found)
    values: dict[str, Any] = {"ingredients": spec, "model": known.model or MODEL, "data": sources}
    if known.missing:
        result.gaps.append(f"model: {known.why} {known.missing}" if not known.model else f"model: {known.missing}")
    if "fit" not in sources:
        result.gaps.append("data.fit: no held-out data was named. Name a file or folder that no checkpoint was trained on.")
    if known.model:
        _complete(values, found, result, checked=not known.missing and "fit" in sources)
    result.text = _text(values, known.why, found, result, out, _command(ingredients, data, test, out))
    return result


def _joined(ingredients: Sequence[str]) -> Any:
    """Return the ingredients as a recipe names them: all files of one kind in a folder, as a shell lists them, as a glob."""
    folders, ends = {os.path.dirname(p) for p in ingredients}, {os.path.splitext(p)[1] for p in ingredients}
    if len(ingredients) > 1 and len(folders) == len(ends) == 1 and all(map(is_checkpoint, ingredients)):
        pattern = os.path.join(*map(glob.escape, folders), f"*{next(iter(ends))}")
        if not storage.is_remote(pattern) and sorted(glob.glob(pattern)) == sorted(ingredients):
            return pattern
    return ingredients[0] if len(ingredients) == 1 else [*ingredients]


def _sources(data: str | None, test: str | None) -> dict[str, str]:
    """Return the sources of the recipe's section `data` by their keys. Raises RecipeError if a path does not exist."""
    found: dict[str, str] = {}
    for option, path in (("--data", data), ("--test", test)):
        if path and not (storage.is_remote(path) or is_function(path) or glob.has_magic(path) or os.path.exists(path)):
            raise RecipeError(f"{option}: {path} does not exist; expected a file or folder of data. Check the path.")
    if data and os.path.isdir(data):
        for name in sorted(os.listdir(data)):
            words = re.split(r"[-._ ]+", name.lower())
            split = next((SPLITS[word] for word in words if word in SPLITS), "")
            held_out = any(word in name.lower() for word in HELD_OUT)
            kind = "fit" if held_out else {"train": "train", "validation": "fit", "test": "test"}.get(split, "")
            if kind and not name.startswith("."):
                found.setdefault(kind, os.path.join(data, name))
    if data and "fit" not in found:
        found = {"fit": data}
    if test:
        found["test"] = test
    return found


def _complete(values: dict[str, Any], found: Sequence[Ingredient], result: FirstRecipe, checked: bool) -> None:
    """Add the options that the files state to the model, and check the recipe as a run does; a fault becomes a gap."""
    try:
        for _ in range(CORRECTIONS):
            try:
                examined = examine(_recipe(values), found)
                if not examined.adopted:
                    break
                values["model"] = ModelSpec.parse(values["model"]).with_options(examined.adopted)
            except RecipeError as error:
                line = LINE.search(str(error))
                if line is None or line[1] == values["model"]:
                    raise
                values["model"] = line[1]
        result.notes += open_inputs(_recipe(values)).notes if checked else examined.notes
        result.notes[:] = dict.fromkeys(result.notes)
    except SoupError as error:
        result.gaps.append(f"model: {error}")


def _recipe(values: dict[str, Any]) -> Recipe:
    return as_recipe({**values, "data": {"fit": DATA, **values["data"]}})


# The text


def _text(values: dict[str, Any], why: str, found: Sequence[Ingredient], result: FirstRecipe, out: str, command: str) -> str:
    """Return the recipe as YAML with comments."""
    here = os.path.dirname(os.path.abspath(out))
    sources = values["data"]
    missing = {gap.partition(":")[0]: gap.partition(": ")[2] for gap in result.gaps}
    spec = values["ingredients"]
    names = [spec] if isinstance(spec, str) else spec
    lines = [
        *_comment(f"Written by: {command}"),
        *_comment(f"`ray-soup keys` lists every key; `ray-soup doctor {os.path.basename(out)}` checks what is installed."),
        "",
        *_comment(f"{len(found)} checkpoints, such as {found[0].path}. {_first(result.notes, found[0])}".strip()),
    ]
    paths = [_quoted(_relative(name, here)) for name in names]
    lines += [f"ingredients: {paths[0]}"] if len(paths) == 1 else ["ingredients:", *(f"  - {path}" for path in paths)]
    known = values["model"] != MODEL
    lines += ["", *(_comment(why) if known else [])]
    if "model" in missing:
        lines += _comment(f"{'TO DO' if known else 'FILL IN'}: {missing['model']}")
    lines += [f"model: {_quoted(_model(values['model'], here))}"]
    rest = [note for note in result.notes if note != _first(result.notes, found[0])]
    lines += [line for note in rest for line in _comment(note)]
    lines += ["", "data:"]
    if "data.fit" in missing:
        lines += [f"  {line}" for line in _comment(f"FILL IN: {missing['data.fit']}")]
    rows = [("train", "only for `ray-soup finetune`"), ("fit", "held out from training: the coefficients are learned on it")]
    given = {"fit": DATA, **sources}
    lines += [f"  {key}: {_quoted(_relative(given[key], here))}  # {said}" for key, said in rows if key in given]
    lines += ["  select: 0.2  # the share of fit that is set aside to choose the stopping point; or a file"]
    if "test" in sources:
        lines += [f"  test: {_quoted(_relative(sources['test'], here))}  # only reported"]
    else:
        lines += ["  # test: test.parquet  # only reported: without it, no figure is free of choices"]
    lines += ["", "method: mehl+  # or mehl, learned, learned+, greedy, uniform, best_single"]
    return "\n".join([*lines, ""])


def _first(notes: Sequence[str], ingredient: Ingredient) -> str:
    """Return the note about how checkpoints were chosen, if there is one."""
    return next((note for note in notes if "To choose otherwise" in note), "")


def _comment(text: str) -> list[str]:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 110, break_long_words=False)]
    return [f"# {line}" for line in lines]


def _relative(path: str, here: str) -> str:
    """Return a path relative to the folder of the recipe if it is below that, otherwise the whole path."""
    if storage.is_remote(path) or is_function(path):
        return path
    whole = os.path.abspath(os.path.expanduser(path))
    with suppress(ValueError):
        if os.path.commonpath([whole, here]) == here and whole != here:
            return os.path.relpath(whole, here)
    return whole


def _model(spec: str, here: str) -> str:
    """Return the recipe key `model`; the folder of a model of transformers is relative to that of the recipe."""
    library, _, rest = spec.partition(":")
    folder, mark, options = rest.partition("?")
    is_folder = library == "transformers" and os.path.isdir(folder)
    return f"{library}:{_relative(folder, here)}{mark}{options}" if is_folder else spec


def _quoted(text: str) -> str:
    """Return a text as YAML on one line."""
    plain = resolve(text) is text and re.fullmatch(r"[\w./][\w./:+?=&,* -]*", text) and ": " not in text
    if plain and not text.endswith((" ", ":")):
        return text
    quoted: str = yaml.safe_dump(text, default_style="'", width=10_000)
    return quoted.strip()


def _command(ingredients: Sequence[str], data: str | None, test: str | None, out: str) -> str:
    shown = [*ingredients[:3], *(["..."] if len(ingredients) > 3 else [])]
    more = [part for name, value in (("--data", data), ("--test", test)) if value for part in (name, value)]
    return shlex.join(["ray-soup", "init", *shown, *more, "--out", str(Path(out))])
