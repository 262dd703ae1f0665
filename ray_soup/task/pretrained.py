"""Load pretrained weights that lack the model's head, as the starting point of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import layout_of
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.models import load_checkpoint
from ray_soup.task.zero_shot import class_features, prompts_of

OPEN_CLIP = "open_clip:"


def load_pretrained(model: torch.nn.Module, spec: str, source: str) -> torch.nn.Linear:
    """Fill in all parameters of `model`, in place, except those of one linear layer, its head; return that layer.

    Args:
        model: the model built from `spec`.
        spec: the recipe key `model`.
        source: a checkpoint file that lacks the head, or has one for other classes; or `open_clip:TAG` for weights that
            open_clip knows by name. Other tensors in the source, such as a text tower, are ignored.

    Raises RecipeError unless exactly one linear layer of the model is missing from the source.
    """
    state = model.state_dict()
    if source.startswith(OPEN_CLIP) and spec.startswith(OPEN_CLIP):
        given = _image_tower(spec, source)
    else:
        given = _tensors_of(source, model, state)
    new = [name for name, tensor in state.items() if name not in given or given[name].shape != tensor.shape]
    layers = sorted({name.rpartition(".")[0] for name in new})
    head = dict(model.named_modules()).get(layers[0]) if len(layers) == 1 else None
    if not isinstance(head, torch.nn.Linear):
        raise RecipeError(
            f"finetune.pretrained: {source} should contain all of the model {spec} except one linear layer, its head; it "
            + (
                f"lacks {len(new)} tensors: {', '.join(new[:4])}. Use a checkpoint of the same architecture."
                if new
                else "lacks nothing. Use it as finetune.init instead."
            )
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in new:
                tensor.copy_(given[name])
    return head


def _image_tower(spec: str, source: str) -> dict[str, torch.Tensor]:
    model = ModelSpec.parse(spec)
    clip = _clip(model, source.removeprefix(OPEN_CLIP), model.size("image_size", model.text))
    return {f"visual.{name}": tensor for name, tensor in clip.visual.state_dict().items()}


def _clip(model: ModelSpec, tag: str | None, size: tuple[int, int] | None = None) -> Any:
    """Create a CLIP with the pretrained weights `tag`; for images of another `size` the library resizes its positions.

    Raises RecipeError if open_clip has no such weights, or cannot download them.
    """
    import open_clip

    try:
        with no_weight_warnings():
            return open_clip.create_model(model.name, tag, **({} if size is None else {"force_image_size": size}))
    except (RuntimeError, OSError, ValueError) as error:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model.name)) or "none"
        raise RecipeError(
            f"finetune.pretrained: open_clip cannot load the weights '{tag}' of {model.name} ({error}). Its weights of this "
            f"model: {tags}. Name one of them, connect to the network once, or use a file."
        ) from error


def _tensors_of(source: str, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read those tensors of a checkpoint that the model has, by the model's names."""
    layout = layout_of(model)
    second_names = layout.known_names
    checkpoint = open_ingredient(source).bind(state, second_names, layout.in_files.unsaved)
    if checkpoint.unclear:
        raise RecipeError(f"finetune.pretrained: {source}: {checkpoint.unclear}")
    base = f"{getattr(model, 'base_model_prefix', '')}."  # transformers' name for what is below the head
    given = {}
    for name, info in checkpoint.tensors.items():
        own = name if name in state else second_names.get(base + name, base + name)
        if own in state:
            given[own] = checkpoint.read(name).view(info.shape)
    return given


def fill_zero_shot(head: torch.nn.Linear, spec: str, source: str, file: str, templates: Sequence[str]) -> None:
    """Fill in a head for image features of unit length from class names, in place (Radford et al. 2021).

    Args:
        head: a linear layer whose inputs are image features of unit length.
        spec: the recipe key `model`.
        source: a CLIP whose text tower and logit scale are used; same syntax as in `load_pretrained`.
        file: a file of class names, one per line.
        templates: texts with {} in place of the class name; their features are averaged.

    Raises RecipeError if the model does not scale its features to unit length, or the class names do not fit the head.
    """
    model = ModelSpec.parse(spec)
    if model.library != "open_clip" or model.options.get("normalize") != "true":
        raise RecipeError(
            f"finetune.class_names: a head made from class names needs image features of unit length; the model is {spec}. "
            "Set model: open_clip:NAME?classes=N&normalize=true."
        )
    prompts, tokens = prompts_of(model.name, file, templates, "finetune.class_names")
    classes = len(prompts) // len(templates)
    if classes != head.out_features:
        raise RecipeError(
            f"finetune.class_names: {file} names {classes} classes; the model {spec} has {head.out_features}. Fix the "
            "file or the option `classes`."
        )
    tag = source.removeprefix(OPEN_CLIP) if source.startswith(OPEN_CLIP) else None
    clip = _clip(model, tag).eval()
    if tag is None:
        load_checkpoint(clip, source)
    with torch.inference_mode():
        texts = torch.cat([clip.encode_text(some, normalize=True) for some in torch.split(tokens, 256)])
        head.weight.copy_(clip.logit_scale.exp() * class_features(texts, classes))
        head.bias.zero_()
