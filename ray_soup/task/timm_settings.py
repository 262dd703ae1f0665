"""The settings of timm: what a recipe's model uses, and what the files of timm and of similar scripts say."""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.recipe.plain import shown
from ray_soup.task.constructor_options import RESERVED
from ray_soup.task.libraries import (
    CROP_MODES,
    INTERPOLATIONS,
    structure,
    timm_config,
    timm_defaults,
    timm_outline,
    timm_pretrained_cfg,
)
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.values import (
    STATABLE,
    Found,
    Reader,
    Settings,
    channels_and_size,
    count,
    floats,
    mapping,
    numbers,
    one_of,
    pair,
    read_values,
    size_text,
    word,
)

HARMLESS = (
    "drop", "attn_drop", "proj_drop", "patch_drop", "pos_drop", "norm_drop", "pretrained", "checkpoint", "script", "export",
    "no_jit", "cache", "dynamic_img", "strict_img", "weight_init", "head_init", "fix_init", "zero_init", "bn_momentum",
    "device", "dtype",
)  # fmt: skip
"""Beginnings of arguments of models that do not change what a model computes when it is evaluated."""
TIMM_SCRIPT = {"interpolation", "train_interpolation", "reprob"}
"""Arguments that tell timm's train.py from scripts with some of its arguments; those that are None are missing."""


def used_by_timm(spec: ModelSpec) -> Settings:
    """Return the settings that a recipe's model uses if it has no options."""
    settings = _of_timm_config(timm_config(spec, None))
    return {"in_chans": "3", "global_pool": timm_defaults(spec.name)[1], **settings}


def _of_timm_config(config: Mapping[str, Any]) -> Settings:
    return {
        "img_size": size_text(config["input_size"][-2:]),
        "mean": numbers(config["mean"]),
        "std": numbers(config["std"]),
        "crop_pct": numbers([config["crop_pct"]]),
        "crop_mode": str(config["crop_mode"]),
        "interpolation": str(config["interpolation"]),
    }


