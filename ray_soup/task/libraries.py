"""Model libraries that the recipe key `model` can name: one builder function and one row of LIBRARIES each.

To add a library:

1. Write a builder here, from ModelSpec to BuiltModel. Check the options with `spec.check_options` and `spec.count`; raise
   RecipeError for names that the library does not have (`spec.unknown_name`). Build the model with random weights. Called
   with one tensor, a batch of inputs, the model must return logits float32 [n, classes]; use forward hooks to adapt it.
2. Add a row to LIBRARIES, under the prefix that recipes use.
3. If the library can load a soup's file itself, add the line of Python to LOADING_LINES in companions.py.
4. Add the library to the optional dependencies of pyproject.toml, and a test to tests/unit/task/test_libraries.py.

The parts of a builder that takes more than a screen belong in a module of their own, such as transformers_models.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.task.constructor_options import cannot_create, constructor_arguments
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.objective import Segmentation
from ray_soup.task.preprocess import NamedPreprocess, Preprocess
from ray_soup.task.segmentation import IMAGE_OPTIONS as OF_SEGMENTATION
from ray_soup.task.segmentation import build_segmentation, is_segmentation, segmentation_arguments
from ray_soup.task.tokenizing import OF_TOKENS
from ray_soup.task.transformers_models import transformers_classifier
from ray_soup.task.transformers_tasks import transformers_objective
from ray_soup.task.transformers_tokens import transformers_tokens
from ray_soup.task.zero_shot import make_zero_shot

IMAGE_OPTIONS = {
    "open_clip": ("image_size", "mean", "std", "interpolation", "resize_mode"),
    "timm": ("img_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"),
    "torchvision": ("resize_size", "crop_size", "mean", "std", "interpolation"),
}
"""The options of each library that say how images are preprocessed, by the library's own names."""
SIZE_OPTIONS = {"open_clip": "image_size", "timm": "img_size", "torchvision": "crop_size"}
"""The option among them that is the size of the model's input."""
WITH_AUXILIARY = {"aux_logits": "true", "transform_input": "false"}
"""Options of torchvision's models GoogLeNet and Inception, with their values if a model is created without weights."""
OWN_OPTIONS = {
    "open_clip": ("classes", "normalize", "zeroshot", "template", *IMAGE_OPTIONS["open_clip"]),
    "timm": ("classes", "in_chans", "global_pool", *IMAGE_OPTIONS["timm"]),
    "torchvision": ("classes", *IMAGE_OPTIONS["torchvision"]),
}
"""The options that the builders of these libraries read; all others are arguments of the library's constructor."""
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
"""The values that timm has for its options of these names."""


@dataclass(frozen=True)
class BuiltModel:
    """A model and its preprocessing."""

    model: torch.nn.Module
    """Maps a batch of inputs [n, ...] to outputs [n, ...]: for classification, logits [n, classes]."""
    preprocess: Preprocess | None = None
    """Maps one PIL image, or one text, to one input; None: the data must be arrays that the model takes unchanged."""
    objective: str = ""
    """The objective that the model itself names; empty if it names none."""


def build_open_clip(spec: ModelSpec) -> BuiltModel:
    """Build `open_clip:NAME`: its image tower with a head (`classes=N`), or the whole CLIP (`zeroshot=FILE`)."""
    import open_clip

    from ray_soup.task.image_classifier import ImageClassifier

    example = f"open_clip:{spec.name}?classes=1000"
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise spec.unknown_name(open_clip.list_models())
    size = spec.size("image_size", example)
    resize_mode = spec.choice("resize_mode", ("shortest", "longest", "squash"))
    interpolation = spec.choice("interpolation", ("bicubic", "bilinear"))
    try:
        with no_weight_warnings():
            clip = open_clip.create_model(spec.name, pretrained=None, **open_clip_model_arguments(spec))
    except Exception as error:  # of whatever kind its constructors raise for a value that they do not take
        raise cannot_create(spec, error, OWN_OPTIONS["open_clip"], lambda: open_clip.create_model) from error
    visual = clip.visual
    mean = spec.floats("mean", 3, example) or getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = spec.floats("std", 3, example) or getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(
        size or visual.image_size,
        is_train=False,
        mean=mean,
        std=std,
        resize_mode=resize_mode,
        interpolation=interpolation,
    )
    if "zeroshot" in spec.options:
        make_zero_shot(clip, spec)
        return BuiltModel(clip, preprocess)
    classes = spec.count("classes", example)
    normalize = spec.options.get("normalize", "false")
    if normalize not in ("true", "false"):
        raise RecipeError(f"model: found {spec.text!r}; expected normalize=true or normalize=false. Fix the option.")
    return BuiltModel(ImageClassifier(visual, config["embed_dim"], classes, normalize == "true"), preprocess)


