"""The preprocessing of images and texts: stated in the recipe, recorded in the soup, compared when it is evaluated."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.ray.own_loops import NAMES, class_figures, image_folders
from tests.system.command import call, write_recipe
from tests.unit.task.library_models import TEXTS, bert, tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
STATED = {"size": 48, "mean": [0.3, 0.4, 0.5], "std": 0.25, "crop_pct": 0.9, "interpolation": "bilinear"}
RECORD = {"size": 48, "channels": 3, "mean": [0.3, 0.4, 0.5], "std": [0.25] * 3, "crop": 0.9, "interpolation": "bilinear"}
TEXT = "size 48; channels 3; mean 0.3, 0.4, 0.5; std 0.25, 0.25, 0.25; crop 0.9; interpolation bilinear (as the recipe says)"
PLAIN = {"epochs": 1, "label_smoothing": 0.0, "mixup": 0.0, "shift": 0, "randaugment": 0}
ACTORS = {"replicas": 1, "shards": 1, "cpus": 1}


def test_a_stated_preprocessing_is_used_and_recorded_everywhere(tmp_path: Path) -> None:
    """Evaluating gives the figures of timm's own loop, also without the key: the files beside the models state the same."""
    import timm
    from timm.data import create_dataset, create_loader

    data = image_folders(tmp_path)
    values: dict[str, Any] = {
        "method": "uniform", "model": "timm:test_resnet?classes=3", "ingredients": f"{tmp_path}/zoo", "actors": ACTORS,
        "data": {**data, "train": f"{tmp_path}/train"}, "finetune": {"trials": 2, "init": f"{tmp_path}/init.pt", **PLAIN},
    }  # fmt: skip
    torch.save(timm.create_model("test_resnet", num_classes=len(NAMES)).state_dict(), tmp_path / "init.pt")
    stated = write_recipe(tmp_path, {**values, "preprocess": STATED})
    for command, out in (("finetune", "zoo"), ("uniform", "out")):
        made = call(command, stated, tmp_path / out)
        assert made.exit_code == 0, made.output
    beside = json.loads((tmp_path / "zoo" / "preprocessing.json").read_text())
    assert beside == {"preprocessing": {**RECORD, "source": "recipe"}}
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["preprocessing"] == {**RECORD, "source": "recipe"}
    assert not any("not say" in note for note in record["notes"])
    assert f"## Preprocessing\n\n{TEXT[0].upper()}{TEXT[1:]}.\n" in (tmp_path / "out" / "README.md").read_text()
    assert f"<h2>Preprocessing</h2>\n<p>{TEXT}</p>" in unescape((tmp_path / "out" / "report.html").read_text())

    soup = timm.create_model("test_resnet", num_classes=len(NAMES)).eval()
    soup.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    config: dict[str, Any] = {"mean": (0.3, 0.4, 0.5), "std": (0.25,) * 3, "crop_pct": 0.9, "interpolation": "bilinear"}
    test = create_dataset("", root=data["test"])
    loader = create_loader(test, input_size=(3, 48, 48), batch_size=5, use_prefetcher=False, num_workers=0, **config)
    expected = class_figures(soup, list(loader))
    found = json.loads(call("evaluate", stated, tmp_path / "out", "--json").stdout)
    assert found["test_nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(expected.accuracy, abs=1e-12)
    assert found["preprocessing"] == record["preprocessing"]

    plain = write_recipe(tmp_path, values)
    again = json.loads(call("evaluate", plain, tmp_path / "out", "--json").stdout)
    assert {key: again[key] for key in ("test_nll", "test_accuracy")} == {
        key: found[key] for key in ("test_nll", "test_accuracy")
    }
    assert again["preprocessing"] == {**RECORD, "files": again["preprocessing"]["files"], "source": "files"}
    assert f"{tmp_path}/out was trained with img_size 48, " in again["notes"][0]
    assert "(run.json); the recipe states nothing" in again["notes"][0]
    _check_adoption(tmp_path, plain)
    alone = Path(shutil.copy(tmp_path / "zoo" / "model_00.safetensors", tmp_path))
    single = call("evaluate", plain, alone)
    assert single.exit_code == 0
    assert f"{alone} does not say how images were preprocessed in the training" in single.stderr
    assert "Preprocessing: size 160; channels 3; " in single.stdout
    assert "(the default of the model's library; neither " in single.stdout


def _check_adoption(folder: Path, plain: Path) -> None:
    """The soup of a recipe that states nothing is bit-identical, and remembers what the files beside the zoo state."""
    made = call("uniform", plain, folder / "adopted")
    assert made.exit_code == 0, made.output
    states = [load_file(folder / out / "model.safetensors") for out in ("out", "adopted")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    record = json.loads((folder / "adopted" / "run.json").read_text())
    assert set(record["preprocessing"]["files"].values()) == {"preprocessing.json"}
    assert any("and 1 more were trained with img_size 48, " in note for note in record["notes"])
    assert "(as the files of the ingredients say: preprocessing.json)" in (folder / "adopted" / "README.md").read_text()
    assert "img_size=48" in (folder / "adopted" / "recipe.yaml").read_text()
    assert call("verify", folder / "adopted").exit_code == 0
    assert "nothing was run" in call("resume", folder / "adopted").output
    again = call("uniform", folder / "adopted" / "recipe.yaml", folder / "adopted")
    assert again.exit_code == 0, again.output
    assert "nothing was run" in again.output
    beside = folder / "zoo" / "preprocessing.json"
    content = beside.read_text()
    beside.write_text(content.replace("48", "64"))
    refused = call("uniform", plain, folder / "adopted")
    beside.write_text(content)
    assert refused.exit_code == 2
    assert "files of the ingredients state, which has changed: img_size was 48 and is now 64." in refused.stderr


def test_the_share_of_texts_that_were_cut_is_recorded(tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    for k in range(2):
        classifier: Any = bert()
        classifier.save_pretrained(tmp_path / "model")
        torch.save(classifier.state_dict(), tmp_path / f"{k}.pt")
    labels = [k % 3 for k in range(len(TEXTS))]
    pq.write_table(pa.table({"text": TEXTS, "label": labels}), tmp_path / "test.parquet")
    long = sum(len(words(text)["input_ids"]) > 5 for text in TEXTS)
    assert 0 < long < len(TEXTS)
    recipe = write_recipe(tmp_path, {
        "method": "uniform", "model": f"transformers:{tmp_path}/model?length=5", "ingredients": f"{tmp_path}/*.pt",
        "data": {"test": str(tmp_path / "test.parquet")}, "actors": ACTORS,
    })  # fmt: skip
    made = call("uniform", recipe, tmp_path / "out")
    assert made.exit_code == 0, made.output
    record = json.loads((tmp_path / "out" / "run.json").read_text())["preprocessing"]
    assert record == {"length": 5, "source": "recipe", "cut": {"test": round(long / len(TEXTS), 6)}}
