"""Adapters as ingredients of a recipe: the base that `model:` names, and the checks before a run.

`model: transformers:FOLDER` or `transformers:hf://ORG/NAME` names the base. PEFT loads an adapter into any model whose
modules fit, so what tells two bases apart is read from the files: the names and shapes of tensors, and the weights of the
base that an adapter names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.adapters import AdapterIngredient, adapters_among
from ray_soup.io.binding import Ignored
from ray_soup.io.check import check_fits, check_floats, check_together
from ray_soup.io.hub_path import COMMIT, HubPath, is_hub
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet, LiftedIngredient, digest_of, lifted, make_set
from ray_soup.mixing.blocks import Layout
from ray_soup.task.heads import check_heads, other_head, with_classes
from ray_soup.task.loader_names import check_named
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import describe
from ray_soup.task.other_models import advice_for


def lift(
    spec: str, adapters: Sequence[AdapterIngredient], ignore: Sequence[str] = ()
) -> tuple[list[Ingredient], Layout, list[str]]:
    """Lift adapters to ingredients of one model, after all checks.

    Args:
        spec: the recipe key `model`, their base.
        adapters: the opened adapters.
        ignore: tensors of the base to leave out, the recipe key `ignore`.

    Returns:
        The lifted ingredients, the layout of the model with all factors, and notes for the user.

    Raises RecipeError if `model` is no base, IngredientError if the adapters do not fit together or do not fit it.
    """
    from ray_soup.task.peft_models import check_with_peft, describe_adapted

    _folder_of(spec, adapters)
    check_with_peft(spec, adapters)
    group = lifted_set(spec, adapters, ignore)
    notes = _compare_bases(adapters, group)
    layout = describe_adapted(spec, group)
    return [*check_together(lifted(group), layout.state_shapes)], layout, notes


def lift_one(spec: str, adapter: AdapterIngredient, ignore: Sequence[str] = ()) -> tuple[list[Ingredient], Layout]:
    """Lift a single adapter, such as a finished soup, to evaluate it."""
    from ray_soup.task.peft_models import check_with_peft, describe_adapted

    _folder_of(spec, [adapter])
    check_with_peft(spec, [adapter])
    group = lifted_set(spec, [adapter], ignore)
    _compare_bases([adapter], group)
    return [*lifted(group)], describe_adapted(spec, group)


def lift_finished(spec: str, adapters: Sequence[AdapterIngredient], ignore: Sequence[str] = ()) -> list[LiftedIngredient]:
    """Lift the adapters of a finished soup, which its run checked."""
    return lifted(lifted_set(spec, adapters, ignore))


def lifted_set(spec: str, adapters: Sequence[AdapterIngredient], ignore: Sequence[str]) -> AdapterSet:
    """Open the base, and join the adapters. Raises RecipeError or IngredientError."""
    base, layout = open_base(spec, adapters, ignore)
    return make_set(adapters, base, dict(zip(layout.names, layout.shapes, strict=True)), layout.tied)


def open_base(spec: str, adapters: Sequence[AdapterIngredient], ignore: Sequence[str]) -> tuple[Ingredient, Layout]:
    """Open the weights of the base, bound to its model. Raises RecipeError or IngredientError.

    They may lack a head that every adapter contains, as a pretrained model does that was fine-tuned for classification.
    """
    layout = describe(spec)
    opened = open_ingredient(_folder_of(spec, adapters))
    unneeded: Ignored = (*ignore, *layout.in_files.unsaved, *other_head(spec, layout))
    missing = layout.state_shapes.keys() - opened.bind(layout.state_shapes, layout.known_names, unneeded).tensors.keys()
    heads = {name for name in missing if all(name in a.whole and a.config.saves(name) for a in adapters)}
    check_heads(spec, sorted(missing - heads), opened, adapters)
    shapes = {name: shape for name, shape in layout.state_shapes.items() if name not in heads}
    base = check_fits(opened, shapes, layout.known_names, unneeded)
    base.check_copies()
    check_floats([base], [name for name in layout.names if name in shapes])
    return base, layout


def _folder_of(spec: str, adapters: Sequence[AdapterIngredient]) -> str:
    """Return the folder of the base, local or on the Hub. Raises RecipeError."""
    parsed = ModelSpec.parse(spec)
    if parsed.library != "transformers" or not (is_hub(parsed.name) or os.path.isdir(parsed.name)):
        raise RecipeError(
            f"model: {spec} is neither a folder of transformers on this machine nor an hf:// path; the ingredients are LoRA "
            f"adapters, such as {adapters[0].path}, which need the weights of their base. Write model: transformers:FOLDER "
            "or model: transformers:hf://ORG/NAME"
        )
    return parsed.name


def _compare_bases(adapters: Sequence[AdapterIngredient], group: AdapterSet) -> list[str]:
    """Compare the bases that adapters name with the recipe's.

    Returns notes about bases that are not on this machine. Raises IngredientError if one has other weights.
    """
    base, named = group.base, dict[tuple[str, str], str]()
    for adapter in adapters:
        if adapter.config.base:
            named.setdefault((adapter.config.base, str(adapter.config.values.get("revision") or "")), adapter.path)
    unknown = []
    for (name, revision), path in named.items():
        if not os.path.isdir(name):
            if not _may_be(name, revision, base.path):
                unknown.append(f"{name}{'@' * bool(revision)}{revision} ({path})")
        elif os.path.realpath(name) != os.path.realpath(base.path) and not _same_weights(name, group):
            raise IngredientError(
                f"{path} was trained on the base {name} (base_model_name_or_path), whose weights differ from those of the "
                f"recipe's model, {base.path}. Set `model:` to that base, or exclude the adapter."
            )
    if not unknown:
        return []
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return [
        f"Adapters name a base that is not on this machine, {unknown[0]}{more}. It was not compared with {base.path}, which "
        "their modules fit: make sure that both are the same model."
    ]


def _may_be(name: str, revision: str, base: str) -> bool:
    """Return whether a base that is not on this machine may be the recipe's base, by its name and its revision."""
    if is_hub(base):
        where = HubPath.parse(base)
        other_commit = COMMIT.fullmatch(revision) and revision != where.revision
        return name == base or (name == where.repo and not where.inside and not other_commit)
    return os.path.basename(name.rstrip("/")) == os.path.basename(base.rstrip("/"))