def open_clip_model_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return the options of a spec as arguments of `open_clip.create_model`."""
    more = constructor_arguments(spec, OWN_OPTIONS["open_clip"])
    size = spec.size("image_size", f"open_clip:{spec.name}?classes=1000")
    if size is None:
        return more
    return {"force_image_size": size[0] if size[0] == size[1] else size, **more}  # its ResNets take one number only


def build_timm(spec: ModelSpec) -> BuiltModel:
    """Build `timm:NAME?classes=N`; the other options are arguments of timm's training script."""
    timm = spec.import_library()
    example = f"timm:{spec.name}?classes=1000"
    more = timm_model_arguments(spec)
    classes = spec.count("classes", example)
    timm_config(spec, None)  # checks the name and the options
    try:
        with no_weight_warnings():
            model = timm.create_model(spec.name, pretrained=False, num_classes=classes, **more)
    except Exception as error:  # of whatever kind its constructors raise for a value that they do not take
        raise cannot_create(spec, error, OWN_OPTIONS["timm"], lambda: type(timm_outline(spec.name))) from error
    config = timm_config(spec, model.pretrained_cfg)
    channels = spec.count("in_chans", example, 3)
    if channels not in (1, 3):
        return BuiltModel(model)  # images have one channel or three; others come as arrays
    if not len(config["mean"]) == len(config["std"]) == channels:
        example = spec.with_options({"mean": "0.5", "std": "0.5"})

        def refuse(image: Any) -> Any:
            raise RecipeError(
                f"model: {spec.text} takes images of one channel, and timm knows no mean and std for these. Add those "
                f"of the training, as in {example}."
            )

        return BuiltModel(model, NamedPreprocess(refuse, "no mean"))
    preprocess = timm.data.create_transform(**config)
    return BuiltModel(model, preprocess if channels == 3 else one_channel(preprocess))


def timm_model_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return the options of a spec as arguments of `timm.create_model`: a size only for models that are built for one."""
    example = f"timm:{spec.name}?classes=1000"
    arguments: dict[str, Any] = {}
    if "in_chans" in spec.options:
        arguments["in_chans"] = spec.count("in_chans", example)
    if "img_size" in spec.options and has_fixed_size(spec):
        arguments["img_size"] = spec.size("img_size", example)
    if "global_pool" in spec.options:
        arguments["global_pool"] = spec.options["global_pool"]
    return {**arguments, **constructor_arguments(spec, OWN_OPTIONS["timm"])}


def timm_config(spec: ModelSpec, pretrained_cfg: dict[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of timm's `create_transform`: the options of a spec, otherwise those of a pretrained model.

    Args:
        spec: the recipe key `model`.
        pretrained_cfg: the configuration of the pretrained model; None: the one of timm's model of this name.
    """
    timm = spec.import_library()
    example = f"timm:{spec.name}?classes=1000"
    channels = spec.count("in_chans", example, 3)
    crop = spec.floats("crop_pct", 1, example)
    if crop is not None and crop[0] <= 0:
        raise RecipeError(f"model: found {spec.text!r}; expected a positive number for the option 'crop_pct'. Fix it.")
    size = spec.size("img_size", example)
    given = {
        "in_chans": channels,
        "input_size": None if size is None else (channels, *size),
        "mean": spec.floats("mean", channels, example),
        "std": spec.floats("std", channels, example),
        "crop_pct": crop and crop[0],
        "crop_mode": spec.choice("crop_mode", CROP_MODES),
        "interpolation": spec.choice("interpolation", INTERPOLATIONS),
    }
    if pretrained_cfg is None:
        pretrained_cfg = timm_pretrained_cfg(spec)
    # an empty configuration is an error in timm
    config: dict[str, Any] = timm.data.resolve_data_config(given, pretrained_cfg=pretrained_cfg or {"tag": ""})
    return config


