from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.task.objective import Classification
from ray_soup.task.own_functions import loss_of, metric_of
from tests.unit.task.objectives import focal, in_top_2

LOGITS = torch.randn(20, 10, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(20) % 10
CLASSES, EXAMPLE = Classification(), (LOGITS[:1], LABELS[:1])


def recipe_of(**changes: str) -> Recipe:
    return make_recipe({"model": "tests.tiny:build", **{k: f"tests.unit.task.objectives:{v}" for k, v in changes.items()}})


def test_the_default_loss_is_the_summed_cross_entropy_with_label_smoothing() -> None:
    loss = loss_of(recipe_of(), CLASSES, *EXAMPLE)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.2, reduction="sum")
    assert torch.equal(loss(LOGITS, LABELS, 0.2), expected)


@pytest.mark.parametrize("name", ["summed", "each"])
def test_a_loss_may_return_the_losses_or_their_sum(name: str) -> None:
    found = loss_of(recipe_of(loss=name), CLASSES, *EXAMPLE)(LOGITS, LABELS)
    torch.testing.assert_close(found, F.cross_entropy(LOGITS, LABELS, reduction="sum"))
    assert torch.equal(loss_of(recipe_of(loss="focal"), CLASSES, *EXAMPLE)(LOGITS, LABELS), focal(LOGITS, LABELS).sum())


@pytest.mark.parametrize("classes", [1, 10])
def test_a_loss_may_take_the_logarithm_of_what_the_model_returns(classes: int) -> None:
    loss = loss_of(recipe_of(loss="of_probabilities"), CLASSES, torch.zeros(1, classes), LABELS[:1])
    found = loss(torch.full((2, classes), 0.5), LABELS[:2] * 0)
    torch.testing.assert_close(found, torch.tensor(2 * (classes + 1) * math.log(2)))


def test_a_metric_gives_one_float_score_per_example() -> None:
    metric = metric_of(recipe_of(metric="in_top_2"), CLASSES, *EXAMPLE)
    assert metric is not None
    assert metric(LOGITS, LABELS).dtype == torch.float32
    assert torch.equal(metric(LOGITS, LABELS), in_top_2(LOGITS, LABELS).float())
    assert metric_of(recipe_of(), CLASSES, *EXAMPLE) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "mean"}, "of three examples is .* Return losses"),
        ({"loss": "without_gradient"}, "has no gradient with respect to the logits"),
        ({"loss": "broken"}, "objectives:broken raised [A-Z]\\w+: .*objectives\\.py, line [0-9]+, in broken: "),
        ({"loss": "none"}, "has no 'none'"),
        ({"metric": "mean"}, r"returned \[\]; expected a score for each of 3 examples"),
    ],
)
def test_an_unsound_loss_or_metric_is_refused(changes: dict[str, str], said: str) -> None:
    recipe = recipe_of(**changes)
    with pytest.raises(RecipeError, match=f"(?is){said}"):
        metric_of(recipe, CLASSES, *EXAMPLE) if recipe.metric else loss_of(recipe, CLASSES, *EXAMPLE)
