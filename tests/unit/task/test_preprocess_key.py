"""The recipe key `preprocess`: it makes each library's own transform, and is compared with what files say."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.mixing.blocks import layout_of
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.task.models import build, describe, fingerprint
from ray_soup.task.preprocess_key import build_for, describe_for, model_of
from ray_soup.task.preprocessing import Examined, examine, preprocessing_of, with_cut
from tests.unit.task.library_models import add_tiny_clip
from tests.unit.task.test_evidence import ARRAYS, IMAGES, TIMM, TORCHVISION, used, write

TIMM_RESNET, TORCHVISION_RESNET = "timm:test_resnet?classes=3", "torchvision:resnet18?classes=3"
CLIP = "open_clip:tiny-clip?classes=3"
OWN = "tests.tiny:build"
WHOLE = {"size": 48, "mean": [0.3, 0.4, 0.5], "std": 0.25, "crop_pct": 0.9, "interpolation": "bilinear"}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 130, 3), dtype=np.uint8))


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


def recipe_of(model: str, preprocess: Any = None, data: dict[str, str] = IMAGES) -> Recipe:
    return make_recipe({"model": model, "ingredients": "*", "data": data, "preprocess": preprocess})


def examined(recipe: Recipe, *paths: str) -> Examined:
    return examine(recipe, [open_ingredient(path) for path in paths])


def silent(folder: Path, count: int = 2) -> Sequence[str]:
    """Files that say nothing about preprocessing."""
    return [write(folder / f"{n}.pt", {"lr": 0.1}) for n in range(count)]


def apply(preprocess: Any) -> torch.Tensor:
    found = preprocess(NOISE)
    assert isinstance(found, torch.Tensor)
    return found


# The mapping is the library's own transform


def transforms_of_libraries() -> dict[str, tuple[str, dict[str, Any], Any]]:
    """Model, mapping, and the transform as users of the library make it."""
    import open_clip
    import timm
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    values = {"mean": (0.3, 0.4, 0.5), "std": (0.25,) * 3}
    given = {"img_size": 48, "crop_pct": 0.9, "interpolation": "bilinear", **values}
    defaults = timm.get_pretrained_cfg("test_resnet").to_dict()
    of_timm = timm.data.create_transform(**timm.data.resolve_data_config(given, pretrained_cfg=defaults))
    partly = timm.data.create_transform(
        **timm.data.resolve_data_config({"input_size": (3, 64, 48)}, pretrained_cfg=defaults)
    )
    gray = {**given, "in_chans": 1, "mean": (0.3,), "std": (0.25,)}
    of_gray = timm.data.create_transform(**timm.data.resolve_data_config(gray, pretrained_cfg=defaults))
    nearest = InterpolationMode.NEAREST
    of_preset = ImageClassification(crop_size=48, resize_size=53, interpolation=nearest, **values)
    ratio = ImageClassification(crop_size=64, resize_size=73)
    of_clip = open_clip.image_transform(16, is_train=False, interpolation="bilinear", resize_mode="shortest", **values)
    small = {key: value for key, value in WHOLE.items() if key != "crop_pct"}
    return {
        "timm": (TIMM_RESNET, WHOLE, of_timm),
        "timm, height and width": (TIMM_RESNET, {"size": [64, 48]}, partly),
        "timm, one channel": (
            TIMM_RESNET, {**WHOLE, "channels": 1, "mean": 0.3}, lambda image: of_gray(image.convert("L"))
        ),
        "torchvision": (TORCHVISION_RESNET, {**WHOLE, "interpolation": "nearest"}, of_preset),
        "torchvision, size alone": (TORCHVISION_RESNET, {"size": 64}, ratio),
        "open_clip": (CLIP, {**small, "size": 16}, of_clip),
        "own model": (OWN, WHOLE, timm.data.create_transform((3, 48, 48), crop_pct=0.9, interpolation="bilinear", **values)),
    }  # fmt: skip


KINDS = ("timm", "timm, height and width", "timm, one channel", "torchvision", "torchvision, size alone", "open_clip",
         "own model")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_is_the_librarys_own_transform(kind: str) -> None:
    model, mapping, expected = transforms_of_libraries()[kind]
    built = build_for(recipe_of(model, mapping))
    assert torch.equal(apply(built.preprocess), apply(expected))
    assert describe_for(recipe_of(model, mapping))[0] == layout_of(built.model)


def test_the_model_is_built_for_the_size_and_the_channels() -> None:
    for model, mapping, name, size in (
        ("timm:test_vit?classes=3", {"size": 96}, "pos_embed", 37),
        ("open_clip:tiny-clip?classes=3", {"size": 32}, "visual.positional_embedding", 17),
    ):
        recipe = recipe_of(model, mapping)
        shapes = describe_for(recipe)[0].state_shapes
        assert shapes == describe(model_of(recipe)).state_shapes
        assert size in shapes[name]
    gray = describe_for(recipe_of(TIMM_RESNET, {"channels": 1, "mean": 0.5, "std": 0.5}))[0].state_shapes
    assert any(len(shape) == 4 and shape[1] == 1 for shape in gray.values())


@pytest.mark.parametrize("model", [TIMM_RESNET, TORCHVISION_RESNET, CLIP, f"{CLIP}&image_size=32", OWN])
def test_a_recipe_without_the_key_is_the_same_model_for_caches(model: str) -> None:
    recipe = recipe_of(model)
    assert model_of(recipe) == model
    assert fingerprint(model_of(recipe), build_for(recipe)) == fingerprint(model, build(model))


FUNCTIONS = """
import numpy as np

