"""A new head from class names, as fine-tuning gives it to a pretrained CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import make_recipe
from ray_soup.task.loading import load_model
from ray_soup.tune.probe import probe
from tests.unit.task.library_models import IMAGES, add_tiny_clip, assert_same, clip, clip_logits, write_epochs, zoo_of


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


@pytest.mark.slow
def test_a_head_of_class_names_gives_the_logits_of_the_whole_clip(tmp_path: Path) -> None:
    write_epochs(zoo_of(clip, clip_logits, 1), tmp_path)
    source, names = str(tmp_path / "run_0" / "epoch_2.pt"), tmp_path / "classes.txt"
    names.write_text("cat\ndog\ncow\n")
    templates = ["a photo of a {}.", "the {}"]
    tuned = {"pretrained": source, "class_names": str(names), "templates": templates}

    def probed(spec: str) -> torch.nn.Module:
        recipe = make_recipe({"model": spec, "data": {"train": "x.npz"}, "finetune": tuned})
        drain(probe(recipe, str(tmp_path / "init.safetensors")))
        return load_model(spec, str(tmp_path / "init.safetensors"))

    whole = load_model(f"open_clip:tiny-clip?zeroshot={names}&template={'|'.join(templates)}", source)
    with torch.inference_mode():
        assert_same(probed("open_clip:tiny-clip?classes=3&normalize=true")(IMAGES), whole(IMAGES))
    for spec, said in (
        ("open_clip:tiny-clip?classes=3", "needs image features of unit length"),
        ("open_clip:tiny-clip?classes=4&normalize=true", "names 3 classes; the model"),
    ):
        with pytest.raises(RecipeError, match=said):
            probed(spec)
