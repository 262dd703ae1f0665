"""What an output folder was started with, compared with what a command asks for now."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ray_soup.errors import RecipeError
from ray_soup.io.redact import redact_uris
from ray_soup.recipe import DEFAULT_METHOD, dump_recipe, make_recipe, method_info
from ray_soup.soups.records import BegunRecord, damaged
from ray_soup.task.functions import MOVED


def check_same(out: Path, before: BegunRecord, now: BegunRecord) -> None:
    """Check that the folder was started with the same recipe, ingredients and options. Raises RecipeError."""
    difference = _difference(out, before["recipe"], now["recipe"])
    if difference:
        raise RecipeError(f"{out} belongs to another recipe: {difference}. Choose a new folder, or use the old recipe.")
    if before["ingredients"] != now["ingredients"]:
        old, new = (
            {file[0]: file for one in d["ingredients"] for file in one if isinstance(file, list) and file}
            for d in (before, now)
        )
        which = [path for path in {**old, **new} if old.get(path) != new.get(path)]
        raise RecipeError(
            f"{out} was started with ingredients that have changed since: {', '.join(map(str, which[:3]))}. Choose a new "
            "folder that is not inside the ingredients' folder."
        )
    old_options, new_options = dict(before), dict(now)
    for key in [*old_options, *new_options]:
        if key not in ("recipe", "version") and old_options.get(key) != new_options.get(key):
            raise RecipeError(
                f"{out} was started with {key} {old_options.get(key)}, but this command has {new_options.get(key)}. Choose "
                "a new folder, or use the old options."
            )


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


def _difference(out: Path, old: str, new: str) -> str:
    """Describe what differs between two recipes, apart from `actors`, which may change; empty if nothing does."""

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
        a, b = flat(values), flat(yaml.safe_load(new))
        with suppress(RecipeError):  # keys that are newer than the folder are what they were before
            whole = flat(yaml.safe_load(redact_uris(dump_recipe(make_recipe(_completed(values))))))
            a = {**{key: whole[key] for key in whole if key in b}, **a}
    except (yaml.YAMLError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(out / "state" / "begun.json", str(error)) from error
    changed = [key for key in {**a, **b} if a.get(key) != b.get(key) and not key.startswith("actors.")]
    if changed and all((a.get(key), b.get(key)) == _CHANGED.get(key) for key in changed):
        keys = " ".join(f"{key}={json.dumps(a[key])}" for key in changed).replace('"', "")
        return f"it has the defaults of version 0.1, which have changed. To resume it, append {keys} to the command"
    return "; ".join(f"{key} was {a.get(key)} and is now {b.get(key)}" for key in changed[:3])
