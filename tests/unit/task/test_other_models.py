"""The message about a checkpoint that does not fit names the model that it fits, or how its library renames it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_fits, left_out_notes
from ray_soup.io.ingredient import open_ingredient
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.run import run
from ray_soup.task.loading import load_model
from ray_soup.task.models import build, describe, fitting
from ray_soup.task.other_models import advice_for
from tests.unit.task.library_models import TINY_CLIP

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


def test_a_file_that_the_loader_of_timm_changes_is_saved_by_the_command_in_the_message(tmp_path: Path) -> None:
    """The names of the first ConvNeXt V2 code, which timm converts, and shapes of one tensor that it changes."""
    import timm

    torch.manual_seed(0)
    name = "convnextv2_atto"
    model = timm.create_model(name, num_classes=5)
    state = {
        of_convnext(n).replace("mlp.grn.bias", "grn.beta").replace("mlp.grn.weight", "grn.gamma"): t
        for n, t in model.state_dict().items()
    }
    state = {n: t.view(1, 1, 1, -1) if "grn" in n else t for n, t in state.items()}
    said = refused(f"timm:{name}?classes=5", tmp_path / "it's.pt", {"model": state})
    assert "timm's own loader changes the tensors of such a file. Save it once as that reads it" in said
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    command = said[said.index("python -c") :]
    subprocess.run(["bash", "-c", command], check=True, capture_output=True, env={**os.environ, "PATH": path})
    same(f"timm:{name}?classes=5", tmp_path / "it's.pt.renamed.pt", model.state_dict())


# Old names that the library's loader knows


def of_convnext(name: str) -> str:
    """The name of a tensor in the first ConvNeXt code."""
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name)
    for new, old in (("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2"), ("head.fc", "head")):
        name = name.replace(f"{new}.", f"{old}.")
    return name.replace("head.norm.", "norm.")


def of_densenet(name: str) -> str:
    """The name of a tensor in the first DenseNets of torchvision; empty for counters, which PyTorch did not have then."""
    return "" if name.endswith("num_batches_tracked") else re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name)


def same(spec: str, path: Path, state: dict[str, torch.Tensor]) -> None:
    found = load_model(spec, str(path)).state_dict()
    assert found.keys() == state.keys()
    assert [name for name, tensor in state.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    ("spec", "old_name", "prefix", "first"),
    [
        ("timm:test_convnext?classes=5", of_convnext, "net.", "downsample_layers.0.0.weight to stem.0.weight"),
        (
            "torchvision:densenet121?classes=5",
            of_densenet,
            "",
            "norm.1.weight to features.denseblock1.denselayer1.norm1",
        ),
    ],
)
def test_old_names_that_a_loader_only_renames_are_read(
    tmp_path: Path, spec: str, old_name: Any, prefix: str, first: str
) -> None:
    """As `model.load_state_dict` reads them after the library's own loader; a soup of both kinds of files is baked again."""
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(build(spec).model.state_dict())
    torch.save({"model": {prefix + old: t for n, t in states[0].items() if (old := old_name(n))}}, tmp_path / "old.pt")
    torch.save(states[1], tmp_path / "new.pt")
    same(spec, tmp_path / "old.pt", states[0])
    assert any(first in note for note in left_out_notes([fitting(describe(spec), str(tmp_path / "old.pt"))]))
    both = {**states[0], **{old: t for n, t in states[0].items() if (old := old_name(n))}}  # as of dcp
    torch.save(both, tmp_path / "both.pt")
    same(spec, tmp_path / "both.pt", states[0])
    second = next(name for name in both if name not in states[0])
    torch.save({**both, second: both[second] + 1}, tmp_path / "unequal.pt")
    with pytest.raises(IngredientError, match="are one tensor in the model, but differ in this file"):
        load_model(spec, str(tmp_path / "unequal.pt"))
    files = [str(tmp_path / name) for name in ("new.pt", "old.pt")]
    recipe = make_recipe({"method": "uniform", "model": spec, "ingredients": files})
    soup = run(recipe, tmp_path / "out")
    (note,) = [note for note in soup.record["notes"] if "own loader does" in note]
    assert note.startswith(f"{tmp_path}/old.pt: ")
    assert first in note
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in states[0].items():
        expected = (tensor.double() + states[1][name].double()) / 2
        assert torch.equal(written[name], expected.to(tensor.dtype)), name
    verify(tmp_path / "out")
    bake_copy(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_old_names_of_the_text_tower_of_a_clip_are_read(tmp_path: Path) -> None:
    import open_clip

    (tmp_path / "tiny-text.json").write_text(json.dumps({**TINY_CLIP, "custom_text": True}))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    open_clip.add_model_config(tmp_path)
    spec = f"open_clip:tiny-text?zeroshot={tmp_path}/classes.txt"
    state = build(spec).model.state_dict()
    assert any(name.startswith("text.") for name in state)
    torch.save({name.removeprefix("text."): tensor for name, tensor in state.items()}, tmp_path / "old.pt")
    same(spec, tmp_path / "old.pt", state)


def test_names_that_a_loader_moves_onto_others_are_not_taken_for_them(tmp_path: Path) -> None:
    """The downsampling of Swin stood at the end of a stage, and stands at the beginning of the next one."""
    import timm

    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    state = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", n).replace("head.fc", "head"): t
        for n, t in model.state_dict().items()
    }
    said = refused("timm:swin_tiny_patch4_window7_224?classes=5", tmp_path / "a.pt", state)
    assert "timm's own loader changes the tensors of such a file" in said


def test_a_loader_that_changes_a_tensor_in_place_does_not_only_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm.models.convnext

    spec = "timm:test_convnext?classes=5"
    rename = timm.models.convnext.checkpoint_filter_fn

    def changes(state: dict[str, torch.Tensor], model: torch.nn.Module) -> Any:
        state["norm.weight"] += 1
        return rename(state, model)

    monkeypatch.setattr("timm.models.convnext.checkpoint_filter_fn", changes)
    state = {of_convnext(name): tensor for name, tensor in build(spec).model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(IngredientError, match=r"missing: stem\.0\.weight"):
        load_model(spec, str(tmp_path / "a.pt"))
