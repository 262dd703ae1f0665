"""LoRA adapters and their base from the Hugging Face Hub: pinned, and the figures of the same files in folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ray_soup.recipe import load_recipe
from ray_soup.soups.run import run
from tests.adapters import CONFIGS, loaded, make_adapter, write_texts
from tests.conftest import ROOT
from tests.hub_server import Hub
from tests.ray.test_language_models import by_library
from tests.system.command import Command, commands_in
from tests.system.test_hub import command as in_child
from tests.system.test_hub import head
from tests.unit.task.language_models import byte_tokenizer, llama, saved

pytest.importorskip("peft")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A tiny Llama, two adapters of it, and a repository with the steps of a third run; texts are local."""
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub(folder / "served")
    saved(llama(), byte_tokenizer(), folder / "base")
    hub.commit("org/base", folder / "base")
    for k in range(3):
        base = llama()
        base.name_or_path = "org/base"
        make_adapter(base, folder / "runs" / str(k), k + 1, **CONFIGS[k])
    for k in range(2):
        hub.commit(f"org/adapter{k}", folder / "runs" / str(k))
    for step, k in ((10, 2), (20, 0)):
        checkpoint = folder / "trained" / f"checkpoint-{step}"
        shutil.copytree(folder / "runs" / str(k), checkpoint)
        state = {"best_model_checkpoint": "out/checkpoint-10", "global_step": step}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        torch.save({}, checkpoint / "optimizer.pt")
    hub.commit("org/run", folder / "trained")
    write_texts(folder)
    with hub.serving():
        yield hub


