"""Recognize the model of some checkpoints: from the files that libraries write, or from their tensors alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_soup.io import storage
from ray_soup.io.adapters import AdapterIngredient, adapters_among
from ray_soup.io.hub_path import is_hub
from ray_soup.io.ingredient import Ingredient
from ray_soup.task.architectures import AFTER, OTHERS, fitted, installed, mentioned, similar, whole_clip
from ray_soup.task.evidence_files import beside_in, sources

FILES = ("config.json", "open_clip_config.json", "params.txt", "args.yaml", "hparams.yaml", "config.yaml")
"""Files in which training scripts and libraries name a model."""
OF_TIMM = {"crop_pct", "img_size", "pretrained_cfg", "model_ema_decay"}
"""Arguments of timm's scripts: some of its models have the same names and tensors as torchvision's."""
CLASS_NAMES = "classes.txt"
TASKS = {"SEQ_CLS": "?task=classification", "TOKEN_CLS": "?task=token_classification"}
"""The options of `model` for the kinds of adapters of PEFT that may have another head than their base."""


@dataclass(frozen=True)
class Recognized:
    """A model, and how it was recognized."""

    model: str = ""
    """The recipe key `model`; empty if nothing is known."""
    why: str = ""
    """What says so, as sentences; what is missing if the model is not known."""
    missing: str = ""
    """What the user must still do, as a sentence."""


def recognize(ingredients: Sequence[Ingredient]) -> Recognized:
    """Return the model of opened ingredients, by the first of them that says something."""
    adapters = adapters_among(ingredients)
    if adapters:
        return _base_of(adapters[0])
    first = ingredients[0]
    folder = first.files[0].rpartition("/")[0]
    for name, values in beside_in(("config.json",), folder):
        if name == "config.json" and "model_type" in values:
            return Recognized(f"transformers:{folder}", f"{folder}/config.json is that of transformers.")
    said = [(place, word) for one in ingredients[:2] for place, word in _said(one)]
    words = [word for _, word in said]
    for library in sorted(installed(), key=lambda one: one != "timm" or not _of_timm(first)):
        for name in mentioned(library, words):
            model = fitted(library, name, first)
            if not model and not (library == "open_clip" and whole_clip(name, first)):
                continue
            place = next(place for place, word in said if name in mentioned(library, [word]))
            why = f"{first.path}: {place} names {name}, and its tensors are those of {library}'s model."
            return Recognized(model, why) if model else _zero_shot(name, why)
    return _by_tensors(first, [first.path])


def _by_tensors(ingredient: Ingredient, words: Sequence[str]) -> Recognized:
    """Return the model that has the ingredient's tensors, and others that have the same ones."""
    fits: list[str] = []
    for library in installed():
        after = 0
        for name in similar(library, ingredient, words):
            model = fitted(library, name, ingredient)
            if not model and library == "open_clip" and whole_clip(name, ingredient):
                why = f"No file names a model, but the tensors are those of {name} of open_clip, text tower included."
                return _zero_shot(name, why)
            fits += [model] if model else []
            after += bool(fits)
            if len(fits) > OTHERS or after > AFTER:
                break
    if fits:
        others = f" The same tensors: {', '.join(fits[1:])}. Choose the one that you trained." if fits[1:] else ""
        return Recognized(fits[0], f"No file names a model, but all tensors have its names and shapes.{others}")
    largest = sorted(ingredient.tensors.items(), key=lambda item: -item[1].numel)[:2]
    shown = " and ".join(f"{name} {list(info.shape)}" for name, info in largest)
    return Recognized(
        why=f"no model of {', '.join(installed())} has these {len(ingredient.tensors)} tensors, such as {shown}.",
        missing="Write the function that builds the model, or the library's name for it.",
    )


def _zero_shot(name: str, why: str) -> Recognized:
    return Recognized(
        f"open_clip:{name}?zeroshot={CLASS_NAMES}",
        f"{why} It classifies by the names of the classes.",
        f"Write the names of the classes, one in a line, into {CLASS_NAMES}.",
    )


def _base_of(adapter: AdapterIngredient) -> Recognized:
    """Return the base that an adapter names."""
    base, where = adapter.config.base, adapter.config.path
    if not base:
        return Recognized(
            why=f"{where} names no base.",
            missing="Write the base model: transformers:FOLDER, or transformers:hf://ORG/NAME.",
        )
    known = os.path.isdir(base) or is_hub(base)
    revision = adapter.config.values.get("revision")
    path = base if known else f"hf://{base}{f'@{revision}' if revision else ''}"
    if not known and base.count("/") != 1:
        return Recognized(
            why=f"{where} names the base {base}, which is not on this machine.", missing="Write the folder of the base."
        )
    task = TASKS.get(str(adapter.config.values.get("task_type")), "")
    return Recognized(f"transformers:{path}{task}", f"{where} names this base.")


def _said(ingredient: Ingredient) -> Iterator[tuple[str, str]]:
    """Yield the words in the files of an ingredient that may name its model, with their places."""
    for place, values in sources(ingredient, _beside):
        yield from ((place, word) for word in _words(values))
    if ingredient.trial is not None:
        yield from (("its trial", word) for word in _words(ingredient.trial.config))


def _of_timm(ingredient: Ingredient) -> bool:
    """Return whether a file of the ingredient has arguments by timm's names."""
    return any(OF_TIMM & values.keys() for _, values in sources(ingredient, _beside))


def _beside(folder: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the settings in the files of a folder and of the one above, in which Lightning and others write them."""
    above = folder.rpartition("/")[0]
    places = [folder, *([above, storage.join(above, ".hydra")] if above else [])]
    return [found for place in places for found in beside_in(FILES, place)]


def _words(values: Any, depth: int = 0) -> Iterator[str]:
    """Yield the short texts in nested values."""
    if isinstance(values, str) and 1 < len(values) < 200:
        yield values
    elif isinstance(values, Mapping) and depth < 5:
        for value in values.values():
            yield from _words(value, depth + 1)