def halves(image):
    return np.asarray(image.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1) / 2

def thirds(image):
    return np.asarray(image.resize((4, 4)), dtype=np.float32).transpose(2, 0, 1) / 3

def two(image, size):
    return image
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_functions_of_images.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_functions_of_images", raising=False)
    return "own_functions_of_images"


@pytest.mark.parametrize("model", [TIMM_RESNET, OWN])
def test_a_function_replaces_the_preprocessing_of_any_model(model: str, own: str) -> None:
    recipe, other = recipe_of(model, f"{own}:halves"), recipe_of(model, f"{own}:thirds")
    built, others = build_for(recipe), build_for(other)
    assert built.preprocess is not None
    found = built.preprocess(NOISE)
    assert found.shape == (3, 4, 4)
    assert np.array_equal(found * 2, others.preprocess(NOISE) * 3)  # type: ignore[misc]
    assert len({fingerprint(model, b) for b in (build(model), built, others)}) == 3
    assert examined(recipe).preprocessing == {"function": f"{own}:halves", "source": "recipe"}


@pytest.mark.parametrize(
    ("model", "preprocess", "said"),
    [
        (f"{TIMM_RESNET}&img_size=48", {"size": 64}, r"\{size: 64\} means img_size=64, and `model:` has img_size=48\."),
        (f"{TORCHVISION_RESNET}&resize_size=48", {"size": 48, "crop_pct": 0.5}, "means resize_size=96, and"),
        (f"{TIMM_RESNET}&mean=0.5", "{own}:halves", "mean in `model: .*` has no effect"),
        (f"{TIMM_RESNET}&img_size=48", "{own}:halves", "img_size in `model: .*` has no effect"),
        (TORCHVISION_RESNET, {"size": [48, 64]}, "which torchvision cannot do: its transform cuts squares"),
        (TORCHVISION_RESNET, {"channels": 1}, "its models take images of three channels"),
        (CLIP, {"crop_pct": 0.9}, r"found crop_pct: 0\.9, which open_clip cannot do"),
        (CLIP, {"interpolation": "nearest"}, "found interpolation: nearest, which open_clip cannot do"),
        (OWN, {"size": 8, "std": 1}, r"mean is missing, and tests\.tiny:build has no defaults"),
        (OWN, "{own}:fourths", "has no 'fourths'"),
        (OWN, "{own}:two", r"has the signature \(image, size\), and is called with 1 arguments"),
    ],
)
def test_what_contradicts_the_model_or_cannot_be_done_is_refused(model: str, preprocess: Any, said: str, own: str) -> None:
    named = preprocess.replace("{own}", own) if isinstance(preprocess, str) else preprocess
    with pytest.raises(RecipeError, match=f"^preprocess: .*{said}"):
        examined(recipe_of(model, named))


def test_a_size_that_the_model_is_built_for_may_stand_beside_a_function(own: str) -> None:
    shapes = describe_for(recipe_of("timm:test_vit?classes=3&img_size=96", f"{own}:halves"))[0].state_shapes
    assert 37 in shapes["pos_embed"]


def test_equal_values_may_be_stated_twice() -> None:
    recipe = recipe_of(f"{TIMM_RESNET}&img_size=48&mean=0.5", {"size": [48, 48], "mean": [0.5, 0.5, 0.5]})
    assert model_of(recipe) == recipe.model


