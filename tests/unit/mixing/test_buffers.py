"""Which buffers are averaged, copied, recomputed or refused: decided by what they are, never by their dtype alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.ao.quantization import MinMaxObserver

from ray_soup.errors import IngredientError
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.mixing.blocks import layout_of
from ray_soup.mixing.buffers import check_buffers, differing_layers, mixed_buffer


class Owner(nn.Module):
    """A layer with one float buffer."""

    def __init__(self, value: torch.Tensor, name: str = "codebook") -> None:
        super().__init__()
        self.register_buffer(name, value)


def written(folder: Path, models: list[nn.Module]) -> list[Ingredient]:
    files = []
    for k, model in enumerate(models):
        files.append(folder / f"{k}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, files[-1])
    return [open_ingredient(str(file)) for file in files]


def check(ingredients: list[Ingredient], model: nn.Module, policy: str = "auto") -> list[str]:
    layout = layout_of(model)
    return check_buffers(ingredients, layout.other_buffers, layout.owners, policy)


@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [
        (lambda k: Owner(torch.tensor([1.0, k])), "0.codebook", "Owner"),
        (lambda k: Owner(torch.tensor(0.9**k), "decay"), "0.decay", "Owner"),
        (lambda k: Owner(torch.tensor([k, float("nan")]), "range"), "0.range", "Owner"),
        (lambda k: nn.Sequential(nn.Linear(2, 2), Owner(torch.full((2,), k).double(), "ema")), "0.1.ema", "Owner"),
    ],
)
def test_a_buffer_that_nobody_can_average_is_refused_by_name(tmp_path: Path, make: object, name: str, kind: str) -> None:
    models = [nn.Sequential(make(float(k))) for k in (0, 0, 1)]
    ingredients = written(tmp_path, models)
    with pytest.raises(
        IngredientError, match=rf"2\.safetensors: the buffer {name} of a {kind} differs .*0\.safetensors"
    ) as e:
        check(ingredients, models[0])
    assert "buffers: average" in str(e.value)
    assert "buffers: first" in str(e.value)
    for policy in ("average", "recalibrate", "first"):
        check(ingredients, models[0], policy)
    check(ingredients[:2], models[0])


def test_the_range_of_a_quantization_observer_is_refused(tmp_path: Path) -> None:
    models = [nn.Sequential(MinMaxObserver()) for _ in range(2)]
    for k, model in enumerate(models):
        model(torch.linspace(-k, 1 + k, 5))
    with pytest.raises(IngredientError, match="of a MinMaxObserver differs"):
        check(written(tmp_path, models), models[0])


@pytest.mark.parametrize("policy", ["auto", "average", "recalibrate"])
def test_integer_buffers_that_differ_are_those_of_the_first_ingredient_and_noted(tmp_path: Path, policy: str) -> None:
    models = [nn.Sequential(Owner(torch.tensor([k // 2]), "steps"), Owner(torch.tensor(k > 1), "on")) for k in range(4)]
    ingredients = written(tmp_path, models)
    (note,) = check(ingredients, models[0], policy)
    assert re.search(r"no mean: 0\.steps and 1 more, as in \S+/0\.safetensors and \S+/2\.safetensors\. A soup has", note)
    assert check(ingredients, models[0], "first") == check(ingredients[:2], models[0], policy) == []
    for first in (0, 3):
        assert mixed_buffer([ingredients[first], ingredients[1]], "0.steps", "average").tolist() == [first // 2]


def test_a_float_that_differs_is_refused_whatever_integers_do(tmp_path: Path) -> None:
    models = [nn.Sequential(Owner(torch.tensor([k]), "steps"), Owner(torch.tensor([float(k)]))) for k in range(2)]
    with pytest.raises(IngredientError, match=r"the buffer 1\.codebook of a Owner differs"):
        check(written(tmp_path, models), models[0])
    assert len(check(written(tmp_path, models), models[0], "average")) == 1


def test_equal_buffers_are_copied_whatever_they_hold(tmp_path: Path) -> None:
    values = torch.tensor([0.1, -torch.inf, torch.nan, 1e-45])
    models: list[nn.Module] = [nn.Sequential(Owner(values.clone()), nn.Linear(1, 1)) for _ in range(3)]
    ingredients = written(tmp_path, models)
    check(ingredients, models[0])
    torch.testing.assert_close(
        mixed_buffer(ingredients, "0.codebook", "auto").float(), values, rtol=0, atol=0, equal_nan=True
    )


def test_a_constant_saved_in_half_precision_is_the_same_constant(tmp_path: Path) -> None:
    models = [nn.Sequential(Owner(torch.tensor([0.1, 0.7]))), nn.Sequential(Owner(torch.tensor([0.1, 0.7]).half()))]
    check(written(tmp_path, models), models[0])


def test_running_statistics_may_differ_and_each_layer_is_looked_at_alone(tmp_path: Path) -> None:
    models = [
        nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True)) for _ in "ab"
    ]
    models[1][0].running_var.mul_(2)
    models[1][2].running_mean.add_(1)
    models[1][1].num_batches_tracked.add_(5)  # counts batches; says nothing about the statistics
    ingredients, layout = written(tmp_path, models), layout_of(models[0])
    check(ingredients, models[0])
    assert differing_layers(ingredients, layout.tracking, layout.buffers) == ("0", "2")
