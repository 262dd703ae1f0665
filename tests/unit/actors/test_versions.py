"""Versions of the driver and of the actors that differ, and other examples, are named before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_soup.actors.messages import SetupInfo
from ray_soup.actors.versions import compare_versions, own_versions
from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from tests.conftest import InProcess, values
from tests.tiny import digits


def info(node: str, **other: str) -> SetupInfo:
    return SetupInfo({}, None, {}, "", node, versions=own_versions() | other)


def test_equal_versions_need_no_note() -> None:
    assert compare_versions([info("a"), info("b")]) == ()


def test_another_torch_or_python_is_a_note_without_the_names_of_nodes() -> None:
    mine = own_versions()
    assert compare_versions([info("a"), info("b", torch="2.0.1"), info("c", torch="2.0.1", Python="3.9.0")]) == (
        f"2 of 3 actors have torch 2.0.1, the driver {mine['torch']}: a run on other nodes may differ in the last bits.",
        f"1 of 3 actors has Python 3.9.0, the driver {mine['Python']}: a run on other nodes may differ in the last bits.",
    )


def test_another_ray_soup_is_refused() -> None:
    older = SetupInfo({}, None, {}, "", "b")
    with pytest.raises(RecipeError) as refused:
        compare_versions([info("a"), older, info("c", ray_soup="0.1.0")])
    assert str(refused.value) == (
        "The actors have another version of ray_soup than the driver: found 0.1.0 on c, an unknown one on b; expected "
        f"{own_versions()['ray_soup']}, as on the driver. Install one version on all nodes, or send it with the job: "
        "`ray job submit --runtime-env-json`."
    )


def drawn() -> list[tuple[np.ndarray, int]]:
    """A dataset that draws its examples at random, without a seed."""
    images, labels = digits()
    chosen = 1197 + np.random.permutation(len(labels) - 1197)[:200]  # the others are in heldout.npz
    return list(zip(images[chosen], labels[chosen].tolist(), strict=True))


def test_actors_that_would_evaluate_other_examples_are_refused(zoo: Path) -> None:
    data = {"fit": str(zoo / "heldout.npz"), "test": f"{__name__}:drawn"}
    recipe = make_recipe(values(zoo, data=data))
    assert InProcess(recipe).setup_info.examples.keys() == {"fit", "test"}
    with pytest.raises(RecipeError, match=r"data\.test: an actor on .* has other examples than the first .*fixed seed"):
        InProcess(recipe, 2)