def timm_pretrained_cfg(spec: ModelSpec) -> dict[str, Any]:
    """Return the configuration of timm's pretrained model of this name. Raises RecipeError if timm does not have it."""
    timm = spec.import_library()
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        raise spec.unknown_name(timm.list_models())
    try:
        known = timm.get_pretrained_cfg(spec.name)
    except RuntimeError as error:
        names = timm.list_models(f"{architecture}.*", include_tags=True)
        known_tags = ", ".join(name.partition(".")[2] for name in names if "." in name) or "none"
        raise RecipeError(
            f"model: timm has no pretrained weights '{tag}' for {architecture}; it has {known_tags}. Choose one of these, "
            f"or write {architecture} alone."
        ) from error
    if known is None:  # an old name of a model
        try:
            return timm_defaults(spec.name)[0]
        except Exception as error:
            raise RecipeError(f"model: timm cannot create '{spec.name}' ({error}). Choose another name.") from error
    config: dict[str, Any] = known.to_dict()
    return config


@functools.cache
def timm_defaults(name: str) -> tuple[dict[str, Any], str]:
    """Return the configuration and the kind of global pooling of timm's model of this name, without its options."""
    model = timm_outline(name)
    for owner in (getattr(model, "head", None), model):
        for attribute in ("global_pool", "pool_type"):
            pool = getattr(owner, attribute, None)
            pool = getattr(pool, "pool_type", pool)
            if isinstance(pool, str):
                return model.pretrained_cfg, pool
    return model.pretrained_cfg, ""


def timm_outline(name: str, **arguments: Any) -> Any:
    """Create timm's model of this name, without allocating its parameters if the model allows that."""
    import timm

    with no_weight_warnings():
        with contextlib.suppress(Exception), torch.device("meta"):  # some models cannot be created there
            return timm.create_model(name, pretrained=False, **arguments)
        return timm.create_model(name, pretrained=False, **arguments)


def structure(model: torch.nn.Module) -> dict[str, Any]:
    """Return the types and the plain attributes of a model's modules, by their paths."""
    plain = (bool, int, float, str, tuple, type(None))
    return {
        path: (type(module), {k: v for k, v in vars(module).items() if isinstance(v, plain)})
        for path, module in model.named_modules()
    }


def one_channel(preprocess: Any) -> Preprocess:
    """Return a transform of torchvision's or timm's that converts images to grayscale first, as timm reads them."""
    from torchvision import transforms

    compose: Preprocess = transforms.Compose([transforms.Grayscale(), *preprocess.transforms])
    return compose


