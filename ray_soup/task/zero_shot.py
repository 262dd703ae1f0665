"""Zero-shot heads of a CLIP, made from class names by its text tower (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.task.model_spec import ModelSpec

TEMPLATE = "a photo of a {}."


def make_zero_shot(clip: Any, spec: ModelSpec) -> None:
    """Change a whole CLIP, in place, to return logits = scale * image_features @ class_features.T.

    The parameters keep their names. The features of a class are the mean of the features of its prompts, one prompt per
    template. Raises RecipeError for unusable class names or templates.
    """
    templates = spec.options.get("template", TEMPLATE).split("|")
    prompts, tokens = prompts_of(spec.name, spec.options["zeroshot"], templates, f"model: {spec.text}")
    classes = len(prompts) // len(templates)

    def with_prompts(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return inputs[0], tokens.to(inputs[0].device)

    def logits(module: torch.nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        images, texts, scale = output[:3]
        features: torch.Tensor = scale * images
        return features @ class_features(texts, classes).T

    clip.register_forward_pre_hook(with_prompts)
    clip.register_forward_hook(logits)
    clip.prompts = tuple(prompts)  # part of the fingerprint


def prompts_of(name: str, file: str, templates: Sequence[str], where: str) -> tuple[list[str], torch.Tensor]:
    """Make one prompt per class name and template, and tokenize the prompts.

    Args:
        name: an architecture of open_clip, whose tokenizer is used.
        file: a file of class names, one per line.
        templates: texts with {} in place of the class name.
        where: the beginning of error messages.

    Returns the prompts, grouped by class, and their tokens int64 [prompts, context].
    Raises RecipeError for unusable class names or templates, or if the tokenizer is unavailable.
    """
    import open_clip

    try:
        classes = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: the class names in {file} cannot be read ({error}). Use a text file.") from error
    if len(classes) < 2 or not templates or any("{}" not in template for template in templates):
        raise RecipeError(
            f"{where}: found {len(classes)} class names and the templates {list(templates)}; expected two or more names, "
            f"one per line, and templates with {{}} in them. Fix {file} or the templates."
        )
    prompts = [template.replace("{}", c) for c in classes for template in templates]
    try:
        return prompts, open_clip.get_tokenizer(name)(prompts)
    except Exception as error:  # tokenizers of transformers and of open_clip fail in many ways
        raise RecipeError(
            f"{where}: the tokenizer of open_clip's {name} is unavailable ({error}). Install its library, or connect "
            "to the network once to download its files."
        ) from error


def class_features(texts: torch.Tensor, classes: int) -> torch.Tensor:
    """Average the features of the prompts of each class and scale them to unit length.

    Args:
        texts: float32 [classes * templates, features], features of the prompts, grouped by class.
        classes: number of classes.

    Returns float32 [classes, features].
    """
    return torch.nn.functional.normalize(texts.view(classes, -1, texts.shape[-1]).mean(dim=1), dim=-1)