@pytest.mark.parametrize("preprocess", [{"mean": 0.5}, {"size": 48, "crop_pct": 1}, "tests.unit.task.images:as_tensor"])
def test_a_key_without_an_effect_on_arrays_is_refused(preprocess: Any) -> None:
    with pytest.raises(RecipeError, match="would have no effect, because all data of the recipe are arrays"):
        examined(recipe_of(TIMM_RESNET, preprocess, ARRAYS))
    assert examined(recipe_of(TIMM_RESNET, {"channels": 1, "size": 48}, ARRAYS)).notes == []  # which change the model


def test_models_of_transformers_take_a_function_for_images_or_a_mapping_without_a_file(tmp_path: Path, own: str) -> None:
    from transformers import ViTImageProcessor

    from tests.unit.task.library_models import bert, tokenizer, vit

    vit().save_pretrained(tmp_path / "images")
    bert().save_pretrained(tmp_path / "texts")
    tokenizer(tmp_path / "texts").save_pretrained(tmp_path / "texts")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "images")
    built = build_for(recipe_of(f"transformers:{tmp_path}/images", f"{own}:halves"))
    assert built.preprocess is not None
    assert built.preprocess(NOISE).shape == (3, 4, 4)
    with pytest.raises(RecipeError, match=r"as the preprocessor_config\.json in its folder says"):
        build_for(recipe_of(f"transformers:{tmp_path}/images", {"size": 16}))
    (tmp_path / "images" / "preprocessor_config.json").unlink()
    mapping = {"size": 16, "mean": 0.5, "std": 0.25}
    recipe = recipe_of(f"transformers:{tmp_path}/images", mapping)
    assert torch.equal(apply(build_for(recipe).preprocess), apply(build_for(recipe_of(OWN, mapping)).preprocess))
    (path,) = silent(tmp_path / "zoo", 1)
    assert examined(recipe, path).preprocessing == {
        "size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 1.0, "interpolation": "bilinear",
        "source": "recipe",
    }  # fmt: skip
    (tmp_path / "zoo" / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6]}')
    with pytest.raises(RecipeError, match=r"0\.pt was trained with mean 0\.4,0\.5,0\.6 \(preprocessor_config\.json\)"):
        examined(recipe, path)
    with pytest.raises(RecipeError, match=r"it is for images, and transformers:.* takes texts"):
        build_for(recipe_of(f"transformers:{tmp_path}/texts", f"{own}:halves"))


# Compared with files


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (TIMM_RESNET, {**TIMM, "img_size": 64, "crop_pct": 0.8, "mean": [0.5, 0.4, 0.3], "std": [0.5]}),
        (TORCHVISION_RESNET, {**TORCHVISION, "val_crop_size": 64, "val_resize_size": 71}),
        (TORCHVISION_RESNET, {"img_size": 64, "mean": [0.5, 0.4, 0.3]}),
        (OWN, {"img_size": 64, "mean": [0.5, 0.4, 0.3]}),
    ],
)
def test_a_contradiction_is_refused_with_the_line_to_write(tmp_path: Path, model: str, args: dict[str, Any]) -> None:
    """The line is accepted, and preprocesses as the options of the model that the files ask for."""
    path = write(tmp_path / "a.pth", argparse.Namespace(**args))
    mapping: dict[str, Any] = WHOLE
    for _ in range(2):  # one value at a time, or all at once
        with pytest.raises(RecipeError, match=r"a\.pth was trained with .* `preprocess`, .* is used") as caught:
            examined(recipe_of(model, mapping), path)
        mapping = yaml.safe_load(str(caught.value).partition("preprocess: ")[2].partition("\n")[0])
        if mapping.get("size") == 64 and (mapping["mean"] == args.get("mean", mapping["mean"])):
            break
    examined(recipe_of(model, mapping), path)
    if model != OWN and "lr" in args:
        expected = apply(build(used(model, [path])).preprocess)
        assert torch.equal(apply(build_for(recipe_of(model, mapping)).preprocess), expected)


def test_options_of_the_model_still_overrule_files_on_purpose(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "img_size": 64})
    (note,) = examined(recipe_of(f"{TIMM_RESNET}&img_size=96", {"size": 96}), path).notes
    assert "was trained with img_size 64 (its args); the recipe states 96, which is used." in note


def test_a_function_decides_against_files_about_preprocessing_only(tmp_path: Path, own: str) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "img_size": 64, "mean": [0.1] * 3})
    assert examined(recipe_of(TIMM_RESNET, f"{own}:halves"), path).notes == []
    pooled = write(tmp_path / "b.pth.tar", {**TIMM, "gp": "max"})
    assert examined(recipe_of(TIMM_RESNET, f"{own}:halves"), pooled).adopted == {"global_pool": "max"}


