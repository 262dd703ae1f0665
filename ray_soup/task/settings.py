"""The settings of image preprocessing in each library's own terms: those that a recipe uses, and those in files."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ray_soup.task.evidence_files import RECORD
from ray_soup.task.kept_models import kept
from ray_soup.task.libraries import (
    CROP_MODES,
    IMAGE_OPTIONS,
    OWN_OPTIONS,
    SIZE_OPTIONS,
    WITH_AUXILIARY,
    has_auxiliary,
    timm_defaults,
)
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.segmentation import is_segmentation, used_by_segmentation
from ray_soup.task.timm_settings import TIMM_SCRIPT, is_known_to_timm, read_timm, some_timm_arguments, used_by_timm
from ray_soup.task.values import (
    STATABLE,
    Found,
    Reader,
    Settings,
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

IMAGENET = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
"""The normalization of torchvision's train.py, whatever the model."""
TORCHVISION_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")
OPEN_CLIP_SCRIPT = {"model", "image_mean", "image_std", "image_interpolation", "image_resize_mode"}
"""Arguments that tell the params.txt of open_clip's training script from other files of this name."""
NO_STRUCTURE = ("image_size", "patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path")
"""Keys of open_clip's model configurations that do not change what a model computes, or that an option states."""


def used_settings(spec: ModelSpec) -> Settings:
    """Return the settings that a recipe's model uses: its options, otherwise the defaults of the library."""
    stated = {name: value for name, value in spec.options.items() if name != "classes"}
    return {**kept("settings", spec.with_options({}), Settings, lambda: USED[spec.library](spec)), **stated}