@pytest.fixture(scope="module")
def command(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run `ray-soup` with this Hub."""
    with commands_in(hub.environment(tmp_path_factory.mktemp("online"))) as command:
        yield command


def recipe_in(folder: Path, hub: Hub, model: str, ingredients: list[str]) -> Path:
    texts = hub.root.parent
    recipe: dict[str, Any] = {
        "model": f"transformers:{model}?length=64",
        "ingredients": ingredients,
        "data": {"fit": str(texts / "fit.jsonl"), "select": 0.4, "test": str(texts / "test.jsonl")},
        "learn": {"epochs": 1, "batch_size": 8},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
        "method": "mehl+",
    }
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_a_soup_of_adapters_on_the_hub(hub: Hub, tmp_path: Path, cluster: None) -> None:
    environment, out, files = hub.environment(tmp_path), tmp_path / "out", hub.root.parent
    commit = head(hub, "org/base")
    recipe = recipe_in(
        tmp_path / "hub", hub, "hf://org/base", ["hf://org/adapter0", "hf://org/adapter1@main", "hf://org/run"]
    )
    with commands_in(environment) as command:
        done = command("learn", recipe, out)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "run.json").read_text())
    assert record["base"]["path"] == f"hf://org/base@{commit}"
    assert [i["path"] for i in record["ingredients"]] == [
        *(f"hf://org/adapter{k}@{head(hub, f'org/adapter{k}')}" for k in range(2)),
        f"hf://org/run@{head(hub, 'org/run')}/checkpoint-10",
    ]
    assert not any("not on this machine" in note for note in record["notes"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    card = (out / "README.md").read_text()
    assert f"transformers.LlamaForCausalLM.from_pretrained('org/base', revision='{commit}'), '.')" in card
    assert (out / "tokenizer.json").read_bytes() == (files / "base" / "tokenizer.json").read_bytes()
    assert "optimizer" not in "".join(request for request in hub.requests() if "resolve" in request)

    local = recipe_in(tmp_path / "local", hub, str(files / "base"), [str(files / "runs" / str(k)) for k in range(3)])
    run(load_recipe(local), tmp_path / "same")
    assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "same/adapter_model.safetensors").read_bytes()

    hub.requests()
    with commands_in({**environment, "HF_HUB_OFFLINE": "1"}) as offline:
        done = offline("verify", out)
        assert done.returncode == 0, done.stderr
        assert f"the base hf://org/base@{commit} has the digest in run.json" in done.stdout
        done = offline("evaluate", out / "recipe.yaml", out, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert json.loads(done.stdout)["test_nll"] == pytest.approx(row["test_nll"], rel=1e-6)
    assert hub.requests() == []


def test_another_commit_of_the_base_is_noted(hub: Hub, command: Command, tmp_path: Path) -> None:
    commit = head(hub, "org/base")
    folder = tmp_path / "other"
    shutil.copytree(hub.root.parent / "runs" / "0", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": "0" * 40}))
    recipe = recipe_in(tmp_path / "hub", hub, "hf://org/base", [str(folder), "hf://org/adapter1"])
    done = command("uniform", recipe, tmp_path / "out", "data={}")
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "out" / "run.json").read_text())["notes"]
    assert any(f"org/base@{'0' * 40} ({folder}). It was not compared with hf://org/base@{commit}" in note for note in notes)


def test_an_adapter_on_the_hub_is_evaluated(hub: Hub, command: Command, tmp_path: Path) -> None:
    files = hub.root.parent
    recipe = recipe_in(tmp_path / "hub", hub, "hf://org/base", ["hf://org/adapter0", "hf://org/adapter1"])
    done = command("evaluate", recipe, "hf://org/adapter1", "--json")
    assert done.returncode == 0, done.stderr
    total = np.sum([*by_library(loaded(files, files / "runs" / "1"), files, "test").values()], axis=0)
    assert json.loads(done.stdout)["test_nll"] == pytest.approx(total[0] / total[1], rel=1e-5)


def test_a_base_in_a_subfolder_of_a_repository(hub: Hub, tmp_path: Path, cluster: None) -> None:
    environment, files = hub.environment(tmp_path), hub.root.parent
    shutil.copytree(files / "base", files / "family" / "tiny")
    (files / "family" / "README.md").write_text("several models")
    hub.commit("org/family", files / "family")
    commit, out = head(hub, "org/family"), tmp_path / "out"
    adapters = [str(files / "runs" / str(k)) for k in range(2)]
    recipe = recipe_in(tmp_path / "hub", hub, "hf://org/family/tiny", adapters)
    with commands_in(environment) as command:
        done = command("uniform", recipe, out, "adapter.merge=true", "data={}")
        exact = command("uniform", recipe, tmp_path / "exact", "data={}")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["base"]["path"] == f"hf://org/family@{commit}/tiny"
    local = recipe_in(tmp_path / "local", hub, str(files / "base"), adapters)
    run(load_recipe(local, ["adapter.merge=true", "data={}", "method=uniform"]), tmp_path / "same")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()
    hub.requests()
    done = in_child({**environment, "HF_HUB_OFFLINE": "1"}, "verify", out)
    assert done.returncode == 0, done.stderr
    assert exact.returncode == 0, exact.stderr
    card = (tmp_path / "exact" / "README.md").read_text()
    assert f"from_pretrained('org/family', revision='{commit}', subfolder='tiny'), '.')" in card


def test_the_weights_of_a_base_are_downloaded_with_progress_and_not_before(hub: Hub, tmp_path: Path) -> None:
    """Opening base and adapters reads headers; the download reports how far it is."""
    recipe = recipe_in(tmp_path / "hub", hub, "hf://org/base", ["hf://org/adapter0", "hf://org/adapter1"])
    script = f"""
import json
from ray_soup.io import hugging_face as hf
hf.LARGE, hf.BEGINNING = 1000, 100_000
from ray_soup.io.lifting import files_of
from ray_soup.recipe import load_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.heads import resolved_recipe
inputs = open_inputs(resolved_recipe(load_recipe({str(recipe)!r})))
base = inputs.ingredients[0].group.base
where = hf.at_commit(hf.HubPath.parse(base.files[0]))
before = hf._in_cache(where, "model.safetensors")
told = list(hf.download_all(files_of(inputs.ingredients)))
print(json.dumps([before, sorted(set(total for _, total in told)), base.sizes[0], inputs.ingredients[0].group.base_sha256]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=hub.environment(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, totals, size, sha256 = json.loads(done.stdout.splitlines()[-1])
    assert before is None
    assert size in totals
    assert len(sha256) == 64
