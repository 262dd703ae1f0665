"""Folders of images and masks for segmentation, and torchvision's models for it by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models, tv_tensors
from torchvision.transforms import v2

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.progress import drain
from ray_soup.recipe import Data, make_recipe
from ray_soup.task.architectures import fitted, similar
from ray_soup.task.companions import loading_lines
from ray_soup.task.data import Examples, load_named
from ray_soup.task.models import build, objective_in
from ray_soup.task.preprocess_key import build_for
from ray_soup.task.preprocessing import examine
from ray_soup.task.sources import check_sources, count_examples

SPEC = "torchvision:lraspp_mobilenet_v3_large?classes=4"
RANDOM = np.random.default_rng(0)
NAMES = ("b", "a", "more/c")


def write(folder: Path, size: tuple[int, int] = (30, 20)) -> Path:
    """Three images, as JPEG and PNG, with masks of all modes; `size` is width and height."""
    for number, name in enumerate(NAMES):
        pixels = RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        classes = RANDOM.integers(0, 4, (size[1], size[0]), dtype=np.uint8)
        classes[0] = 255
        for top in ("images", "masks"):
            (folder / top / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / f"{name}{('.jpg', '.png', '.PNG')[number]}")
        mask = Image.fromarray(classes)
        if number == 1:
            mask.putpalette([value % 256 for value in range(768)])  # as PASCAL VOC has them
        (Image.fromarray(classes > 1) if number == 2 else mask).save(folder / "masks" / f"{name}.png")
    return folder


def load(folder: Path, preprocess: Any) -> Examples:
    return drain(load_named(Data(test=str(folder)), "test", preprocess, "pixels"))


@pytest.mark.parametrize("option", ["resize_size=16", "resize_size=12,24", "mean=0.5&std=0.25&interpolation=nearest"])
def test_images_and_masks_are_those_of_the_library(tmp_path: Path, option: str) -> None:
    """Transformed together, as its training script does; images alone as the preset of its weights does."""
    write(tmp_path)
    built = build(f"{SPEC}&{option}")
    assert built.objective == "segmentation"
    examples = load(tmp_path, built.preprocess)
    images, targets = examples.batch(np.arange(3), torch.device("cpu"))
    preset = models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT.transforms()
    if option == "resize_size=16":
        preset.resize_size = [16]
    for row, name in enumerate(("a", "b", "more/c")):
        image = Image.open(next((tmp_path / "images").glob(f"{name}.*"))).convert("RGB")
        mask = tv_tensors.Mask(torch.from_numpy(np.array(Image.open(tmp_path / "masks" / f"{name}.png")).astype(np.uint8)))
        own, theirs = built.preprocess(image, mask)
        assert torch.equal(images[row], own)
        assert torch.equal(targets[row], torch.where(theirs == 255, -100, theirs.long()))
        if option == "resize_size=16":
            torch.testing.assert_close(images[row], preset(image), rtol=1e-6, atol=1e-6)  # it divides by 255
    sizes = {"resize_size=16": (16, 24), "resize_size=12,24": (12, 24)}
    assert images.shape[-2:] == targets.shape[-2:] == sizes.get(option, (520, 780))
    assert targets.dtype == torch.int64
    assert {*targets.unique().tolist()} == {-100, 0, 1, 2, 3}
    check_sources(Data(test=str(tmp_path)), "pixels")
    assert count_examples(Data(test=str(tmp_path)), "pixels") == {"test": 3}


@pytest.mark.parametrize("stored", ["bytes", "structs", "paths"])
def test_masks_in_a_table_are_those_of_the_folder(tmp_path: Path, stored: str) -> None:
    """As segmentation data on the Hugging Face Hub have them, with a column of numbers that is no target."""
    preprocess = build(f"{SPEC}&resize_size=16").preprocess
    expected = load(write(tmp_path), preprocess)
    files = {top: [next((tmp_path / top).glob(f"{name}.*")) for name in ("a", "b", "more/c")] for top in ("images", "masks")}

    def value(file: Path) -> Any:
        if stored == "bytes":
            return file.read_bytes()
        return {"bytes": None if stored == "paths" else file.read_bytes(), "path": str(file.relative_to(tmp_path))}

    images, masks = ([value(file) for file in found] for found in files.values())
    table = pa.table({"scene": [0, 1, 2], "annotation": masks, "image": images})
    for first in (0, 2):
        pq.write_table(table.slice(first, 2), tmp_path / f"{first}.parquet")
    found = drain(load_named(Data(test=f"{tmp_path}/*.parquet"), "test", preprocess, "pixels"))
    for own, theirs in zip(*(e.batch(np.arange(3), torch.device("cpu")) for e in (found, expected)), strict=True):
        assert torch.equal(own, theirs)
    broken = [*masks[:2], b"x" if stored == "bytes" else {"bytes": b"x", "path": ""}]
    pq.write_table(pa.table({"label": broken, "image": images}), tmp_path / "broken.parquet")
    with pytest.raises(RecipeError, match=r"the mask of row 2 cannot be used"):
        load(tmp_path / "broken.parquet", preprocess)


def repaint(folder: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    with Image.open(folder / "masks" / "b.png") as opened:
        changed = change(opened)
    changed.save(folder / "masks" / "b.png")


def two_numbers(folder: Path) -> None:
    for file in folder.glob("masks/**/*.png"):
        Image.fromarray((np.array(Image.open(file)) > 1).astype(np.uint8) * 255).save(file)


def as_jpeg(folder: Path) -> None:
    Image.open(folder / "masks" / "b.png").save(folder / "masks" / "b.jpg")
    (folder / "masks" / "b.png").unlink()


def turned(orientation: int) -> Callable[[Path], None]:
    """Write into the image how viewers turn it: 3 stands for 180 degrees, 6 for 90."""

    def change(folder: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(folder / "images" / "b.jpg").copy().save(folder / "images" / "b.jpg", exif=exif)

    return change


def other_palette(folder: Path) -> None:
    def paint(mask: Image.Image) -> Image.Image:
        painted = mask.copy()
        painted.putpalette([255 - value % 256 for value in range(768)])
        return painted

    (folder / "masks" / "more" / "c.png").write_bytes((folder / "masks" / "a.png").read_bytes())
    repaint(folder, paint)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mask": (lambda f: (f / "masks" / "a.png").unlink(), "images/a.png has no counterpart in masks (1 such files); expe"),
    "no image": (lambda f: (f / "images" / "b.jpg").unlink(), "masks/b.png has no counterpart in images (1 such files)"),
    "two images": (lambda f: (f / "images" / "a.jpg").write_bytes(b""), "differ in their suffix only; expected one file"),
    "other folders": (lambda f: (f / "masks").rename(f / "labels"), "has images in images, labels; the objective needs"),
    "colors": (lambda f: repaint(f, lambda m: m.convert("RGB")), "the mask of row 1 (images/b.jpg) cannot be used (its mode "
               "is RGB; expected the number of a class in each pixel: L, P or 1). Repair or remove both."),
    "JPEG": (as_jpeg, "(it is a JPEG file, whose compression changes the numbers of classes; expected PNG)"),
    "upside down": (turned(3), "(the image has the EXIF orientation 3, which is not applied, and the mask may be for the"),
    "other palette": (other_palette, "the palettes of the masks differ: pixels of 0 have the color (255, 254, 253) in that "
                      "of row 1 (images/b.jpg), and (0, 1, 2) in that of row 0 (images/a.png). Expected the number of a"),
    "other size": (lambda f: repaint(f, lambda m: m.resize((9, 9))), "(it has 9 x 9 pixels, and the image 30 x 20)"),
    "damaged": (lambda f: (f / "masks" / "b.png").write_bytes(b"x"), "the mask of row 1 (images/b.jpg) cannot be used ("),
    "black and white": (two_numbers, "its masks have the numbers 0 and 255 only, and pixels of 255 are not scored. Write 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_by_file(tmp_path: Path, fault: str) -> None:
    change, said = REFUSED[fault]
    change(write(tmp_path))
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, build(f"{SPEC}&resize_size=16").preprocess)
    assert said in str(refused.value)


def test_a_mask_that_fits_an_image_only_as_it_is_stored_is_used(tmp_path: Path) -> None:
    turned(6)(write(tmp_path))
    assert load(tmp_path, build(f"{SPEC}&resize_size=16").preprocess).labels.shape == (3, 16, 24)


def test_images_of_other_shapes_are_refused_with_the_option(tmp_path: Path) -> None:
    write(tmp_path / "one", (20, 20))
    write(tmp_path, (30, 20))
    for top in ("images", "masks"):
        (tmp_path / "one" / top).rename(tmp_path / top / "one")
    with pytest.raises(
        RecipeError, match=r"becomes \[16, 16\] pixels.*Resize all images to one shape, as in resize_size=HE"
    ):
        load(tmp_path, build(f"{SPEC}&resize_size=16").preprocess)
    assert load(tmp_path, build(f"{SPEC}&resize_size=16,16").preprocess).labels.shape == (6, 16, 16)


@pytest.mark.parametrize(
    "preprocess",
    [
        None,
        lambda image: torch.zeros(3, 16, 16),
        v2.Compose([v2.RandomCrop(16), v2.PILToTensor()]),
        v2.Compose([v2.Resize(16), v2.Lambda(lambda x: x)]),
        v2.Compose([v2.PILToTensor(), v2.ToPureTensor(), v2.Resize(16)]),
    ],
)
def test_a_preprocessing_that_may_treat_masks_otherwise_is_refused(tmp_path: Path, preprocess: Any) -> None:
    with pytest.raises(RecipeError, match="preprocessing is not known to move their pixels as it moves those of images"):
        load(write(tmp_path), preprocess)


def test_what_neither_recipe_nor_files_say_is_noted(tmp_path: Path) -> None:
    recipe = make_recipe({"model": SPEC, "data": {"test": str(tmp_path)}})
    (note,) = examine(recipe, []).notes
    mean, std = "0.485,0.456,0.406", "0.229,0.224,0.225"
    assert (
        f"resize_size 520, mean {mean}, std {std}, interpolation bilinear are used, as torchvision does by default" in note
    )
    assert note.endswith(f"as in model: {SPEC}&resize_size=520&mean={mean}&std={std}&interpolation=bilinear")
    record = examine(recipe, []).preprocessing
    assert (record["resize_size"], record["source"]) == ("520", "default")
    stated = make_recipe({"model": note.rpartition("model: ")[2], "data": {"test": str(tmp_path)}})
    assert examine(stated, []).notes == []
    assert examine(stated, []).preprocessing["source"] == "recipe"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model": "torchvision:deeplabv3_resnet?classes=4"},
            "torchvision has no 'deeplabv3_resnet'; did you mean deeplabv3_",
        ),
        (
            {"model": f"{SPEC}&aux_loss=true"},
            "has the unknown option 'aux_loss'; known options: classes, resize_size, mean,",
        ),
        ({"model": f"{SPEC}&crop_size=64"}, "has the unknown option 'crop_size'"),
        (
            {"preprocess": {"size": 64}},
            "preprocess: state the images of lraspp_mobilenet_v3_large by options instead, as in",
        ),
        ({"model": f"{SPEC}&resize_size=9", "preprocess": f"{__name__}:load"}, "so resize_size in `model: "),
    ],
)
def test_options_that_cannot_be_used_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        build_for(make_recipe({"model": SPEC, **changes}))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "spec",
    ["lraspp_mobilenet_v3_large?classes=5", "deeplabv3_mobilenet_v3_large?classes=3&aux_loss=true"],
)
def test_checkpoints_of_segmentation_models_are_recognized(tmp_path: Path, spec: str) -> None:
    save_file(build(f"torchvision:{spec}").model.state_dict(), tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors"))
    found = [fitted("torchvision", name, ingredient) for name in similar("torchvision", ingredient, [])]
    assert [model for model in found if model] == [f"torchvision:{spec}"]


def test_names_of_segmentation_models_are_known_without_the_library() -> None:
    for name in models.list_models():
        assert (objective_in(f"torchvision:{name}") == "segmentation") == (name in models.list_models(models.segmentation))
    built = build("torchvision:fcn_resnet50?classes=3&aux_loss=true&resize_size=32")
    assert any(name.startswith("aux_classifier.") for name in built.model.state_dict())
    with torch.inference_mode():
        assert built.model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    assert (
        "model = torchvision.models.get_model('fcn_resnet50', num_classes=3, weights_backbone=None, aux_loss=True)"
        in loading_lines("torchvision:fcn_resnet50?classes=3&aux_loss=true", ["model.safetensors"])
    )
