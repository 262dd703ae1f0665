"""State dicts that every process of FSDP saved by itself read as the tensors that they are shards of."""

from __future__ import annotations

import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import open_ingredient
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.run import run
from tests.distributed import run_processes
from tests.unit.io.test_distributed import Runs, check_ranges

MODEL = "tests.unit.io.test_rank_files:build"


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as verl saves them in two processes, and whole.pt, what they were: the last bias is cut into 1 and 0."""
    folder = tmp_path_factory.mktemp("ranks")
    run_processes(
        """
        from tests.unit.io.test_rank_files import build
        for k in range(2):
            torch.manual_seed(k)
            model = build()
            os.makedirs(f"run_{k}/actor", exist_ok=True)
            if rank == 0:
                torch.save(model.state_dict(), f"run_{k}/whole.pt")
            fully_shard(model, mesh=mesh)
            torch.save(model.state_dict(), f"run_{k}/actor/model_world_size_{world}_rank_{rank}.pt")
            torch.save({"lr": 0.1}, f"run_{k}/actor/optim_world_size_{world}_rank_{rank}.pt")
        """,
        folder,
    )
    return folder


@pytest.mark.slow
def test_every_range_equals_the_model_that_was_cut(saved: Path) -> None:
    for k in range(2):
        ingredient = open_ingredient(str(saved / f"run_{k}" / "actor"))
        whole = torch.load(saved / f"run_{k}" / "whole.pt")
        assert set(ingredient.tensors) == set(whole)
        assert len(ingredient.tensors["0.weight"].pieces) == 2
        assert len(ingredient.tensors["3.bias"].pieces) == 1
        check_ranges(ingredient, whole, random.Random(k))
        check_ranges(pickle.loads(pickle.dumps(ingredient)), whole, random.Random(k))


@pytest.mark.slow
def test_a_soup_of_them_is_the_mean_and_is_verified(saved: Path, tmp_path: Path) -> None:
    folders = [str(saved / f"run_{k}" / "actor") for k in range(2)]
    assert len(open_ingredients(str(saved / "run_*" / "actor"))) == 2
    recipe = make_recipe({"model": MODEL, "ingredients": folders, "method": "uniform"})
    run(recipe, tmp_path / "out")
    lines = verify(tmp_path / "out")
    assert any(
        "8 sampled tensors equal those computed from the ingredients as their own libraries" in line for line in lines
    )
    wholes = [torch.load(saved / f"run_{k}" / "whole.pt") for k in range(2)]
    soup = open_ingredient(str(tmp_path / "out"))
    for name in (n for n, t in wholes[0].items() if t.is_floating_point()):
        mean = sum(0.5 * whole[name].double() for whole in wholes).float()
        assert torch.equal(soup.read(name), mean.reshape(-1)), name


@pytest.mark.slow
def test_parts_that_are_missing_foreign_or_hostile_are_named(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(saved / "run_0" / "actor", folder)
    first, second = (folder / f"model_world_size_2_rank_{rank}.pt" for rank in range(2))
    with pytest.raises(
        IngredientError, match=r"rank_0\.pt is the part .* name the folder of all parts, .*Join the parts: python"
    ):
        open_ingredient(str(first))
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(IngredientError, match=r"expected those of all processes of one job, but rank 1 of 2 is missing"):
        open_ingredient(str(folder))
    second.write_bytes(first.read_bytes())  # the same shard twice
    with pytest.raises(IngredientError, match=r"are damaged: 0\.weight is \[7, 5\], but "):
        open_ingredient(str(folder))
    torch.save({"0.weight": torch.ones(7, 5)}, second)
    with pytest.raises(IngredientError, match=r"do not belong together: the tensor .* is only in one of them"):
        open_ingredient(str(folder))
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(IngredientError, match=r"rank_1\.pt is damaged"):
        open_ingredient(str(folder))
    torch.save({"0.weight": Runs()}, second)
    with pytest.raises(IngredientError, match=r"rank_1\.pt holds '\w+\.system'; .*Join the parts"):
        open_ingredient(str(folder))
    second.write_bytes(data)
    torch.save({}, folder / "model_world_size_4_rank_0.pt")
    with pytest.raises(IngredientError, match=r"but found world sizes \[2, 4\]"):
        open_ingredient(str(folder))


@pytest.mark.slow
def test_buffers_that_differ_between_processes_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "actor"
    shutil.copytree(saved / "run_0" / "actor", folder)
    file = folder / "model_world_size_2_rank_1.pt"
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            same = content == torch.ones(7).numpy().tobytes() and "/data/" in name  # running_var
            archive.writestr(name, torch.full((7,), 2.0).numpy().tobytes() if same else content)
    with pytest.raises(IngredientError, match=r"hold different values of 1\.\w+, which is not cut over the processes"):
        open_ingredient(str(folder))


@pytest.mark.slow
def test_steps_of_one_run_are_not_taken_for_several_runs(saved: Path, tmp_path: Path) -> None:
    for k in range(2):
        shutil.copytree(saved / f"run_{k}" / "actor", tmp_path / f"global_step_{k}" / "actor")
    with pytest.raises(RecipeError, match=r"Name the folders of the checkpoints, as in .*/actor"):
        open_ingredients(str(tmp_path))
