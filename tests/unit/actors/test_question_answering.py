"""The objective of docs/own-objectives.md, question answering: its figures are those of the library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split
from tests.conftest import ROOT, InProcess
from tests.pages import blocks
from tests.unit.task.library_models import write_questions


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe of the page, in a folder with its files."""
    write_questions(tmp_path)
    for block in blocks(ROOT / "docs" / "own-objectives.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.text.replace("max_length=384", "max_length=16"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "answers", raising=False)
    yield yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    sys.modules.pop("answers", None)


def by_hand(folder: str, rows: list[dict[str, torch.Tensor]]) -> list[list[float]]:
    """The library's own loss, whether both ends are right, and the F1 of positions, of each row alone."""
    from transformers import AutoModelForQuestionAnswering

    model, found = AutoModelForQuestionAnswering.from_pretrained(folder).eval(), []
    for row in rows:
        first, last = row["targets"]
        inputs = {name: ids[None] for name, ids in row.items() if name != "targets"}
        with torch.inference_mode():
            out = model(**inputs, start_positions=first[None], end_positions=last[None])
        ends = int(out.start_logits.argmax()), int(out.end_logits.argmax())
        ours, theirs = set(range(ends[0], ends[1] + 1)), set(range(int(first), int(last) + 1))
        f1 = 2 * len(ours & theirs) / (len(ours) + len(theirs))
        found.append([out.loss.item(), float(ends == (int(first), int(last))), f1])
    return found


def test_figures_of_question_answering_are_those_of_the_library(recipe: Any) -> None:
    found = []
    for micro_batch, size in ((1, 1), (7, 1), (64, 1), (7, 3)):
        actors = {"replicas": 1, "shards": 1, "cpus": 1}
        changes = {"learn": {"micro_batch": micro_batch}, "actors": actors, "precision": "float32"}
        pool = InProcess(make_recipe({**recipe, **changes}), size)
        assert pool.setup_info.sizes == {"fit": 22, "test": 22}  # without the two that are cut off
        (outcome,) = pool.evaluate_file("runs/1/checkpoint-500", [Split("test", np.arange(22, dtype=np.int32))])
        found.append(outcome)
    loss, exact, f1 = np.array(by_hand("runs/1/checkpoint-500", sys.modules["answers"].test())).T
    assert 0 < f1.mean() < 1
    for outcome in found:
        assert outcome.named is not None
        np.testing.assert_allclose(outcome.loss, loss, rtol=1e-5)
        np.testing.assert_array_equal(outcome.named["exact"], exact)
        np.testing.assert_allclose(outcome.named["f1"], f1, rtol=1e-6)
