"""Soups of state dicts in memory: what they need, what they refuse, and the example in the documentation."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import ray_soup
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.soups import in_memory
from tests import tiny
from tests.conftest import ROOT


def loader(folder: Path, name: str) -> DataLoader:
    arrays = np.load(folder / f"{name}.npz")
    return DataLoader(TensorDataset(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])), 100)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / "zoo").glob("*.safetensors"))]


class Tied(tiny.Tiny):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.key.weight = self.query.weight


def test_tied_tensors_half_precision_and_select_as_batches_are_accepted(zoo: Path) -> None:
    halves = []
    for state in states(zoo)[:3]:
        model = Tied()
        model.load_state_dict(state)
        halves.append({name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    fit = list(loader(zoo, "heldout"))
    soup = ray_soup.mix_state_dicts(Tied(), halves, fit[:4], "uniform", select=fit[4:])
    assert soup.state_dict().keys() == Tied().state_dict().keys()
    assert soup.state_dict()["head.weight"].dtype == torch.float16
    mean = sum(state["key.weight"].double() for state in halves) / 3
    torch.testing.assert_close(soup.state_dict()["key.weight"], mean.half(), rtol=1e-3, atol=1e-4)
    Tied().load_state_dict(soup.state_dict())


def test_a_message_says_what_is_wrong_with_the_arguments(zoo: Path) -> None:
    good, data, model = states(zoo)[:2], list(loader(zoo, "heldout")), tiny.Tiny()
    with pytest.raises(RecipeError, match="fit: a batch holds Tensor; expected"):
        ray_soup.mix_state_dicts(model, good, data[0])
    with pytest.raises(RecipeError, match="fit: a batch holds 3 items; expected"):
        ray_soup.mix_state_dicts(model, good, [(*data[0], data[0][1])])
    with pytest.raises(RecipeError, match="fit: there are no batches"):
        ray_soup.mix_state_dicts(model, good, iter([]))
    with pytest.raises(RecipeError, match="does not take the recipe key 'actors'"):
        ray_soup.mix_state_dicts(model, good, data, actors={"gpus": 1})
    with pytest.raises(RecipeError, match="does not take the recipe key 'data'"):
        ray_soup.mix_state_dicts(model, good, data, **{"data.test": "a.npz"})
    with pytest.raises(RecipeError, match=r"unknown key; did you mean 'learn\.epochs'"):
        ray_soup.mix_state_dicts(model, good, data, learn={"epoch": 1})
    with pytest.raises(IngredientError, match=r"missing: head\.bias"):
        ray_soup.mix_state_dicts(model, [good[0], {k: v for k, v in good[1].items() if k != "head.bias"}], data)
    with pytest.raises(IngredientError, match="State dict 0: extra is a str"):
        ray_soup.mix_state_dicts(model, [{**good[0], "extra": "x"}, good[1]], data)
    with pytest.raises(RecipeError, match="two or more ingredients"):
        ray_soup.mix_state_dicts(model, good[:1], data)


def test_the_example_in_the_docstring_runs() -> None:
    found = doctest.testmod(in_memory)
    assert (found.attempted > 8, found.failed) == (True, 0)


def test_a_soup_in_memory_does_not_import_ray() -> None:
    code = (
        "import sys, doctest, ray_soup.soups.in_memory as m; assert not doctest.testmod(m).failed; "
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