# Where nothing is said


@pytest.mark.parametrize("model", [TIMM_RESNET, TORCHVISION_RESNET, CLIP])
def test_one_note_says_what_the_library_does_by_default(tmp_path: Path, model: str) -> None:
    found = examined(recipe_of(model), *silent(tmp_path, 3))
    assert found.preprocessing["source"] == "default"
    (note,) = found.notes
    library = model.partition(":")[0]
    assert note.startswith(f"{tmp_path}/0.pt and 2 more do not say how images were preprocessed in the training, nor does")
    assert f"are used, as {library} does by default" in note
    mapping = yaml.safe_load(note.partition("preprocess: ")[2])
    stated = examined(recipe_of(model, mapping), *silent(tmp_path))
    assert stated.notes == []
    assert stated.preprocessing == {**found.preprocessing, "source": "recipe"}
    assert torch.equal(apply(build_for(recipe_of(model, mapping)).preprocess), apply(build(model).preprocess))
    assert examined(recipe_of(model, data=ARRAYS), *silent(tmp_path)).notes == []


def test_a_note_lists_what_only_the_default_decides(tmp_path: Path) -> None:
    (note,) = examined(recipe_of(f"{TIMM_RESNET}&img_size=48&crop_pct=1&std=0.5"), *silent(tmp_path, 1)).notes
    assert note.startswith(f"{tmp_path}/0.pt does not say mean, interpolation, nor does the recipe: mean 0.5,0.5,0.5,")
    (note,) = examined(recipe_of(TORCHVISION_RESNET, {"size": 64, "mean": 0.5, "std": 0.5}), *silent(tmp_path)).notes
    assert "do not say resize_size, interpolation, nor does the recipe: resize_size 73, interpolation bilinear are" in note


def test_files_that_say_everything_need_no_note(tmp_path: Path) -> None:
    for model, args in ((TIMM_RESNET, TIMM), (TORCHVISION_RESNET, TORCHVISION)):
        found = examined(recipe_of(model), write(tmp_path / "a.pth", argparse.Namespace(**args)))
        assert (found.notes, found.preprocessing["source"]) == ([], "files")


# The record


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_says_what_the_transform_does(kind: str) -> None:
    """Also for the checkpoints of `finetune` and for soups, beside which it is: it is taken as evidence."""
    model, mapping, expected = transforms_of_libraries()[kind]
    record = preprocessing_of(recipe_of(model, mapping))
    shape = apply(expected).shape
    size = record["size"] if isinstance(record["size"], list) else [record["size"]] * 2
    assert (record["channels"], *size) == tuple(shape)
    assert len(record["mean"]) == len(record["std"]) == shape[0]
    if mapping is WHOLE:
        assert record == {
            "size": 48, "channels": 3, "mean": [0.3, 0.4, 0.5], "std": [0.25] * 3, "crop": 0.9, "interpolation": "bilinear",
            "source": "recipe",
        }  # fmt: skip
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "own model"])
@pytest.mark.parametrize("name", ["run.json", "preprocessing.json"])
def test_a_record_beside_a_checkpoint_is_evidence(tmp_path: Path, kind: str, name: str) -> None:
    model, mapping, expected = transforms_of_libraries()[kind]
    (path,) = silent(tmp_path, 1)
    record = preprocessing_of(recipe_of(model, mapping))
    (tmp_path / name).write_text(json.dumps({"preprocessing": record, "method": "uniform", "mean": [9, 9, 9]}))
    assert examined(recipe_of(model, mapping), path).notes == []
    found = examined(recipe_of(model), path)
    assert re.search(rf"was trained with .* \({name}\); the recipe states nothing", found.notes[0])
    assert set(found.preprocessing.pop("files").values()) == {name}
    assert found.preprocessing == {**record, "source": "files"}
    line = used(model, [path])
    assert torch.equal(apply(build(line).preprocess), apply(expected))
    assert examined(recipe_of(line), path).notes == []


