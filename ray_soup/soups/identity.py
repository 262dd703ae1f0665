"""What an output folder was started with, compared with what a command asks for now."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.redact import redact_uris
from ray_soup.recipe import DEFAULT_METHOD, METHODS, Learn, Recipe, dump_recipe, make_recipe, method_info
from ray_soup.recipe.explain import takes_text_only
from ray_soup.recipe.yaml_reader import parse_yaml
from ray_soup.soups.records import BegunRecord, damaged
from ray_soup.task.functions import MOVED
from ray_soup.task.model_spec import ModelSpec


class OtherRunError(RecipeError):
    """A folder was begun by another command, or with another recipe, ingredients or options."""


def begun(recipe: Recipe, ingredients: Sequence[Ingredient], **options: Any) -> BegunRecord:
    """Return the record of a started folder: the recipe, identities of the ingredients, and options of the command."""
    record: BegunRecord = {
        "recipe": redact_uris(dump_recipe(recipe)), "ingredients": [i.identity for i in ingredients], "folder": os.getcwd(),
    }  # fmt: skip
    return {**record, **options}  # type: ignore[typeddict-item]


def begun_zoo(recipe: Recipe, adopted: Mapping[str, str] = {}) -> BegunRecord:
    """Return the record of a started folder of fine-tuned checkpoints: the parts of the recipe that `finetune` uses.

    With options of the model that are `adopted` from the files of the weights that it starts from.
    """
    values = yaml.safe_load(redact_uris(dump_recipe(recipe)))
    keys = ("model", "preprocess", "data", "finetune", "precision", "ignore", "actors")  # all data: they number the classes
    used = {key: values[key] for key in keys if key in values}
    text = yaml.safe_dump(used, sort_keys=False)
    record: BegunRecord = {"recipe": text, "ingredients": [], "kind": "finetune", "folder": os.getcwd()}
    return {**record, "adopted": dict(adopted)} if adopted else record


def check_same(out: Path, before: BegunRecord, now: BegunRecord) -> None:
    """Check that the folder was started with the same command, recipe, ingredients and `start`.

    A recipe that states what the other one adopts is the same: OUT/recipe.yaml is the recipe of OUT. Raises OtherRunError,
    or RecipeError if begun.json is damaged.
    """
    if before.get("adopted") != now.get("adopted") and _model_of(before) == _model_of(now):
        before, now = _with_adopted(before), _with_adopted(now)
    difference = _difference(out, before["recipe"], now)
    if difference:
        raise _other_run(f"{out} belongs to another recipe: {difference}", "Choose a new folder, use the old recipe")
    if before["ingredients"] != now["ingredients"]:
        old, new = (
            {file[0]: file for one in d["ingredients"] for file in one if isinstance(file, list) and file}
            for d in (before, now)
        )
        which = [path for path in {**old, **new} if old.get(path) != new.get(path)]
        raise _other_run(
            f"{out} was started with ingredients that have changed since: {', '.join(map(str, which[:3]))}",
            "Choose a new folder that is not inside the ingredients' folder",
        )
    begun_by, command = command_of(before), command_of(now)
    if begun_by != command:
        raise _other_run(f"{out} was begun by `ray-soup {begun_by}`, and this command is `{command}`")
    if before.get("rows") != now.get("rows"):
        raise _other_run(
            f"{out} was started with files under compare.rows that have changed since", "Choose a new folder, restore them"
        )
    if "source" in before and before["source"] != now.get("source"):
        raise _other_run(f"{out} was begun by `ray-soup bake {before['source']}`")
    was, states = before.get("adopted", {}), now.get("adopted", {})
    changed = [option for option in {**was, **states} if was.get(option) != states.get(option)]
    if changed:
        options = "; ".join(f"{o} was {was.get(o, 'not stated')} and is now {states.get(o, 'not stated')}" for o in changed)
        raise _other_run(
            f"{out} was started with what files of the ingredients state, which has changed: {options}",
            "Choose a new folder, restore the files",
        )
    if before.get("start") != now.get("start"):
        raise _other_run(
            f"{out} was started with start {before.get('start')}, but this command has {now.get('start')}",
            "Choose a new folder, restore the old soup",
        )


def _model_of(record: BegunRecord) -> str:
    """Return the model of a record's recipe, with the options that were adopted, in alphabetical order.

    The whole recipe if it is damaged, which whoever compares it reports.
    """
    with suppress(yaml.YAMLError, AttributeError, TypeError, KeyError, RecursionError):  # of a damaged recipe
        spec = ModelSpec.parse(yaml.safe_load(record["recipe"])["model"])
        options = sorted({**spec.options, **record.get("adopted", {})}.items())
        return replace(spec, options={}).with_options(dict(options))
    return record["recipe"]


def _with_adopted(record: BegunRecord) -> BegunRecord:
    """Return a record whose recipe states the options that were adopted."""
    values = {**yaml.safe_load(record["recipe"]), "model": _model_of(record)}
    return {**record, "recipe": yaml.safe_dump(values, sort_keys=False), "adopted": {}}


def _other_run(what: str, remedy: str = "Choose a new folder") -> OtherRunError:
    """Return the error for a folder of another run: what differs, and what to do instead of replacing it."""
    return OtherRunError(f"{what}. {remedy}, or add --overwrite to replace what is there.")


def command_of(begun: BegunRecord) -> str:
    """Return the command that begins a folder with this record; `learn` stands for all that make one soup."""
    return begun.get("kind") or ("compare" if "compare" in begun else "learn")


def check_extends(out: Path, done: Sequence[Any], now: Sequence[Any]) -> None:
    """Check that options of `compare` include those of the finished comparison in a folder. Raises RecipeError."""
    seeds, dropped, counted, *flags = done
    lacks = now[0] < seeds or set(dropped) - set(now[1]) or set(counted) - set(now[2]) or (set(now[3:]) - set(flags))
    if lacks:
        raise RecipeError(
            f"{out} has the finished comparison with {_options(done)}; this command has {_options(now)}, and would replace "
            "it by a smaller one. Repeat the old options, choose a new folder, or add --overwrite to start over."
        )


def _options(compared: Sequence[Any]) -> str:
    """Return options of `compare` in the form of the command line, from what begun.json says."""
    seeds, dropped, counted, *flags = compared
    lists = (
        f"{name} {','.join(map(str, values))}"
        for name, values in (("--drop-top", dropped), ("--by-count", counted))
        if values
    )
    return " ".join([f"--seeds {seeds}", *lists, *(f"--{flag}" for flag in flags)])


_CHANGED = {
    "blocks": ("tensor", "auto"), "learn.lr": (0.01, "auto"), "learn.cosine_lr": (True, False),
    "learn.average": (False, True), "learn.whiten": (0.0, 0.5), "learn.screen": (False, True),
}  # fmt: skip
"""What version 0.1 did by default, and what this one does, where that has changed."""


def _completed(values: dict[str, Any]) -> dict[str, Any]:
    """Add what version 0.1 did where it had no key to a recipe that it may have written. Raises RecipeError."""
    learn = values.get("learn")
    if method_info(values.get("method", DEFAULT_METHOD)).kind != "hyperplane" or not isinstance(learn, dict):
        return values
    before = {key.removeprefix("learn."): then for key, (then, _) in _CHANGED.items() if key.startswith("learn.")}
    return {**values, "learn": {**before, **learn}}


def _unused(values: Mapping[str, Any], now: BegunRecord) -> tuple[str, ...]:
    """Return the keys of a recipe, or their sections, that have no influence on what a command makes of it.

    `actors` is among them: it says where the work is done; so is `loggers`, which says where it is shown.
    """
    kind = now.get("kind")
    if kind == "finetune":
        return ("actors", "loggers")
    found: tuple[str, ...] = ("actors", "loggers", "finetune")
    found += () if kind == "search" else ("search",)
    if "compare" in now:
        return found
    found += ("compare",)
    method, data = METHODS.get(values.get("method", DEFAULT_METHOD)), values.get("data") or {}
    if method is None:
        return found
    found += () if method.name == "greedy" else ("greedy",)
    found += () if method.kind == "schedule" else ("schedule",)
    if method.kind in ("selection", "schedule"):
        found += ("blocks", "directions")
        if not values.get("polish"):
            used = {"seed", "batch_size", "micro_batch"} if data.get("fit") is not None else set()
            found += ("precision", *(f"learn.{key}" for key in Learn.model_fields if key not in used))
    return found


def recipe_of(file: str, begun: BegunRecord) -> Recipe:
    """Return the recipe that a folder was begun with, as read from `file`. Raises RecipeError."""
    values = parse_yaml(begun["recipe"], f"The recipe in {file}", takes_text_only(Recipe))
    if not isinstance(values, dict):
        raise damaged(file, f"recipe: found {values!r:.40}; expected keys")
    return make_recipe(_completed(values), f"The recipe in {file}")


def _difference(out: Path, old: str, now: BegunRecord) -> str:
    """Describe what differs between two recipes in the keys that the command uses; empty if nothing does."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for key, value in values.items():
            lines.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return lines

    try:
        values = yaml.safe_load(old)
        if not isinstance(values, dict):
            raise TypeError(f"recipe: found {values!r:.40}; expected keys")
        values.update({"model": MOVED.get(values["model"], values["model"])} if "model" in values else {})
        wanted = yaml.safe_load(now["recipe"])
        a, b, unused = flat(values), flat(wanted), _unused(wanted, now)
        if now.get("kind") == "finetune":  # an earlier ray_soup did not record these
            unused += tuple(f"data.{key}" for key in ("select", "test") if key not in (values.get("data") or {}))
        with suppress(RecipeError):  # keys that are newer than the folder are what they were before
            whole = flat(yaml.safe_load(redact_uris(dump_recipe(make_recipe(_completed(values))))))
            a = {**{key: whole[key] for key in whole if key in b}, **a}
    except (yaml.YAMLError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(out / "state" / "begun.json", str(error)) from error
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    changed = [key for key in changed if not any(f"{key}.".startswith(f"{one}.") for one in unused)]
    if changed and all((a.get(key), b.get(key)) == _CHANGED.get(key) for key in changed):
        keys = " ".join(f"{key}={json.dumps(a[key])}" for key in changed).replace('"', "")
        return f"it has the defaults of version 0.1, which have changed. To resume it, append {keys} to the command"
    return "; ".join(f"{key} was {a.get(key)} and is now {b.get(key)}" for key in changed[:3])
