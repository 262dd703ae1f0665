"""The message about a checkpoint that does not fit names the model that it fits, or how its library renames it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_fits
from ray_soup.io.ingredient import open_ingredient
from ray_soup.task.models import describe, load_model
from ray_soup.task.other_models import advice_for

pytestmark = pytest.mark.slow


def refused(spec: str, path: Path, state: dict[str, Any]) -> str:
    torch.save(state, path)
    layout = describe(spec)
    with pytest.raises(IngredientError) as error:
        check_fits(open_ingredient(str(path)), layout.state_shapes, layout.known_names, (), advice_for(spec))
    return str(error.value)


@pytest.mark.parametrize(
    ("spec", "other", "also"),
    [
        ("timm:test_resnet?classes=5", "timm:test_resnet?classes=7", {}),
        ("timm:vit_tiny_patch16_224?classes=5", "timm:vit_small_patch16_224?classes=5", {}),
        ("timm:test_vit?classes=5", "timm:test_resnet?classes=5", {"arch": "test_resnet"}),  # a name that is not similar
        ("torchvision:resnet18?classes=5", "torchvision:resnet34?classes=7", {}),
        ("torchvision:resnet18?classes=5", "torchvision:resnet34?classes=5", {}),  # which only has more layers
        ("torchvision:mobilenet_v3_large?classes=5", "torchvision:mobilenet_v3_small?classes=5", {"epoch": 3}),
    ],
)
def test_the_model_that_fits_is_named(tmp_path: Path, spec: str, other: str, also: dict[str, Any]) -> None:
    state = {n: torch.zeros(shape) for n, shape in describe(other).state_shapes.items()}
    said = refused(spec, tmp_path / "a.pt", {"state_dict": {f"net.{n}": t for n, t in state.items()}, **also})
    assert said.endswith(f"write in the recipe\n    model: {other}")
    assert "ignore: [" not in said


def test_without_a_model_that_fits_nothing_is_advised(tmp_path: Path) -> None:
    state = {n: torch.zeros(shape) for n, shape in describe("torchvision:resnet18?classes=5").state_shapes.items()}
    state["layer1.0.conv1.weight"] = torch.zeros(1)
    assert "fits another model" not in refused(
        "torchvision:resnet18?classes=5", tmp_path / "a.pt", {**state, "fc.weight": state["fc.bias"]}
    )
    assert advice_for("tests.models:build")(open_ingredient(str(tmp_path / "a.pt"))) == ""


def test_names_that_the_loader_of_timm_changes_are_saved_by_the_command_in_the_message(tmp_path: Path) -> None:
    """The names of the first ConvNeXt code, which timm converts."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=5)
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name)
        for new, old in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2"), ("head.fc", "head")):
            name = name.replace(f"{new}.", f"{old}.")
        state[name.replace("head.norm.", "norm.")] = tensor
    said = refused("timm:test_convnext?classes=5", tmp_path / "it's.pt", {"model": state})
    assert "timm's own loader renames the tensors of such a file. Save it once under the new names" in said
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = said[said.index("python -c") :]
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, env={**os.environ, "PATH": path})
    loaded = load_model("timm:test_convnext?classes=5", str(tmp_path / "it's.pt.renamed.pt"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_old_names_of_densenet_are_recognized(tmp_path: Path) -> None:
    shapes = describe("torchvision:densenet121?classes=5").state_shapes
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): torch.zeros(shape)
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked")  # which PyTorch did not have then
    }
    said = refused("torchvision:densenet121?classes=5", tmp_path / "a.pt", old)
    assert said.endswith(
        "torchvision's own loader renames the tensors of such a file: load it with that, and save model.state_dict()."
    )
    expected = r"expected features\.denseblock1\.denselayer1\.norm1\.weight \[64\], found .*norm\.1\.weight \[64\]"
    assert re.search(expected, said)
