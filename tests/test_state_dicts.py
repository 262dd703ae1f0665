"""The Python interface: soups of state dicts in memory, and the commands as functions."""

from __future__ import annotations

import copy
import doctest
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import ray_soup
from ray_soup import state_dicts as module
from ray_soup.errors import IngredientError, RecipeError
from tests import tiny
from tests.conftest import ROOT, values
from tests.test_running_statistics import conv_zoo  # noqa: F401 - a fixture


def loader(folder: Path, name: str) -> DataLoader:
    arrays = np.load(folder / f"{name}.npz")
    return DataLoader(TensorDataset(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])), 100)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / "zoo").glob("*.safetensors"))]


@pytest.fixture
def one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("cluster", "one_thread")
@pytest.mark.parametrize("method", ["mehl+", "learned", "greedy"])
def test_in_memory_it_is_the_soup_of_the_files(conv_zoo: Path, tmp_path: Path, method: str) -> None:  # noqa: F811
    """Coefficients, tensors and figures, bit for bit; nothing is left behind and the model is as it was."""
    recipe = {**values(conv_zoo, model="tests.tiny:build_conv"), "learn": {"epochs": 2}}
    filed = ray_soup.learn(recipe, tmp_path / "out", method)
    model = tiny.build_conv()
    before = copy.deepcopy(model.state_dict())
    left = set(os.listdir(tempfile.gettempdir()))
    soup = ray_soup.mix_state_dicts(
        model, states(conv_zoo), loader(conv_zoo, "heldout"), method, select=0.25, test=loader(conv_zoo, "test"),
        learn={"epochs": 2}, precision="float32",
    )  # fmt: skip
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - left if name.startswith("ray_soup")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    expected = ray_soup.load_coefficients(filed.out / "coefficients.safetensors")
    np.testing.assert_array_equal(soup.coefficients.values, expected.values)
    assert all(torch.equal(t, soup.state_dict()[n]) for n, t in load_file(filed.out / "model.safetensors").items())
    assert {key: filed.rows[0][key] for key in soup.figures} == soup.figures
    assert soup.figures["test_accuracy"] > 0.8
    assert set(soup.notes) <= set(filed.notes)
    assert "BatchNorm layers were computed anew" in "".join(soup.notes) or len(soup.coefficients.used()) == 1
    model.load_state_dict(soup.state_dict())


def test_tied_tensors_half_numbers_and_a_select_of_its_own(zoo: Path) -> None:
    class Tied(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.key.weight = self.query.weight

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


def test_what_is_wrong_is_said(zoo: Path) -> None:
    good, data, model = states(zoo)[:2], list(loader(zoo, "heldout")), tiny.Tiny()
    with pytest.raises(RecipeError, match="batch is Tensor; expected"):
        ray_soup.mix_state_dicts(model, good, data[0])
    with pytest.raises(RecipeError, match="no batches"):
        ray_soup.mix_state_dicts(model, good, iter([]))
    with pytest.raises(RecipeError, match="takes no key 'actors'"):
        ray_soup.mix_state_dicts(model, good, data, actors={"gpus": 1})
    with pytest.raises(RecipeError, match=r"unknown key; did you mean 'learn\.epochs'"):
        ray_soup.mix_state_dicts(model, good, data, learn={"epoch": 1})
    with pytest.raises(IngredientError, match=r"missing: head\.bias"):
        ray_soup.mix_state_dicts(model, [good[0], {k: v for k, v in good[1].items() if k != "head.bias"}], data)
    with pytest.raises(IngredientError, match="State dict 0: extra is a str"):
        ray_soup.mix_state_dicts(model, [{**good[0], "extra": "x"}, good[1]], data)
    with pytest.raises(RecipeError, match="two ingredients or more"):
        ray_soup.mix_state_dicts(model, good[:1], data)


def test_the_example_runs() -> None:
    found = doctest.testmod(module)
    assert (found.attempted > 8, found.failed) == (True, 0)


@pytest.mark.usefixtures("cluster")
def test_the_commands_as_functions(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    monkeypatch.syspath_prepend(str(ROOT))
    keys = {**values(zoo), "ingredients": "zoo/*.safetensors", "data": {"fit": "heldout.npz"}}
    uniform = ray_soup.uniform(keys, tmp_path / "uniform", **{"data.test": "test.npz"})
    assert uniform.rows[0]["model_name"] == "uniform"
    assert "test_nll" in uniform.rows[0]
    learned = ray_soup.learn(ray_soup.Recipe(**values(zoo)), str(tmp_path / "mehl"), "mehl", learn={"epochs": 1})
    assert learned.record["steps"] == 8
    again = ray_soup.bake(learned.out, tmp_path / "again")
    assert (again.out / "model.safetensors").read_bytes() == (learned.out / "model.safetensors").read_bytes()
    with pytest.raises(ray_soup.SoupError, match="unknown key"):
        ray_soup.greedy(keys, tmp_path / "greedy", lear={"epochs": 1})


def test_the_import_is_light_and_every_name_is_there() -> None:
    """Nothing heavy comes with it, and no submodule hides a function."""
    heavy = "{'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)"
    code = f"import sys, ray_soup; assert not {heavy}; import ray_soup.search, ray_soup.compare; from ray_soup import *; "
    code += "print(all(callable(getattr(ray_soup, name)) for name in ray_soup.__all__), ray_soup.learn.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "ray_soup.soups"]
    with pytest.raises(AttributeError, match="has no attribute 'lern'"):
        ray_soup.lern  # noqa: B018
    assert set(ray_soup.__all__) <= set(dir(ray_soup))


def test_in_memory_takes_no_ray() -> None:
    code = (
        "import sys, doctest, ray_soup.state_dicts as m; assert not doctest.testmod(m).failed; print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
