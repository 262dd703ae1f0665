"""What each user does: run scripts in a folder of their own, and `ray-soup compare` beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.recipe import Recipe, load_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.output import Soup
from tests.ray.own_loops import COUNT
from tests.system.command import call, write_recipe

QUICK = (
    "learn.batch_size=16", "learn.epochs=1", f"learn.model_batch={COUNT}", "actors.replicas=1", "actors.shards=1",
    "actors.cpus=1", "precision=float32",
)  # fmt: skip


def script(folder: Path, text: str) -> dict[str, Any]:
    """Run a script as `python script.py` does in this folder, but in this process, seeded; return its variables."""
    torch.manual_seed(0)
    np.random.seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(sys, "argv", ["script.py"])
        exec(compile(text, str(folder / "script.py"), "exec"), names)
    return names


def learned(folder: Path, recipe: dict[str, Any], out: str = "soup") -> dict[str, Any]:
    """Write a recipe and run `ray-soup learn` and `verify` beside it, in folder/out; the soup's row of results."""
    write_recipe(folder, recipe)
    commands(folder, ["learn", "r.yaml", out], ["verify", out])
    return json.loads((folder / out / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])


def commands(folder: Path, *lines: list[str]) -> None:
    """Run `ray-soup` in a folder, with success."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in lines:
            done = call(*line)
            assert done.exit_code == 0, done.output


def compared(folder: Path, recipe: str) -> tuple[Recipe, Soup]:
    """Write a recipe and run `ray-soup compare` and `verify` beside it, in folder/soup."""
    file = folder / "recipe.yaml"
    file.write_text(recipe)
    commands(folder, ["compare", "recipe.yaml", "soup", "--no-trained", *QUICK], ["verify", "soup"])
    made = load_recipe(file, QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return made, compare(made, folder / "soup", CompareOptions(trained=False))
