"""The settings of image preprocessing in each library's own terms: those that a recipe uses, and those in files."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_soup.errors import RecipeError
from ray_soup.recipe.plain import shown
from ray_soup.task.libraries import (
    CROP_MODES,
    INTERPOLATIONS,
    timm_config,
    timm_defaults,
    timm_outline,
    timm_pretrained_cfg,
)
from ray_soup.task.model_spec import ModelSpec

Settings = dict[str, str]
"""Values as a recipe writes them, by the name of the option of the key `model`."""
HARMLESS = (
    "drop", "attn_drop", "proj_drop", "patch_drop", "pos_drop", "norm_drop", "pretrained", "checkpoint", "script", "export",
    "no_jit", "cache", "dynamic_img", "strict_img", "weight_init", "head_init", "fix_init", "zero_init", "bn_momentum",
    "device", "dtype",
)  # fmt: skip
"""Beginnings of arguments of models that do not change what a model computes when it is evaluated."""


@dataclass
class Found:
    """What a script's arguments or a library's configuration file say."""

    settings: Settings = field(default_factory=dict)
    """Values by the name of the option of the recipe key `model`."""
    unstatable: dict[str, str] = field(default_factory=dict)
    """Arguments that change what the model computes, and that no option states."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys with values that are not understood, as in `mean 'imagenet'`, by the option that they would be."""
    unknown: str = ""
    """The name of the trained model, if the library has the model but not its tag, which stands for preprocessing."""


def used_settings(spec: ModelSpec) -> Settings:
    """Return the settings that a recipe's model uses: its options, otherwise the defaults of the library."""
    stated = {name: value for name, value in spec.options.items() if name != "classes"}
    return {**USED[spec.library](spec), **stated}