def read_timm(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the config.json that timm writes for the Hub, the arguments of timm's train.py, or some of them in others."""
    timm = spec.import_library()
    found = Found()
    name = values["model"] if isinstance(values.get("model"), str) else spec.name
    name = name.rpartition("/")[2]  # of hf-hub:timm/NAME
    base = timm_pretrained_cfg(ModelSpec("", "timm", name, {})) if is_known_to_timm(name) else {}
    is_script = values.keys() >= TIMM_SCRIPT
    in_hub = isinstance(values.get("pretrained_cfg"), Mapping) and "architecture" in values
    own: Mapping[str, Any]
    if in_hub:
        name, base = str(values["architecture"]), {}
        given = _timm_arguments(values["pretrained_cfg"], found)
        own = {"global_pool": values.get("global_pool"), **mapping(values.get("model_args"))}
    elif is_script:
        given = _timm_arguments(values, found)
        own = {"global_pool": values.get("gp"), **_norm_eps_in(spec, values), **mapping(values.get("model_kwargs"))}
        found.settings["in_chans"] = "3"
        if name.partition(".")[0] == spec.name.partition(".")[0]:
            found.settings["global_pool"] = timm_defaults(name.partition(".")[0])[1]
        if not is_known_to_timm(name) and is_known_to_timm(name.partition(".")[0]):
            found.unknown = name
    else:
        given, own = some_timm_arguments(values, found), mapping(values.get("model_kwargs"))
    channels, *size = given.get("input_size", (0,))
    if channels:
        given["in_chans"] = channels
    sizes = [size, given.get("img_size"), read_values(own, {"img_size": ("img_size", pair)}, found).get("img_size")]
    size = next(filter(None, reversed(sizes) if in_hub else sizes), [])  # an old timm left the size in its configuration
    if size:
        given |= {"img_size": size, "input_size": (given.get("in_chans", 3), *size)}
    for key in {"mean", "std"} & given.keys():
        if len(given[key]) not in (1, given.get("in_chans", 3)):
            found.unread[key] = f"{key} {shown(mapping(values.get('pretrained_cfg', values)).get(key))}"
            del given[key]
    settings = _of_timm_config(timm.data.resolve_data_config(given, pretrained_cfg=base or {"tag": ""}))
    if not in_hub and not (is_script and is_known_to_timm(name)):  # the defaults are not known
        settings = {option: settings[option] for option in settings if option in given}
    if "in_chans" in given:
        settings["in_chans"] = str(given["in_chans"])
    found.settings |= {option: value for option, value in settings.items() if option not in found.unread}
    found.whole = in_hub or is_script
    _add_model_arguments(found, own, name if timm.is_model(name.partition(".")[0]) else spec.name, spec.name)
    return found


def some_timm_arguments(values: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """Read the arguments in a mapping that is not timm's: a mean of one number is the mean of scores there."""
    scores = {key for key in ("mean", "std") if isinstance(values.get(key), (int, float))}
    given = _timm_arguments({key: value for key, value in values.items() if key not in scores}, found)
    for key in {"mean", "std"} & given.keys():
        if max(given[key]) > 1:  # of bytes
            given[key] = [value / 255 for value in given[key]]
    if given.keys() - {"interpolation"}:
        return given
    found.unread.pop("interpolation", None)  # of something else than images
    return {}


@functools.lru_cache(1024)
def is_known_to_timm(name: str) -> bool:
    """Return whether timm has a model of this name, and pretrained weights of its tag if it names one."""
    try:
        timm_pretrained_cfg(ModelSpec("", "timm", name, {}))
    except RecipeError:
        return False
    return True


def _timm_arguments(values: Mapping[str, Any], found: Found) -> dict[str, Any]:
    readers: dict[str, Reader] = {
        "in_chans": ("in_chans", count),
        "interpolation": ("interpolation", one_of(INTERPOLATIONS)),
        "input_size": ("img_size", channels_and_size),
        "img_size": ("img_size", pair),
        "mean": ("mean", floats),
        "std": ("std", floats),
        "crop_pct": ("crop_pct", lambda value: floats([value])[0]),
        "crop_mode": ("crop_mode", one_of(CROP_MODES)),
    }
    return read_values(values, readers, found)


def _add_model_arguments(found: Found, own: Mapping[str, Any], name: str, ours: str) -> None:
    """Add the arguments `own` that timm's model `name` was created with; `ours` is the name of the recipe's model.

    Plain values are options of the recipe's model. If timm did not write the arguments (`found.whole`), some may be another
    program's: those that timm does not take.
    """
    readers: dict[str, Reader] = {"in_chans": ("in_chans", count), "global_pool": ("global_pool", word)}
    found.settings |= {key: str(value) for key, value in read_values(own, readers, found).items()}
    for key, value in own.items():
        if value is None or key in (*readers, "img_size", "num_classes") or key.startswith(HARMLESS):
            continue
        changes = _changes(name, key, repr(value))
        text = str(value).lower() if isinstance(value, bool) else str(value)
        alike = name.partition(".")[0] == ours.partition(".")[0] and RESERVED.fullmatch(key) is None
        if changes and alike and isinstance(value, (bool, int, float, str)) and STATABLE.fullmatch(text):
            found.settings[key] = text
        elif changes or (changes is None and found.whole):
            found.unstatable[key] = str(value)


@functools.lru_cache(1024)
def _changes(name: str, argument: str, value: str) -> bool | None:
    """Return whether an argument, printed as Python, changes timm's model of this name; None if timm does not take it."""
    if re.search(r"(?<![.\d])\d{5}", value):  # a model with that many layers takes long to create
        return None
    try:
        return structure(timm_outline(name, **{argument: ast.literal_eval(value)})) != _structure(name)
    except Exception:
        return None


@functools.lru_cache(16)
def _structure(name: str) -> dict[str, Any]:
    return structure(timm_outline(name))


def _norm_eps_in(spec: ModelSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument `bn_eps` if it is not what the batch normalizations of the recipe's model have anyway."""
    value = values.get("bn_eps")
    other = isinstance(value, (int, float)) and not all(math.isclose(value, own) for own in _norm_eps(spec.name))
    return {"bn_eps": value} if other else {}


@functools.lru_cache(16)
def _norm_eps(name: str) -> tuple[float, ...]:
    """Return the eps of the batch normalizations of timm's model."""
    norms = (m for m in timm_outline(name).modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    return tuple({norm.eps for norm in norms})
