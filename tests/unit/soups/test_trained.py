"""What a comparison says about training all weights, and when it cannot show that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ray_soup.actors.messages import Mesh
from ray_soup.recipe import make_recipe
from ray_soup.soups import trained
from ray_soup.soups.comparison import CompareOptions, what_training_gains
from ray_soup.soups.report.measures import Measures
from ray_soup.task.outcomes import Outcome


def outcome(loss: float, correct: int) -> Outcome:
    return Outcome(np.full(10, loss), np.arange(10) < correct)


def test_training_that_beats_the_chosen_soup_is_named_with_its_price() -> None:
    ours, better = outcome(0.5, 7), outcome(0.4, 6)
    (sentence,) = what_training_gains("mehl+", ours, better)
    assert "(trained) beats the chosen soup, mehl+, on select (NLL 0.4000 against 0.5000, accuracy 60.00%" in sentence
    assert "costs a model that is no longer an average of the ingredients." in sentence
    (sentence,) = what_training_gains("mehl+ polished", ours, better)
    assert "neither model is an average of the ingredients" in sentence
    assert not list(what_training_gains("mehl+", better, ours))
    assert not list(what_training_gains("mehl+", ours, ours))
    assert not list(what_training_gains("mehl+", ours, better, Measures(select_by="accuracy")))


def test_options_that_are_off_leave_the_record_of_a_folder_as_it_was() -> None:
    assert CompareOptions(2, (0,), (3,)).recorded == [2, [0], [3]]
    assert CompareOptions(trained=False).recorded == [1, [], [], "no-trained"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"frozen": 1000}, "the ingredients are adapters"),
        ({"by_layer": True}, "actors.by_layer is true"),
        ({"numel": 10**12}, "it takes about 17,0.*GB per actor, and the cluster has 8.0 GB"),
    ],
)
def test_a_reference_that_cannot_be_made_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str | None
) -> None:
    monkeypatch.setattr(trained, "memory_of_each", lambda *_: 8e9)
    recipe = make_recipe({"model": "a:b", "actors": {"by_layer": changes.get("by_layer", False)}})
    inputs = SimpleNamespace(frozen=changes.get("frozen", 0), layout=SimpleNamespace(numel=changes.get("numel", 10**6)))
    session = SimpleNamespace(recipe=recipe, inputs=inputs, mesh=changes.get("mesh", Mesh(2, 1)), model_batch=4)
    found = trained._why_not(cast(Any, session))
    assert found == why if why is None or "GB" not in why else found is not None and "GB per actor" in found


def test_a_soup_in_memory_is_polished(zoo: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from ray_soup import mix_state_dicts
    from tests.tiny import Tiny

    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    data = np.load(zoo / "heldout.npz")
    fit = [(torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]))]
    changes: dict[str, Any] = {"precision": "float32"}
    plain = mix_state_dicts(Tiny(), states, fit, "uniform", **changes)
    made = mix_state_dicts(Tiny(), states, fit, "uniform", polish={"epochs": 2, "lr": 0.002}, **changes)
    assert made.figures["select_nll"] < plain.figures["select_nll"]
    assert made.record["polish"]["select"]["before"]["nll"] == plain.figures["select_nll"]
    assert not torch.equal(made.tensors["head.weight"], plain.tensors["head.weight"])
    assert torch.equal(made.tensors["unused"], plain.tensors["unused"])