def settings_of(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the settings in a script's arguments or a library's configuration file.

    Args:
        spec: the recipe key `model`; its library says how to read them.
        values: the arguments, perhaps of another program: each is read on its own.
    """
    return READERS[spec.library](spec, values)


Reader = tuple[str, Callable[[Any], Any]]
"""The option that an argument is, and the function that reads its value, or raises ValueError or TypeError."""


def _read(values: Mapping[str, Any], readers: Mapping[str, Reader], found: Found) -> dict[str, Any]:
    """Return the values that are given, by their keys; add the others to `found.unread`."""
    read = {}
    for key, (option, reader) in readers.items():
        value = values.get(key)
        if value is None or value in ("", []):
            continue
        try:
            read[key] = reader(value)
        except (ValueError, TypeError, OverflowError):
            found.unread[option] = f"{key} {shown(value)}"
    return read


# timm


TIMM_SCRIPT = {"interpolation", "train_interpolation", "reprob"}
"""Arguments that tell timm's train.py from scripts with some of its arguments; those that are None are missing."""


def _used_by_timm(spec: ModelSpec) -> Settings:
    settings = _of_timm_config(timm_config(spec, None))
    return {"in_chans": "3", "global_pool": timm_defaults(spec.name)[1], **settings}


def _of_timm_config(config: Mapping[str, Any]) -> Settings:
    return {
        "img_size": _size(config["input_size"][-2:]),
        "mean": _numbers(config["mean"]),
        "std": _numbers(config["std"]),
        "crop_pct": _numbers([config["crop_pct"]]),
        "crop_mode": str(config["crop_mode"]),
        "interpolation": str(config["interpolation"]),
    }


def _timm(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the config.json that timm writes for the Hub, the arguments of timm's train.py, or some of them in others."""
    timm = spec.import_library()
    found = Found()
    name = values["model"] if isinstance(values.get("model"), str) else spec.name
    name = name.rpartition("/")[2]  # of hf-hub:timm/NAME
    base = timm_pretrained_cfg(ModelSpec("", "timm", name, {})) if _is_known_to_timm(name) else {}
    is_script = values.keys() >= TIMM_SCRIPT
    in_hub = isinstance(values.get("pretrained_cfg"), Mapping) and "architecture" in values
    own: Mapping[str, Any]
    if in_hub:
        name, base = str(values["architecture"]), {}
        given = _timm_arguments(values["pretrained_cfg"], found)
        own = {"global_pool": values.get("global_pool"), **_mapping(values.get("model_args"))}
    elif "val_resize_size" in values:  # the arguments of torchvision's train.py
        return found
    elif is_script:
        given = _timm_arguments(values, found)
        own = {"global_pool": values.get("gp"), **_mapping(values.get("model_kwargs"))}
        _read_norm_eps(spec, values.get("bn_eps"), found)
        found.settings["in_chans"] = "3"
        if name.partition(".")[0] == spec.name.partition(".")[0]:
            found.settings["global_pool"] = timm_defaults(name.partition(".")[0])[1]
        if not _is_known_to_timm(name) and _is_known_to_timm(name.partition(".")[0]):
            found.unknown = name
    else:
        given, own = _some_timm_arguments(values, found), _mapping(values.get("model_kwargs"))
    channels, *size = given.get("input_size", (0,))
    if channels:
        given["in_chans"] = channels
    sizes = [size, given.get("img_size"), _read(own, {"img_size": ("img_size", _pair)}, found).get("img_size")]
    size = next(filter(None, reversed(sizes) if in_hub else sizes), [])  # an old timm left the size in its configuration
    if size:
        given |= {"img_size": size, "input_size": (given.get("in_chans", 3), *size)}
    for key in {"mean", "std"} & given.keys():
        if len(given[key]) not in (1, given.get("in_chans", 3)):
            found.unread[key] = f"{key} {shown(_mapping(values.get('pretrained_cfg', values)).get(key))}"
            del given[key]
    settings = _of_timm_config(timm.data.resolve_data_config(given, pretrained_cfg=base or {"tag": ""}))
    if not in_hub and not (is_script and _is_known_to_timm(name)):  # the defaults are not known
        settings = {option: settings[option] for option in settings if option in given}
    if "in_chans" in given:
        settings["in_chans"] = str(given["in_chans"])
    found.settings |= {option: value for option, value in settings.items() if option not in found.unread}
    _add_model_arguments(found, own, name if timm.is_model(name.partition(".")[0]) else spec.name, in_hub or is_script)
    return found


def _some_timm_arguments(values: Mapping[str, Any], found: Found) -> dict[str, Any]:
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
def _is_known_to_timm(name: str) -> bool:
    """Return whether timm has a model of this name, and pretrained weights of its tag if it names one."""
    try:
        timm_pretrained_cfg(ModelSpec("", "timm", name, {}))
    except RecipeError:
        return False
    return True


def _timm_arguments(values: Mapping[str, Any], found: Found) -> dict[str, Any]:
    readers: dict[str, Reader] = {
        "in_chans": ("in_chans", _count),
        "interpolation": ("interpolation", _one_of(INTERPOLATIONS)),
        "input_size": ("img_size", _channels_and_size),
        "img_size": ("img_size", _pair),
        "mean": ("mean", _floats),
        "std": ("std", _floats),
        "crop_pct": ("crop_pct", lambda value: _floats([value])[0]),
        "crop_mode": ("crop_mode", _one_of(CROP_MODES)),
    }
    return _read(values, readers, found)


def _add_model_arguments(found: Found, own: Mapping[str, Any], name: str, by_timm: bool) -> None:
    """Add the arguments `own` that timm's model `name` was created with.

    If timm itself did not write them, some may be another program's: those that timm does not take.
    """
    readers: dict[str, Reader] = {"in_chans": ("in_chans", _count), "global_pool": ("global_pool", _word)}
    found.settings |= {key: str(value) for key, value in _read(own, readers, found).items()}
    for key, value in own.items():
        if value is None or key in (*readers, "img_size", "num_classes") or key.startswith(HARMLESS):
            continue
        if _changes(name, key, value, by_timm):
            found.unstatable[key] = str(value)


def _changes(name: str, argument: str, value: Any, unknown: bool) -> bool:
    """Return whether an argument changes timm's model of this name; `unknown` if timm cannot create the model with it."""

    def parts(model: torch.nn.Module) -> dict[str, Any]:
        plain = (bool, int, float, str, tuple, type(None))
        return {
            path: (type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
            for path, module in model.named_modules()
        }

    if re.search(r"(?<![.\d])\d{5}", repr(value)):  # a model with that many layers takes long to create
        return unknown
    try:
        return parts(timm_outline(name, **{argument: value})) != parts(timm_outline(name))
    except Exception:
        return unknown


def _read_norm_eps(spec: ModelSpec, value: Any, found: Found) -> None:
    if isinstance(value, (int, float)) and not all(math.isclose(value, own) for own in _norm_eps(spec.name)):
        found.unstatable["bn_eps"] = str(value)


@functools.lru_cache(16)
def _norm_eps(name: str) -> tuple[float, ...]:
    """Return the eps of the batch normalizations of timm's model."""
    norms = (m for m in timm_outline(name).modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    return tuple({norm.eps for norm in norms})


# torchvision


def _used_by_torchvision(spec: ModelSpec) -> Settings:
    tv = spec.import_library().models
    preset = tv.get_model_weights(spec.name).DEFAULT.transforms()
    return {
        "resize_size": str(preset.resize_size[0]),
        "crop_size": str(preset.crop_size[0]),
        "mean": _numbers(preset.mean),
        "std": _numbers(preset.std),
        "interpolation": preset.interpolation.value,
    }


def _torchvision(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the arguments of torchvision's references/classification/train.py, whose mean and std are those of ImageNet."""
    found = Found()
    if "val_resize_size" in values:
        readers: dict[str, Reader] = {
            "val_resize_size": ("resize_size", _count),
            "val_crop_size": ("crop_size", _count),
            "interpolation": ("interpolation", _word),
        }
        found.settings = {readers[key][0]: str(value) for key, value in _read(values, readers, found).items()}
    return found


# open_clip


def _used_by_open_clip(spec: ModelSpec) -> Settings:
    import open_clip

    config = open_clip.get_model_config(spec.name) or {}
    vision = config.get("vision_cfg", {})
    return {
        "image_size": _size(_pair(vision.get("image_size", 224))),
        "mean": _numbers(open_clip.OPENAI_DATASET_MEAN),
        "std": _numbers(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _open_clip(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read an open_clip_config.json, the arguments of open_clip's training script, or a pretrained tag's settings."""
    found = Found()
    keys = ("force_image_size", "image_mean", "image_std", "image_interpolation", "image_resize_mode")
    if isinstance(values.get("preprocess_cfg"), Mapping):
        model = values.get("model_cfg")
        vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
        size = vision.get("image_size") if isinstance(vision, Mapping) else None
        values = {"size": size, **values["preprocess_cfg"]}
        keys = ("size", "mean", "std", "interpolation", "resize_mode")
    options: list[Reader] = [
        ("image_size", lambda value: _size(_pair(value))),
        ("mean", lambda value: _numbers(_floats(value))),
        ("std", lambda value: _numbers(_floats(value))),
        ("interpolation", _word),
        ("resize_mode", _word),
    ]
    readers = dict(zip(keys, options, strict=True))
    found.settings = {readers[key][0]: value for key, value in _read(values, readers, found).items()}
    return found


USED: dict[str, Callable[[ModelSpec], Settings]] = {
    "open_clip": _used_by_open_clip,
    "timm": _used_by_timm,
    "torchvision": _used_by_torchvision,
}
READERS: dict[str, Callable[[ModelSpec, Mapping[str, Any]], Found]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "torchvision": _torchvision,
}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _one_of(choices: Collection[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError("not a choice")
        return str(value)

    return read


def _numbers(values: Iterable[float]) -> str:
    return ",".join(f"{value:.9g}" for value in _floats(list(values)))


def _floats(value: Any) -> list[float]:
    """Read one number or several. Raises ValueError or TypeError."""
    numbers = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("not finite")
    return numbers


def _count(value: Any) -> int:
    """Read a positive integer, perhaps as text. Raises ValueError or TypeError."""
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError("not a positive integer")
    return int(value)


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _pair(size: Any) -> tuple[int, int]:
    """Read a size of images: one number of pixels, or height and width. Raises ValueError or TypeError."""
    values = [_count(v) for v in (size if isinstance(size, (list, tuple)) else [size])]
    if len(values) not in (1, 2):
        raise ValueError("not height and width")
    return values[0], values[-1]


def _channels_and_size(size: Any) -> tuple[int, int, int]:
    """Read a size of images, perhaps with the number of channels, which is otherwise 0, in front."""
    whole = isinstance(size, (list, tuple)) and len(size) == 3
    return (_count(size[0]) if whole else 0, *_pair(size[1:] if whole else size))


def _size(pair: Iterable[int]) -> str:
    height, width = pair
    return str(height) if height == width else f"{height},{width}"
