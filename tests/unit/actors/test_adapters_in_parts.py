"""Adapters with logits in parts, packed rows and checkpointed layers: the loss and the gradient do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.actors.messages import Partial
from ray_soup.recipe import make_recipe
from ray_soup.task import logits
from ray_soup.task.checkpointing import repeated_layers
from ray_soup.task.data import Split
from ray_soup.task.logits import Logits
from tests.adapters import CONFIGS, values, write_adapters, write_texts
from tests.conftest import InProcess

pytest.importorskip("peft")
FIT = Split("fit", np.arange(8, dtype=np.int32))
TEST = Split("test", np.arange(6, dtype=np.int32))
K = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, CONFIGS[:K])  # all but the one with a head of its own
    write_texts(folder)
    return folder


def step_of(pool: InProcess) -> Partial:
    info = pool.open_all("tensor")
    count = info.partition.count
    noise = np.random.default_rng(0).normal(size=(K, count)).astype(np.float32)
    pool.begin(np.arange(K), np.zeros((K, count)), "float32")
    (part,) = pool.step(noise - noise.mean(axis=0), 1.0, FIT)
    return part


@pytest.fixture(scope="module")
def plain(made: Path) -> tuple[Partial, float, str]:
    pool = InProcess(make_recipe(values(made)))
    return step_of(pool), pool.evaluate_file(str(made / "runs" / "2"), [TEST])[0].nll, pool.setup_info.fingerprint


@pytest.mark.parametrize("what", ["logits", "pack", "layers", "all"])
def test_loss_and_gradient_are_the_same(
    made: Path, plain: tuple[Partial, float, str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    changes: dict[str, Any] = {}
    if what in ("logits", "all"):
        monkeypatch.setattr(logits, "MOST_OUTPUTS", 0)
        monkeypatch.setattr(logits, "CHUNK", 5 * 320)
    if what in ("pack", "all"):
        changes["model"] = f"transformers:{made}/base?length=64&pack=true"
    if what in ("layers", "all"):
        changes["learn"] = {"gradient_checkpointing": True}
    pool = InProcess(make_recipe(values(made, **changes)))
    expected, nll, fingerprint = plain
    found = step_of(pool)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert np.abs(found.gradient - expected.gradient).max() <= 1e-5 * np.abs(expected.gradient).max()
    assert pool.evaluate_file(str(made / "runs" / "2"), [TEST])[0].nll == pytest.approx(nll, rel=1e-5)
    replica = pool.shards[0].replica
    inputs, _ = replica.examples["fit"].batch(FIT.rows, torch.device("cpu"))
    with torch.no_grad():
        assert isinstance(replica.model(inputs), Logits) == (what in ("logits", "all"))
    layers = list(repeated_layers(replica.computing))
    assert [("forward" in vars(layer)) for layer in layers] == [what in ("layers", "all")] * 2
    assert (pool.setup_info.fingerprint == fingerprint) == ("model" not in changes)
    assert not any(p.requires_grad for name, p in replica.computing.named_parameters() if "lora_" not in name)


def test_a_head_that_an_adapter_replaces_is_not_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "MOST_OUTPUTS", 0)
    write_adapters(tmp_path, CONFIGS[4:])
    write_texts(tmp_path)
    replica = InProcess(make_recipe(values(tmp_path))).shards[0].replica
    with torch.no_grad():
        assert isinstance(replica.model(replica.examples["fit"].batch(FIT.rows, torch.device("cpu"))[0]), torch.Tensor)