@pytest.mark.parametrize("model", [TIMM_RESNET, "transformers"])
def test_a_soup_that_a_function_preprocessed_the_images_for_needs_it_again(tmp_path: Path, model: str, own: str) -> None:
    if model == "transformers":
        from tests.unit.task.library_models import vit

        vit().save_pretrained(tmp_path / "images")
        model = f"transformers:{tmp_path}/images"
    (path,) = silent(tmp_path / "soup", 1)
    recipe = recipe_of(model, f"{own}:halves")
    (tmp_path / "soup" / "run.json").write_text(json.dumps({"preprocessing": preprocessing_of(recipe)}))
    assert examined(recipe, path).notes == []
    with pytest.raises(RecipeError, match=rf"by the function {own}:halves \(run\.json\)") as caught:
        examined(recipe_of(model), path)
    assert f"\n    preprocess: {own}:halves\n" in str(caught.value)
    (note,) = examined(recipe_of(model, f"{own}:thirds"), path).notes
    assert "the recipe states another preprocessing, which is used" in note


def test_a_record_of_another_program_is_no_evidence(tmp_path: Path) -> None:
    (path,) = silent(tmp_path, 1)
    for content in ('{"preprocessing": "imagenet"}', '{"preprocessing": {"size": "big", "crop": []}}', "[]", "{"):
        (tmp_path / "run.json").write_text(content)
        assert examined(recipe_of(TIMM_RESNET), path).preprocessing["source"] == "default"


def test_records_of_functions_texts_and_arrays(tmp_path: Path) -> None:
    from tests.unit.task.library_models import bert, tokenizer, vit

    assert examined(recipe_of(OWN)).preprocessing == {"model": OWN, "source": "recipe"}
    assert examined(recipe_of(OWN, data=ARRAYS)).preprocessing == {"source": "none"}
    assert preprocessing_of(recipe_of(OWN, data=ARRAYS)) == preprocessing_of(recipe_of(TIMM_RESNET, data=ARRAYS)) == {}
    record = preprocessing_of(recipe_of(f"{TIMM_RESNET}&act_layer=gelu&mean=0.5", data=ARRAYS))
    assert record == {"library": "timm", "options": {"act_layer": "gelu"}, "source": "none"}
    (path,) = silent(tmp_path / "zoo", 1)
    (tmp_path / "zoo" / "preprocessing.json").write_text(json.dumps({"preprocessing": record}))
    assert used(TIMM_RESNET, [path], ARRAYS) == f"{TIMM_RESNET}&act_layer=gelu"
    bert().save_pretrained(tmp_path / "texts")
    tokenizer(tmp_path / "texts").save_pretrained(tmp_path / "texts")
    spec = f"transformers:{tmp_path}/texts"
    assert preprocessing_of(recipe_of(spec)) == {"length": 16, "source": "files"}
    assert preprocessing_of(recipe_of(f"{spec}?length=5")) == {"length": 5, "source": "recipe"}
    assert with_cut({"length": 5}, {"test": 1 / 3}) == {"length": 5, "cut": {"test": 0.333333}}
    from transformers import ViTImageProcessor

    vit().save_pretrained(tmp_path / "images")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "images")
    assert preprocessing_of(recipe_of(f"transformers:{tmp_path}/images")) == {
        "size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "interpolation": "bilinear", "source": "files",
    }  # fmt: skip


# Auxiliary classifiers of torchvision


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_files_without_auxiliary_classifiers_say_what_to_write(tmp_path: Path, name: str) -> None:
    import torchvision

    def make(aux: bool, transform: bool) -> Any:
        return torchvision.models.get_model(
            name, weights=None, num_classes=3, aux_logits=aux, transform_input=transform, init_weights=False
        )

    spec = f"torchvision:{name}?classes=3"
    models = {"with": make(True, False).eval(), "without": make(False, True).eval()}
    for kind, model in models.items():
        torch.save({"model": model.state_dict()}, tmp_path / f"{kind}.pth")
    paths = {kind: str(tmp_path / f"{kind}.pth") for kind in models}
    examined(recipe_of(spec), paths["with"])
    note, _ = examined(recipe_of(spec), paths["without"]).notes
    assert "without.pth was trained with aux_logits false (its tensors); the recipe states nothing" in note
    line = used(spec, [paths["without"]])
    assert line == f"{spec}&aux_logits=false"
    assert "transform_input false" in "".join(examined(recipe_of(line), paths["without"]).notes)
    with pytest.raises(RecipeError, match=r"with\.pth was trained with aux_logits true"):
        examined(recipe_of(line, data=ARRAYS), paths["with"])
    with torch.device("meta"):  # drawing its parameters takes seconds
        ours = build(f"{line}&transform_input=true").model.eval()
    ours.load_state_dict(models["without"].state_dict(), assign=True)
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(ours(images), models["without"](images))