def _same_weights(folder: str, group: AdapterSet) -> bool:
    """Return whether a folder contains the weights of the base, in any files. A folder without weights cannot tell."""
    try:
        other = open_ingredient(folder)
    except (IngredientError, RecipeError):
        return True
    if digest_of(other) == group.base_sha256:
        return True
    base = group.base
    bound = other.bind(base.tensors, {})
    if bound.tensors.keys() != base.tensors.keys():
        return False
    return all(torch.equal(bound.read(name).double(), base.read(name).double()) for name in base.tensors)


def bound_to(ingredients: Sequence[Ingredient], model: str) -> tuple[list[Ingredient], list[str]]:
    """Check that checkpoints fit together and fit `model`, for `ray-soup inspect`.

    Returns the bound checkpoints and the names of their common tensors. Raises RecipeError or IngredientError.
    """
    adapters = adapters_among(ingredients)
    if adapters:
        bound, layout, _ = lift(with_classes(model, adapters), adapters)
        return bound, [*layout.state_shapes]
    layout = describe(model)
    layout, bound = check_named(layout, ingredients, layout.in_files.unsaved, advice_for(model))
    check_floats(bound, layout.names)
    return bound, [*layout.state_shapes]


def about_base(ingredients: Sequence[Ingredient]) -> dict[str, Any]:
    """Return the keys of run.json that describe the base of adapters; none for whole models."""
    first = ingredients[0]
    if not isinstance(first, LiftedIngredient):
        return {}
    return {"base": {"path": first.group.base.path, "sha256": first.group.base_sha256}}
