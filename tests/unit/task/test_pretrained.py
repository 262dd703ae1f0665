"""Pretrained weights for a model with a new head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.task.loading import load_model
from ray_soup.task.models import build
from ray_soup.task.pretrained import fill_zero_shot, load_pretrained
from tests.tiny import Tiny
from tests.unit.task.library_models import IMAGES, add_tiny_clip, assert_same, clip, clip_logits, vit, write_epochs, zoo_of


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


@pytest.mark.slow
def test_open_clip_weights_from_a_training_checkpoint(tmp_path: Path) -> None:
    zoo = zoo_of(clip, clip_logits, 1)
    write_epochs(zoo, tmp_path)
    spec = "open_clip:tiny-clip?classes=3"
    model = build(spec).model
    head = load_pretrained(model, spec, str(tmp_path / "run_0" / "epoch_2.pt"))
    assert head is model.head
    assert torch.equal(model.visual.conv1.weight, zoo[0].visual.conv1.weight)


@pytest.mark.slow
def test_a_bare_model_of_transformers_fills_all_but_the_head(tmp_path: Path) -> None:
    """The names in its file lack the prefix of the classifier's."""
    model = vit()
    model.vit.save_pretrained(tmp_path / "bare")
    spec = f"transformers:{tmp_path}/bare?classes=4"
    built = build(spec)
    head = load_pretrained(built.model, spec, str(tmp_path / "bare"))
    assert (head is built.model.classifier, head.out_features) == (True, 4)
    assert torch.equal(built.model.vit.layernorm.weight, model.vit.layernorm.weight)


def test_a_head_for_other_classes_is_new_and_other_tensors_are_ignored(tmp_path: Path) -> None:
    pretrained = Tiny().state_dict()
    del pretrained["head.weight"]
    pretrained["head.bias"] = torch.zeros(1000)  # another task's
    save_file({**pretrained, "text.tower": torch.zeros(3)}, tmp_path / "pretrained.safetensors")
    model = Tiny()
    assert load_pretrained(model, "tests.tiny:build", str(tmp_path / "pretrained.safetensors")) is model.head
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in pretrained.items() if not name.startswith("head."))


def test_weights_that_lack_nothing_or_more_than_a_head_are_refused(tmp_path: Path) -> None:
    state = Tiny().state_dict()
    save_file(state, tmp_path / "all.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(("head", "norm"))}, tmp_path / "few.safetensors")
    for name, said in (("all", "lacks nothing. Use it as finetune.init instead"), ("few", r"lacks 4 tensors: .*norm\.")):
        with pytest.raises(RecipeError, match=said):
            load_pretrained(Tiny(), "tests.tiny:build", str(tmp_path / f"{name}.safetensors"))


@pytest.mark.slow
def test_a_head_of_class_names_gives_the_logits_of_the_whole_clip(tmp_path: Path) -> None:
    write_epochs(zoo_of(clip, clip_logits, 1), tmp_path)
    source, names = str(tmp_path / "run_0" / "epoch_2.pt"), tmp_path / "classes.txt"
    names.write_text("cat\ndog\ncow\n")
    templates = ["a photo of a {}.", "the {}"]

    def with_head(spec: str) -> torch.nn.Module:
        model = build(spec).model.eval()
        fill_zero_shot(load_pretrained(model, spec, source), spec, source, str(names), templates)
        return model

    whole = load_model(f"open_clip:tiny-clip?zeroshot={names}&template={'|'.join(templates)}", source)
    with torch.inference_mode():
        assert_same(with_head("open_clip:tiny-clip?classes=3&normalize=true")(IMAGES), whole(IMAGES))
    for spec, said in (
        ("open_clip:tiny-clip?classes=3", "needs image features of unit length"),
        ("open_clip:tiny-clip?classes=4&normalize=true", "names 3 classes; the model"),
    ):
        with pytest.raises(RecipeError, match=said):
            with_head(spec)
