"""The command in this process, and zoos to break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from ray_soup.cli import main


def call(*arguments: str | Path) -> Result:
    """Run `ray-soup` in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def change_ingredient(folder: Path, k: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply `change` to the state dict of zoo/model_k in `folder`."""
    path = folder / "zoo" / f"model_{k}.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
