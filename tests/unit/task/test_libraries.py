"""Models that recipes name, as each library builds them."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.mixing.blocks import layout_of
from ray_soup.recipe import load_recipe
from ray_soup.task.companions import loading_lines
from ray_soup.task.libraries import structure
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import build, describe, fingerprint
from tests.unit.task.library_models import IMAGES, TEXTS, add_tiny_clip, bert, tokenizer, vit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


def test_a_model_spec_has_four_parts() -> None:
    spec = ModelSpec.parse("open_clip:ViT-B-32?zeroshot=a b.txt&template=a photo of a {}.")
    assert (spec.library, spec.name) == ("open_clip", "ViT-B-32")
    assert spec.options == {"zeroshot": "a b.txt", "template": "a photo of a {}."}
    assert ModelSpec.parse("timm:x?classes=").options == {"classes": ""}


@pytest.mark.parametrize("spec", ["open_clip:tiny-clip?classes=3", "timm:test_vit?classes=3",
                                  "torchvision:squeezenet1_1?classes=3", "torchvision:inception_v3?classes=3"])  # fmt: skip
def test_a_description_is_the_layout_and_a_fingerprint_is_the_same_in_every_process(spec: str) -> None:
    built = build(spec)
    assert describe(spec) == layout_of(built.model)
    assert " at 0x" not in repr(built.preprocess)
    assert fingerprint(spec, built) == fingerprint(spec, build(spec))
    image = Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8))
    assert built.preprocess is not None
    assert built.preprocess(image).dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:test_vitt?classes=3", "timm has no 'test_vitt'; did you mean test_vit"),
        ("timm:test_resnet.x?classes=3", r"timm has no pretrained weights 'x' for test_resnet; it has r160_in1k\."),
        ("torchvision:resnet5?classes=3", "torchvision has no 'resnet5'; did you mean resnet50 or resnet"),
        ("torchvision:fcn_resnet5?classes=3", "torchvision has no 'fcn_resnet5'; did you mean fcn_resnet50"),
        ("open_clip:ViT-B-23?classes=3", "open_clip has no 'ViT-B-23'; did you mean ViT-B-32"),
        ("timm:qqqqqqqq?classes=3", "timm has no 'qqqqqqqq'; choose one of its [0-9]+ models, such as "),
        ("open_clip:tiny-clip", "expected a positive integer for the option 'classes'. Write it as in open_clip:tiny-clip"),
        ("timm:test_vit?classes=x", "expected a positive integer for the option 'classes'. Write it as in timm:test_vit"),
        ("timm:test_vit?class=3", "has the unknown option 'class'; did you mean classes"),
        ("open_clip:tiny-clip?classes=3&normalize=1", "expected normalize=true or normalize=false"),
        ("transformers:tests", "tests has no config.json that transformers can read"),
        ("keras:x?classes=3", "expected open_clip:, timm: or torchvision:NAME"),
        ("tests.tiny:digits", r"tests.tiny:digits returned tuple \(ndarray, ndarray\); expected a model, or"),
    ],
)
def test_an_unknown_model_or_option_is_refused(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(spec)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        ("timm:test_resnet?classes=3&act_layer=gelu&drop_rate=0.25", {"act_layer": "gelu", "drop_rate": 0.25}),
        ("timm:test_vit?classes=3&qkv_bias=false&init_values=1e-05", {"qkv_bias": False, "init_values": 1e-5}),
        ("torchvision:mobilenet_v3_small?classes=3&dropout=0.5", {"dropout": 0.5}),
        ("torchvision:mobilenet_v3_small?classes=3&width_mult=0.5", {"width_mult": 0.5}),
        ("torchvision:resnet50?classes=3&width_per_group=32", {"width_per_group": 32}),
    ],
)
def test_other_options_are_arguments_of_the_librarys_constructor(spec: str, arguments: dict[str, Any]) -> None:
    import timm
    import torchvision

    parsed = ModelSpec.parse(spec)
    make = timm.create_model if parsed.library == "timm" else torchvision.models.get_model
    with torch.device("meta"):
        ours, theirs, plain = (
            build(spec).model,
            make(parsed.name, num_classes=3, **arguments),
            make(parsed.name, num_classes=3),
        )
    vars(ours).pop("own_loader", None)  # the text of the spec, for names that the library's own loader knows
    assert structure(ours) == structure(theirs) != structure(plain)
    assert all(f"{name}={value!r}" in loading_lines(spec, ["model.safetensors"]) for name, value in arguments.items())


def test_other_options_of_open_clip_reach_its_constructor() -> None:
    assert "QuickGELU" in repr(build("open_clip:tiny-clip?classes=3&quick_gelu=true").model)
    assert "QuickGELU" in repr(build("open_clip:tiny-clip?classes=3&force_quick_gelu=true").model)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:test_resnet?classes=3&act_layers=gelu", "'act_layers', which test_resnet does not take; did you mean act"),
        ("timm:test_resnet?classes=3&img_sise=48", "'img_sise', which test_resnet does not take; did you mean img_size"),
        ("timm:test_resnet?classes=3&qqqqqq=1", "which test_resnet does not take; options with a meaning of their own: c"),
        ("timm:test_resnet?classes=3&act_layer=geluu", "timm cannot create 'timm:test_resnet?classes=3&act_layer=geluu'"),
        ("timm:test_resnet?classes=3&pretrained=true", "the option 'pretrained', which a recipe cannot set: the weights c"),
        ("timm:test_resnet?classes=3&checkpoint_path=a.pt", "the option 'checkpoint_path', which a recipe cannot set"),
        ("torchvision:resnet18?classes=3&weights=DEFAULT", "the option 'weights', which a recipe cannot set"),
        ("timm:test_vit?classes=3&qkv_bias=False", "expected true, false, a number or a text for the option 'qkv_bias'"),
        ("torchvision:resnet18?classes=3&zero_init_residual=no", "expected true, false, a number or a text for the option"),
        ("torchvision:resnet18?classes=3&zero_init=true", "which resnet18 does not take; did you mean zero_init_residual?"),
        ("torchvision:mobilenet_v3_small?classes=3&dropouts=0.5", "does not take; did you mean dropout?"),
        ("open_clip:tiny-clip?classes=3&quick_gellu=true", "'quick_gellu', which tiny-clip does not take; did you mean "),
        ("open_clip:tiny-clip?classes=3&pretrained_image=true", "the option 'pretrained_image', which a recipe cannot set"),
    ],
)  # fmt: skip
def test_an_option_that_the_constructor_does_not_take_is_refused(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        build(spec)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"pip install 'ray_soup\[timm\]'"):
        build("timm:test_vit?classes=3")


def test_a_model_that_is_not_a_classifier_is_refused(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config

    Wav2Vec2Config(architectures=["Wav2Vec2ForCTC"]).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is Wav2Vec2ForCTC; expected a model for image classification"):
        build(f"transformers:{tmp_path}")


def test_a_folder_is_loaded_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    for model in (vit(), bert()):
        model.save_pretrained(tmp_path / "m")
        assert build(f"transformers:{tmp_path}/m").preprocess is None


def test_a_zero_shot_model_takes_class_names_and_templates(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n\ncow\n")
    spec = f"open_clip:tiny-clip?zeroshot={tmp_path}/classes.txt"
    one, two = build(spec), build(f"{spec}&template=a {{}}.|the {{}}.")
    with torch.inference_mode():
        assert two.model.eval()(IMAGES).shape == (4, 3)
    two.model.load_state_dict(one.model.state_dict())
    assert fingerprint(spec, one) != fingerprint(spec, two)  # the prompts are part of the model
    (tmp_path / "recipe.yaml").write_text("model: open_clip:tiny-clip?zeroshot=classes.txt\n")
    assert load_recipe(tmp_path / "recipe.yaml").model == spec
    for wrong, said in ((f"{spec}&template=a cat", "templates with {}"), (f"{spec}x", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            build(wrong)


def test_an_image_classifier_of_transformers_takes_pixels_of_its_processor(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    vit().save_pretrained(tmp_path / "run_0")
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path / "run_0")
    spec = f"transformers:{tmp_path}/run_0"
    built = build(spec)
    image = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3))
    assert built.preprocess is not None
    assert torch.equal(built.preprocess(image), processor(image, return_tensors="pt")["pixel_values"][0])
    assert layout_of(built.model).state_shapes == layout_of(vit()).state_shapes
    assert build(f"{spec}?classes=7").model(IMAGES).shape == (4, 7)
    (tmp_path / "recipe.yaml").write_text("model: transformers:run_0\n")
    assert load_recipe(tmp_path / "recipe.yaml").model == spec


def test_a_text_classifier_of_transformers_takes_token_ids_and_a_mask(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    words = tokenizer(tmp_path)
    words.save_pretrained(tmp_path)
    spec = f"transformers:{tmp_path}"
    built = build(spec)
    assert built.preprocess is not None
    batch = torch.stack([built.preprocess(text) for text in TEXTS])
    assert (batch.shape, batch.dtype) == ((4, 2, 16), torch.int64)
    inputs = words(TEXTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(batch, torch.stack([inputs["input_ids"], inputs["attention_mask"]], dim=1))
    shorter = build(f"{spec}?length=5")
    assert shorter.preprocess is not None
    assert shorter.preprocess(TEXTS[0]).shape == (2, 5)
    assert fingerprint(spec, built) == fingerprint(spec, build(spec)) != fingerprint(spec, shorter)
    with pytest.raises(RecipeError, match="length is 99; the model takes at most 16 tokens"):
        build(f"{spec}?length=99")