def settings_of(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the settings in a script's arguments or a library's configuration file.

    Args:
        spec: the recipe key `model`; its library says how to read them.
        values: the arguments, perhaps of another program: each is read on its own.
    """
    if RECORD in values:
        return Found(_of_record(spec.library, mapping(values[RECORD])))
    return READERS[spec.library](spec, values)


def facts_of(values: Mapping[str, Any]) -> Settings:
    """Read the `size`, `mean` and `std` of the images in the arguments or configuration file of any script or library."""
    if RECORD in values:
        found = Found(_of_record("timm", mapping(values[RECORD])))
    elif "preprocess_cfg" in values or values.keys() >= OPEN_CLIP_SCRIPT:
        found = _open_clip(ModelSpec("", "open_clip", "", {}), values)
    elif "val_resize_size" in values:
        found = _of_torchvision_script(values)
    elif "image_mean" in values or "image_std" in values:
        found = _of_image_processor(values)
    else:
        found = _of_timm(values)
    settings = found.settings
    names = {"image_size": "size", "crop_size": "size", "img_size": "size", "mean": "mean", "std": "std"}
    return {name: settings[option] for option, name in names.items() if option in settings}


def _of_record(library: str, record: Mapping[str, Any]) -> Settings:
    """Read the record of preprocessing that this package writes, in a library's terms."""
    readers: dict[str, Reader] = {
        "size": (SIZE_OPTIONS[library], lambda value: size_text(pair(value))),
        "mean": ("mean", lambda value: numbers(floats(value))),
        "std": ("std", lambda value: numbers(floats(value))),
        "interpolation": ("interpolation", word),
        "channels": ("in_chans", lambda value: str(count(value))),
    }
    found = {readers[key][0]: value for key, value in read_values(record, readers, Found()).items()}
    if library != "timm":
        found.pop("in_chans", None)
    if record.get("library") == library:
        options = mapping(record.get("options")).items()
        found |= {name: value for name, value in options if isinstance(value, str) and STATABLE.fullmatch(value)}
    mode, _, share = str(record.get("crop", "")).rpartition(" ")
    if not re.fullmatch(r"[0-9.]+", share):
        mode, share = share, "1"
    if library == "timm" and mode in ("", *CROP_MODES) and "crop" in record:
        found |= {"crop_mode": mode or "center", "crop_pct": share}
    elif library == "open_clip" and share == "1" and "crop" in record:
        found["resize_mode"] = {"": "shortest", "border": "longest"}.get(mode, mode)
    elif library == "torchvision" and not mode and "crop_size" in found and float(share) > 0:
        found["resize_size"] = str(round(int(found["crop_size"].partition(",")[0]) / float(share)))
    return found


def settings_of_processor(values: Mapping[str, Any]) -> Settings:
    """Return the `size`, `mean`, `std` and `interpolation` of an image processor of transformers, as far as it has them."""
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    found = _of_image_processor(values).settings
    settings = {"size" if name == "image_size" else name: value for name, value in found.items()}
    resample = values.get("resample")
    if values.get("do_resize", True) is True and resample in names:
        settings["interpolation"] = names[resample]
    return settings


def _of_image_processor(values: Mapping[str, Any]) -> Found:
    """Read the preprocessor_config.json of transformers, in which a size may also be that of the shortest edge."""
    found = Found()
    crops = values.get("do_center_crop", "crop_size" in values)
    size = values.get("crop_size" if crops else "size")
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    elif not crops:  # it depends on the version what one number means
        size = None
    if values.get("do_resize", True) is True or crops:
        read = read_values({"size": size}, {"size": ("size", pair)}, Found())
        found.settings = {"image_size": size_text(read["size"])} if read else {}
    if values.get("do_normalize", True) is True:
        readers: dict[str, Reader] = {"image_mean": ("mean", floats), "image_std": ("std", floats)}
        found.settings |= {readers[key][0]: numbers(value) for key, value in read_values(values, readers, found).items()}
    return found


# torchvision


def _used_by_torchvision(spec: ModelSpec) -> Settings:
    if is_segmentation(spec):
        return used_by_segmentation(spec)
    tv = spec.import_library().models
    preset = tv.get_model_weights(spec.name).DEFAULT.transforms()
    return {
        "resize_size": str(preset.resize_size[0]),
        "crop_size": str(preset.crop_size[0]),
        "mean": numbers(preset.mean),
        "std": numbers(preset.std),
        "interpolation": preset.interpolation.value,
        **(WITH_AUXILIARY if has_auxiliary(spec) else {}),
    }


def _of_torchvision_script(values: Mapping[str, Any]) -> Found:
    """Read the arguments of torchvision's references/classification/train.py."""
    found = Found()
    readers: dict[str, Reader] = {
        "val_resize_size": ("resize_size", count),
        "val_crop_size": ("crop_size", count),
        "interpolation": ("interpolation", word),
    }
    read = {readers[key][0]: str(value) for key, value in read_values(values, readers, found).items()}
    found.settings = {**read, **IMAGENET}
    return found


def _torchvision(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read the arguments of torchvision's train.py, or those of timm's, whose ResNets have tensors of the same names."""
    if "val_resize_size" in values:
        found = _of_torchvision_script(values)
        if has_auxiliary(spec):  # which torchvision creates with other settings if it loads weights of its own
            loaded = values.get("weights") or values.get("pretrained") is True
            found.settings["transform_input"] = "true" if loaded else "false"
        return found
    found = _of_timm(values)
    theirs, found.settings = found.settings, {}
    name = str(values.get("model")).rpartition("/")[2].partition(".")[0]
    pool = theirs.get("global_pool", "avg")
    usual = {"crop_mode": "center", "global_pool": timm_defaults(name)[1] if is_known_to_timm(name) else pool}
    found.unstatable |= {key: theirs[key] for key, value in usual.items() if theirs.get(key, value) != value}
    found.unstatable |= {key: value for key, value in theirs.items() if key not in OWN_OPTIONS["timm"]}
    size, crop = theirs.get("img_size", ""), theirs.get("crop_pct")
    if "," in size:
        found.unstatable["img_size"] = size
    elif size:
        found.settings = {"crop_size": size}
        if crop:
            found.settings["resize_size"] = str(math.floor(int(size) / float(crop)))
    interpolation = theirs.get("interpolation")
    if interpolation in TORCHVISION_INTERPOLATIONS:
        found.settings["interpolation"] = interpolation
    elif interpolation:
        found.unstatable["interpolation"] = interpolation
    found.settings |= {key: theirs[key] for key in ("mean", "std") if key in theirs}
    names = {"img_size": "crop_size", "crop_pct": "resize_size"}
    unread = {names.get(option, option): said for option, said in found.unread.items()}
    found.unread = {option: said for option, said in unread.items() if option in IMAGE_OPTIONS["torchvision"]}
    return found


def _of_timm(values: Mapping[str, Any]) -> Found:
    """Read the arguments of timm's train.py, or some of them, without a model of timm to compare with."""
    name = values.get("model", values.get("architecture"))
    by_timm = values.keys() >= TIMM_SCRIPT or "pretrained_cfg" in values
    if by_timm and isinstance(name, str) and importlib.util.find_spec("timm") and is_known_to_timm(name.rpartition("/")[2]):
        return read_timm(ModelSpec("", "timm", name.rpartition("/")[2], {}), values)
    found = Found()
    given = some_timm_arguments(values, found)
    size = given.get("img_size") or given.get("input_size", ())[-2:]
    texts = {"img_size": size_text(size) if size else "", "crop_pct": given.get("crop_pct", "")}
    texts |= {key: numbers(given[key]) for key in ("mean", "std") if len(given.get(key, ())) in (1, 3)}
    texts |= {key: given[key] for key in ("crop_mode", "interpolation") if key in given}
    found.settings = {key: str(value) for key, value in texts.items() if value}
    return found


# timm


def _timm(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read what timm's scripts say, or the arguments of torchvision's train.py, in timm's terms."""
    if "val_resize_size" not in values:
        return read_timm(spec, values)
    found = _of_torchvision_script(values)
    names = {"crop_size": "img_size", "resize_size": "crop_pct"}
    found.unread = {names.get(option, option): said for option, said in found.unread.items()}
    theirs = found.settings
    resize, crop = (int(theirs.pop(name, 0)) for name in ("resize_size", "crop_size"))
    theirs["crop_mode"] = "center"
    if crop:
        theirs["img_size"] = str(crop)
    if crop and resize:  # rounded down, because timm takes the whole pixels of img_size / crop_pct
        theirs["crop_pct"] = str(math.floor(crop / resize * 1e6) / 1e6)
    return found


# open_clip


def _used_by_open_clip(spec: ModelSpec) -> Settings:
    import open_clip

    config = open_clip.get_model_config(spec.name) or {}
    vision = config.get("vision_cfg", {})
    return {
        "image_size": size_text(pair(vision.get("image_size", 224))),
        "mean": numbers(open_clip.OPENAI_DATASET_MEAN),
        "std": numbers(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def _open_clip(spec: ModelSpec, values: Mapping[str, Any]) -> Found:
    """Read an open_clip_config.json, the arguments of open_clip's training script, or a pretrained tag's settings."""
    found = Found()
    keys = ("force_image_size", "image_mean", "image_std", "image_interpolation", "image_resize_mode")
    if isinstance(values.get("preprocess_cfg"), Mapping):
        model = mapping(values.get("model_cfg"))
        _compare_structure(spec, model, "", found)
        values = {"size": mapping(model.get("vision_cfg")).get("image_size"), **values["preprocess_cfg"]}
        keys = ("size", "mean", "std", "interpolation", "resize_mode")
    elif values.keys() >= OPEN_CLIP_SCRIPT:
        values = _with_defaults(spec, values, found)
    options: list[Reader] = [
        ("image_size", lambda value: size_text(pair(value))),
        ("mean", lambda value: numbers(floats(value))),
        ("std", lambda value: numbers(floats(value))),
        ("interpolation", one_of(("bicubic", "bilinear", "random"))),
        ("resize_mode", one_of(("shortest", "longest", "squash"))),
    ]
    readers = dict(zip(keys, options, strict=True))
    found.settings = {readers[key][0]: value for key, value in read_values(values, readers, found).items()}
    if found.settings.get("interpolation") == "random":  # in the training; bicubic in evaluations
        found.settings["interpolation"] = "bicubic"
    return found


def _with_defaults(spec: ModelSpec, values: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """Fill in what the arguments of open_clip's training script leave to the model and its pretrained weights.

    What changes the structure of the model is added to `found`.
    """
    import open_clip

    name = str(values["model"]).replace("/", "-")
    if name not in open_clip.list_models():  # of the Hub, a folder, or another version
        found.unknown = str(values["model"])
        return dict(values)
    config = open_clip.get_model_config(name)
    if values.get("force_quick_gelu") is True:
        config["quick_gelu"] = True
    _compare_structure(spec, config, name, found)
    tag = str(values.get("pretrained") or "")
    known = open_clip.get_pretrained_cfg(name, tag) or {}
    needs = known.get("quick_gelu") or (known and tag == "openai")  # open_clip 2.24 does not say so
    if needs and not config.get("quick_gelu") and not found.unstatable:
        found.remark = (
            f"was trained from the weights {tag}, which need QuickGELU, and the model {name} has GELU. Older versions of "
            f"open_clip used QuickGELU all the same: if the training did, write {name}-quickgelu."
        )
    used = {**_used_by_open_clip(ModelSpec("", "open_clip", name, {})), **known}
    filled = {f"image_{key}": used[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    for key in ("image_mean", "image_std"):
        if isinstance(filled[key], str):
            filled[key] = [float(part) for part in filled[key].split(",")]
    filled["force_image_size"] = mapping(config.get("vision_cfg")).get("image_size", 224)
    return {**filled, **{key: value for key, value in values.items() if value not in (None, "", [])}}


def _compare_structure(spec: ModelSpec, theirs: Mapping[str, Any], name: str, found: Found) -> None:
    """Add to `found` what makes a model of this configuration compute something else than the recipe's, of the same shapes.

    Args:
        spec: the recipe key `model`; without a name, nothing is compared.
        theirs: the configuration of the model that was trained.
        name: its name, if it is one of open_clip's.
        found: receives the differences, and the name of a model of open_clip that has them.
    """
    import open_clip

    ours = open_clip.get_model_config(spec.name) if spec.name and theirs else None
    if ours is None:
        return
    towers = ("vision_cfg", "text_cfg") if "zeroshot" in spec.options else ("vision_cfg",)
    for tower in towers:
        one, other = mapping(ours.get(tower)), mapping(theirs.get(tower))
        for key in sorted((one.keys() & other.keys()).difference(NO_STRUCTURE)):
            if one[key] != other[key]:
                found.unstatable[key] = str(other[key])
    if bool(theirs.get("quick_gelu")) != bool(ours.get("quick_gelu")):
        found.unstatable["quick_gelu"] = str(bool(theirs.get("quick_gelu")))
    plain = (name or spec.name).removesuffix("-quickgelu")
    candidate = f"{plain}-quickgelu" if theirs.get("quick_gelu") else plain
    if found.unstatable and (name or [*found.unstatable] == ["quick_gelu"]) and candidate in open_clip.list_models():
        found.other_model = candidate


USED: dict[str, Callable[[ModelSpec], Settings]] = {
    "open_clip": _used_by_open_clip,
    "timm": used_by_timm,
    "torchvision": _used_by_torchvision,
}
READERS: dict[str, Callable[[ModelSpec, Mapping[str, Any]], Found]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "torchvision": _torchvision,
}
