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

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ray_soup.errors import RecipeError
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.preprocess import Preprocess
from ray_soup.task.transformers_models import transformers_classifier
from ray_soup.task.zero_shot import make_zero_shot


@dataclass(frozen=True)
class BuiltModel:
    """A model and its preprocessing."""

    model: torch.nn.Module
    """Maps a batch of inputs [n, ...] to logits [n, classes]."""
    preprocess: Preprocess | None = None
    """Maps one PIL image, or one text, to one input; None: the data must be arrays that the model takes unchanged."""


class ImageClassifier(torch.nn.Module):
    """The image tower of an open_clip model with a linear head on its features."""

    def __init__(self, visual: torch.nn.Module, features: int, classes: int, normalize: bool = False) -> None:
        super().__init__()
        self.visual = visual
        self.head = torch.nn.Linear(features, classes)
        self.normalize = normalize

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [n, 3, H, W] to logits [n, classes]; with `normalize` the features are scaled to unit length first."""
        features = self.visual(images)
        logits: torch.Tensor = self.head(torch.nn.functional.normalize(features, dim=-1) if self.normalize else features)
        return logits

    def extra_repr(self) -> str:
        """Show `normalize` in the printed model, because the fingerprint is computed from the printed model."""
        return f"normalize={self.normalize}"


def build_open_clip(spec: ModelSpec) -> BuiltModel:
    """Build `open_clip:NAME`: its image tower with a head (`classes=N`), or the whole CLIP (`zeroshot=FILE`)."""
    import open_clip

    example = f"open_clip:{spec.name}?classes=1000"
    spec.check_options(("classes", "normalize", "zeroshot", "template"), example)
    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise spec.unknown_name(open_clip.list_models())
    with no_weight_warnings():
        clip = open_clip.create_model(spec.name, pretrained=None)
    visual = clip.visual
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(visual.image_size, is_train=False, mean=mean, std=std)
    if "zeroshot" in spec.options:
        make_zero_shot(clip, spec)
        return BuiltModel(clip, preprocess)
    classes = spec.count("classes", example)
    normalize = spec.options.get("normalize", "false")
    if normalize not in ("true", "false"):
        raise RecipeError(f"model: found {spec.text!r}; expected normalize=true or normalize=false. Fix the option.")
    return BuiltModel(ImageClassifier(visual, config["embed_dim"], classes, normalize == "true"), preprocess)


def build_timm(spec: ModelSpec) -> BuiltModel:
    """Build `timm:NAME?classes=N`."""
    timm = spec.import_library()
    example = f"timm:{spec.name}?classes=1000"
    spec.check_options(("classes",), example)
    classes = spec.count("classes", example)
    if not timm.is_model(spec.name.partition(".")[0]):
        raise spec.unknown_name(timm.list_models())
    try:
        with no_weight_warnings():
            model = timm.create_model(spec.name, pretrained=False, num_classes=classes)
    except RuntimeError as error:
        raise RecipeError(f"model: timm cannot create '{spec.name}' ({error}). Choose another name.") from error
    return BuiltModel(model, timm.data.create_transform(**timm.data.resolve_model_data_config(model)))


def build_torchvision(spec: ModelSpec) -> BuiltModel:
    """Build `torchvision:NAME?classes=N`, an image classifier."""
    tv = spec.import_library().models
    example = f"torchvision:{spec.name}?classes=1000"
    spec.check_options(("classes",), example)
    classes = spec.count("classes", example)
    names = tv.list_models(module=tv)  # the image classifiers: detection and segmentation are in submodules
    if spec.name not in names:
        raise spec.unknown_name(names)
    extra = {"init_weights": True} if spec.name in ("googlenet", "inception_v3") else {}  # these two warn without it
    model = tv.get_model(spec.name, weights=None, num_classes=classes, **extra)
    return BuiltModel(model, tv.get_model_weights(spec.name).DEFAULT.transforms())


def build_transformers(spec: ModelSpec) -> BuiltModel:
    """Build `transformers:FOLDER`, an image or sequence classifier, from its config.json."""
    return BuiltModel(*transformers_classifier(spec))


LIBRARIES: dict[str, Callable[[ModelSpec], BuiltModel]] = {
    "open_clip": build_open_clip,
    "timm": build_timm,
    "torchvision": build_torchvision,
    "transformers": build_transformers,
}
"""The builder of each library, by the prefix in the recipe key `model`. A builder raises RecipeError."""
