"""A text classifier of transformers, from fine-tuning to a soup learned on shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.run import run
from ray_soup.tune.finetune import finetune
from tests.unit.task.library_models import bert, tokenizer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> dict[str, Any]:
    """Fine-tune a zoo of two trials; the value is a recipe for it."""
    folder = tmp_path_factory.mktemp("texts")
    words, model = tokenizer(folder / "m"), bert()
    words.save_pretrained(folder / "m")
    model.save_pretrained(folder / "m")
    random = np.random.default_rng(0)
    for name in ("train", "fit", "test"):
        ids = random.integers(5, 12, (60, 8))
        inputs = np.stack([ids, np.ones_like(ids)], axis=1)
        labels = (ids == 5).any(1) + (ids == 6).any(1).astype(np.int64)
        np.savez(folder / f"{name}.npz", images=inputs, labels=labels)
    data = {name: str(folder / f"{name}.npz") for name in ("train", "fit", "test")}
    ways = {"lr": 1e-2, "wd": 0.0, "epochs": 2, "label_smoothing": 0.0, "mixup": 0.0, "shift": 0, "randaugment": 0}
    tuned = {
        "model": f"transformers:{folder}/m",
        "data": data,
        "finetune": {"trials": 2, "init": str(folder / "m"), **ways},
    }
    finetune(make_recipe(tuned), folder / "zoo")
    return {**tuned, "ingredients": str(folder / "zoo"), "learn": {"epochs": 1}, "precision": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_a_soup_of_texts_has_the_loss_of_the_file_that_transformers_loads(
    recipe: dict[str, Any], tmp_path: Path, shards: int
) -> None:
    from transformers import BertForSequenceClassification

    actors = {"replicas": 1, "shards": shards, "cpus": 1}
    out = Path(run(make_recipe({**recipe, "actors": actors}), tmp_path / "out").out)
    verify(out)
    soup = BertForSequenceClassification.from_pretrained(out)
    test = np.load(recipe["data"]["test"])
    ids, mask = torch.from_numpy(test["images"]).unbind(1)
    with torch.inference_mode():
        loss = nn.functional.cross_entropy(soup(ids, mask).logits, torch.from_numpy(test["labels"])).item()
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert row["test_nll"] == pytest.approx(loss, rel=1e-4)
