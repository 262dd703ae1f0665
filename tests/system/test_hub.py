"""Whole commands on repositories of the Hugging Face Hub, from a server in a child process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import ROOT, ray_soup
from tests.hub_server import TOKEN, Hub
from tests.system.command import commands_in
from tests.unit.task.language_models import TEXTS, byte_tokenizer, llama, nudge, saved

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A tiny Llama, three models near it in the three layouts of files, and texts in two splits."""
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub(folder / "served")
    saved(llama(), byte_tokenizer(), folder / "base")
    hub.commit("org/base", folder / "base")
    for k, name in enumerate(("whole", "shards", "old")):
        model = llama()
        nudge(model, k)
        if name == "shards":
            model.save_pretrained(folder / name, max_shard_size="30KB")
        else:
            saved(model, byte_tokenizer(), folder / name)
        if name == "whole":
            (folder / name / "pytorch_model.bin").write_bytes(b"an older copy")
            (folder / name / "training_args.bin").write_bytes(b"no tensors")
        if name == "old":
            (folder / name / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / name / "pytorch_model.bin")
        hub.commit(f"org/{name}", folder / name)
    for split, texts in {"train": [*TEXTS, *(text[::-1] for text in TEXTS[3:])], "test": [t.upper() for t in TEXTS]}.items():
        (folder / "texts").mkdir(exist_ok=True)
        rows = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / "texts" / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    hub.commit("datasets/org/texts", {f"data/{f.name}": f.read_bytes() for f in (folder / "texts").iterdir()})
    with hub.serving():
        yield hub


def command(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ray_soup(*map(str, arguments)), env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def write(folder: Path, **recipe: Any) -> Path:
    values = {
        "model": "transformers:hf://org/base?length=64",
        "ingredients": ["hf://org/whole", "hf://org/shards", "hf://org/old@main"],
        **recipe,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def head(hub: Hub, repo: str) -> str:
    return (hub.root / "models" / repo / "refs" / "main").read_text()


def test_a_soup_of_models_on_the_hub_records_their_commits(hub: Hub, tmp_path: Path) -> None:
    environment, recipe, out = hub.environment(tmp_path, HF_TOKEN=TOKEN), write(tmp_path, method="uniform"), tmp_path / "out"
    places = [f"hf://org/{name}@{head(hub, f'org/{name}')}" for name in ("whole", "shards", "old")]
    done = command(environment, "uniform", recipe, out)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "run.json").read_text())
    assert [one["path"] for one in record["ingredients"]] == places
    assert [one["name"] for one in record["ingredients"]] == ["whole", "shards", "old"]
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert kept["ingredients"] == places
    assert kept["model"] == f"transformers:hf://org/base@{head(hub, 'org/base')}?length=64"
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/base"
    assert head(hub, "org/base") in card
    assert f"From the Hugging Face Hub: hf://org/base@{head(hub, 'org/base')}." in record["notes"]
    models = [load_file(hub.root / "models/org/whole/commits" / head(hub, "org/whole") / "model.safetensors")]
    models.append(torch.load(hub.root / "models/org/old/commits" / head(hub, "org/old") / "pytorch_model.bin"))
    folder = hub.root / "models/org/shards/commits" / head(hub, "org/shards")
    models.append({k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()})
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, sum(model[name] for model in models) / 3)
    requests = "".join(hub.requests())
    assert "training_args" not in requests
    assert "org/whole/resolve" in requests
    assert not re.search(r"org/whole/resolve/\w+/pytorch_model", requests)
    with commands_in({**environment, "HF_HUB_OFFLINE": "1"}) as offline:
        for again in (["verify", out], ["inspect", *places]):
            done = offline(*again)
            assert done.returncode == 0, done.stderr
    assert hub.requests() == []
    before = head(hub, "org/whole")
    after = hub.commit("org/whole", folder)
    done = command(environment, "uniform", recipe, out)
    (hub.root / "models/org/whole/refs/main").write_text(before)
    assert done.returncode == 2
    assert f"{out} belongs to another recipe: ingredients was" in done.stderr
    assert after in done.stderr


SCRIPT = """
import json, sys
from pathlib import Path
import ray_soup
from ray_soup.actors.ray_session import connect

root, out = Path(sys.argv[1]), Path(sys.argv[2])
base, whole, shards, old, texts = (
    str(root / repo / "commits" / (root / repo / "refs/main").read_text())
    for repo in ("models/org/base", "models/org/whole", "models/org/shards", "models/org/old", "datasets/org/texts")
)
common = {"learn": {"epochs": 1, "batch_size": 4}, "precision": "float32", "actors": {"replicas": 1, "shards": 1, "cpus": 1}}
hub = {
    "model": "transformers:hf://org/base?length=64", "ingredients": ["hf://org/whole", "hf://org/shards", "hf://org/old"],
    "data": {"fit": "hf://datasets/org/texts/data/train.jsonl", "select": 0.4, "test": "hf://datasets/org/texts/data/test.*"},
}
local = {
    "model": f"transformers:{base}?length=64", "ingredients": [f"{whole}/model.safetensors", shards, old],
    "data": {"fit": f"{texts}/data/train.jsonl", "select": 0.4, "test": f"{texts}/data/test.jsonl"},
}
with connect():
    try:
        ray_soup.learn({**common, **hub, "data": {"fit": "hf://datasets/org/texts/data"}}, out / "refused")
    except ray_soup.SoupError as error:
        found = [str(error), "datasets/org/texts/resolve" in (root / "log").read_text()]
    for name, recipe in {"hub": hub, "local": local}.items():
        rows = ray_soup.learn({**common, **recipe}, out / name).rows
        found.append([{key: value for key, value in row.items() if "nll" in key or "accuracy" in key} for row in rows])
print(json.dumps(found))
"""


def test_figures_are_those_of_local_files_and_splits_are_chosen_before_a_download(hub: Hub, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SCRIPT, str(hub.root), str(tmp_path)]
    done = subprocess.run(arguments, env=hub.environment(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, downloaded, by_hub, local = json.loads(done.stdout.splitlines()[-1])
    assert "contains several splits: test (1 file), train (1 file). Choose one, as in hf://datasets/org/texts@" in refused
    assert not downloaded
    assert by_hub == local
    assert by_hub[0]["test_nll"] > 0