def build_torchvision(spec: ModelSpec) -> BuiltModel:
    """Build `torchvision:NAME?classes=N`, an image classifier or a segmentation model."""
    from torchvision.transforms import InterpolationMode

    if is_segmentation(spec):
        return BuiltModel(*build_segmentation(spec), Segmentation.name)
    tv = spec.import_library().models
    example = f"torchvision:{spec.name}?classes=1000"
    names = tv.list_models(module=tv)  # the image classifiers: detection and segmentation are in submodules
    if spec.name not in names:
        raise spec.unknown_name(names)
    extra = torchvision_model_arguments(spec)
    classes = spec.count("classes", example)
    if has_auxiliary(spec):  # they warn without it
        extra["init_weights"] = True
    stated: dict[str, Any] = {n: spec.count(n, example) for n in ("resize_size", "crop_size") if n in spec.options}
    stated |= {n: list(v) for n in ("mean", "std") if (v := spec.floats(n, 3, example)) is not None}
    if (interpolation := spec.choice("interpolation", ("bilinear", "bicubic", "nearest", "lanczos"))) is not None:
        stated["interpolation"] = InterpolationMode(interpolation)
    make = functools.partial(tv.get_model, spec.name, weights=None, num_classes=classes)
    try:
        model = make(**extra)
        _check_taken(model, extra, make)
    except Exception as error:  # of whatever kind its constructors raise for a value that they do not take
        raise cannot_create(spec, error, OWN_OPTIONS["torchvision"], lambda: type(make())) from error
    return BuiltModel(model, tv.get_model_weights(spec.name).DEFAULT.transforms(**stated))


def _check_taken(model: torch.nn.Module, arguments: dict[str, Any], make: Callable[..., Any]) -> None:
    """Check that a constructor that takes any argument did not drop one. Raises TypeError, as others do."""
    parameters = inspect.signature(type(model)).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in arguments.keys() - parameters.keys():
        with torch.device("meta"):
            without = make(**{other: value for other, value in arguments.items() if other != name})
        if structure(without) == structure(model):
            raise TypeError(f"got an unexpected keyword argument '{name}'")


def torchvision_model_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return the options of a spec as arguments of `torchvision.models.get_model`. Raises RecipeError."""
    found: dict[str, Any] = {}
    if is_segmentation(spec):
        return segmentation_arguments(spec)
    if "crop_size" in spec.options and has_fixed_size(spec):
        found["image_size"] = spec.count("crop_size", spec.text)
    for option in WITH_AUXILIARY if has_auxiliary(spec) else ():
        if (value := spec.choice(option, ("true", "false"))) is not None:
            found[option] = value == "true"
    known = (*OWN_OPTIONS["torchvision"], *(WITH_AUXILIARY if has_auxiliary(spec) else ()))
    return {**found, **constructor_arguments(spec, known)}


def image_options(spec: ModelSpec) -> tuple[str, ...]:
    """Return the options of a library's model that say how images are preprocessed."""
    return OF_SEGMENTATION if is_segmentation(spec) else IMAGE_OPTIONS.get(spec.library, ())


def size_option(spec: ModelSpec) -> str:
    """Return the option among them that is the size of the images; empty if there is none."""
    return "resize_size" if is_segmentation(spec) else SIZE_OPTIONS.get(spec.library, "")


def has_auxiliary(spec: ModelSpec) -> bool:
    """Return whether a model of torchvision may have auxiliary classifiers, which are used in training only."""
    return spec.library == "torchvision" and spec.name in ("googlenet", "inception_v3")


def has_fixed_size(spec: ModelSpec) -> bool:
    """Return whether a model is built for images of one size, so that the option with the size changes the model."""
    if spec.library == "timm":
        return bool(timm_pretrained_cfg(spec).get("fixed_input_size"))
    return spec.library == "open_clip" or spec.name.startswith("vit_")


def build_transformers(spec: ModelSpec) -> BuiltModel:
    """Build `transformers:FOLDER`, an image or sequence classifier, or a model of tokens, from its config.json."""
    objective = transformers_objective(spec)
    model, preprocess = transformers_tokens(spec) if objective in OF_TOKENS else transformers_classifier(spec)
    if isinstance(preprocess, NamedPreprocess):
        version = spec.import_library().__version__
        preprocess = replace(preprocess, text=f"transformers {version} {preprocess.text}")
    return BuiltModel(model, preprocess, objective)


LIBRARIES: dict[str, Callable[[ModelSpec], BuiltModel]] = {
    "open_clip": build_open_clip,
    "timm": build_timm,
    "torchvision": build_torchvision,
    "transformers": build_transformers,
}
"""The builder of each library, by the prefix in the recipe key `model`. A builder raises RecipeError."""
