"""The zoo that `finetune` makes on Ray."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ray_soup.actors import placement
from ray_soup.actors.placement import NoRoom
from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.run import run
from ray_soup.tune.finetune import finetune
from tests.conftest import ROOT, kill_tree, ray_soup, values
from tests.ray.events import appeared, wait_for
from tests.ray.others import all_cpus, held
from tests.stopping import running, stop


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    data = {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")}
    return make_recipe(values(folder, data=data, **changes))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_fine_tuned_zoo_becomes_a_soup(zoo: Path, tmp_path: Path, cluster: None) -> None:
    init = str(zoo / "zoo" / "model_0.safetensors")
    recipe = recipe_of(zoo, finetune={"trials": 3, "init": init, "epochs": 1, "randaugment": {"choice": [0, 5]}})
    entries = finetune(recipe, tmp_path / "made")
    assert [e["file"] for e in entries] == [f"model_{k:02d}.safetensors" for k in range(3)]
    assert len({e["sha256"] for e in entries}) == 3
    assert finetune(recipe, tmp_path / "made") == entries
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == ["manifest.json", *(e["file"] for e in entries), "state"]
    soup = run(make_recipe(values(zoo, ingredients=str(tmp_path / "made"))), tmp_path / "out")
    assert [i["sha256"] for i in soup.record["ingredients"]] == [e["sha256"] for e in entries]
    assert [i["hyperparameters"]["lr"] for i in soup.record["ingredients"]] == [e["lr"] for e in entries]
    assert [i["metrics"]["accuracy"] for i in soup.record["ingredients"]] == [e["accuracy"] for e in entries]


@pytest.mark.slow
def test_the_manifest_keeps_its_format(zoo: Path, tmp_path: Path, cluster: None) -> None:
    init = str(zoo / "zoo" / "model_0.safetensors")
    entries = finetune(recipe_of(zoo, finetune={"trials": 2, "init": init, "epochs": 1}), tmp_path / "made")
    assert json.loads((tmp_path / "made" / "manifest.json").read_text()) == entries
    drawn = ["lr", "wd", "epochs", "label_smoothing", "mixup", "shift", "randaugment", "seed"]
    keys = ["file", *drawn, "train_loss", "accuracy", "sha256"]
    assert [list(entry) for entry in entries] == [keys, keys]
    assert json.loads((tmp_path / "made" / "state" / "failures.json").read_text()) == []


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_room_for_are_refused(zoo: Path, tmp_path: Path, cluster: None) -> None:
    with pytest.raises(
        RecipeError, match=r"needs 99 actors with CPU 1 each; the nodes .* have: CPU .* Reduce finetune\.workers_per_model"
    ):
        finetune(recipe_of(zoo, finetune={"workers_per_model": 99}), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def refused(recipe: Recipe, out: Path, moment: str, patience_s: int, named: str) -> None:
    """Another program takes all CPUs when this moment comes, so that the fine-tuning ends and says what it needs."""
    with ExitStack() as others:

        def take_all(what: str, done: int, total: int) -> None:
            if what == moment and not done:
                others.enter_context(held(all_cpus()))

        patch = others.enter_context(pytest.MonkeyPatch.context())
        patch.setattr("ray_soup.tune.finetune.patience_s", lambda recipe: patience_s)
        with pytest.raises(NoRoom, match=rf"{named} and could not start within {patience_s} s: .* CPU 0 of"):
            finetune(recipe, out, take_all)
    assert not (out / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "named", "init"),
    [
        ("training the trunk", r"Training the trunk needs an actor with CPU \d+", None),
        ("fine-tuning", "A trial needs an actor with CPU 1", "model_0.safetensors"),
    ],
)
def test_a_finetune_that_cannot_start_ends_and_can_be_resumed(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, moment: str, named: str, init: str | None
) -> None:
    tuned = {"trials": 2, "init": str(zoo / "zoo" / init) if init else None, "epochs": 1, "trunk": {"epochs": 1}}
    recipe = recipe_of(zoo, finetune=tuned)
    refused(recipe, tmp_path / "made", moment, 2, named)
    monkeypatch.setattr(placement, "SETTLE_S", 30.0)
    assert len(finetune(recipe, tmp_path / "made")) == 2


@pytest.mark.slow
def test_a_finetune_on_a_cluster_that_others_hold_is_refused(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "SETTLE_S", 1.0)
    with held(all_cpus()), pytest.raises(RecipeError, match=r"needs an actor with CPU 1, but the cluster has only CPU 0 of"):
        finetune(recipe_of(zoo), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_two_workers_train_the_same_model_as_one(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a first attempt, in which the trial started but not its workers."""
    init = str(zoo / "zoo" / "model_0.safetensors")
    plain = {
        "init": init,
        "trials": 2,
        "epochs": 1,
        "lr": 1e-3,
        "wd": 0.01,
        "label_smoothing": 0,
        "mixup": 0,
        "randaugment": 0,
    }
    one = finetune(recipe_of(zoo, finetune=plain), tmp_path / "one")
    recipe = recipe_of(zoo, finetune={**plain, "workers_per_model": 2})
    refused(recipe, tmp_path / "two", "fine-tuning", 25, "A trial needs 2 actors with CPU 1 each")
    monkeypatch.setattr(placement, "SETTLE_S", 30.0)
    two = finetune(recipe, tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        ours, theirs = load_file(tmp_path / "one" / a["file"]), load_file(tmp_path / "two" / b["file"])
        for name in set(ours) - {"key.bias"}:  # it has no gradient, so Adam amplifies rounding errors
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_finetune_that_is_stopped_and_killed_resumes_to_the_same_bits(zoo: Path, tmp_path: Path, cluster: None) -> None:
    """It is stopped while its trunk is trained, with Ctrl-C while trials run, and killed while they run."""
    data = {"train": str(zoo / "train.npz"), "fit": str(zoo / "heldout.npz")}
    recipe = values(zoo, data=data, finetune={"trials": 3, "epochs": 20, "batch_size": 16, "trunk": {"epochs": 40}})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("finetune", str(tmp_path / "r.yaml"), str(tmp_path / "made"))
    state = tmp_path / "made" / "state"
    for number, file in ((signal.SIGTERM, "init.state"), (signal.SIGINT, "trials/*.state")):
        with running(command, cwd=ROOT) as process:
            wait_for(lambda file=file: appeared(state, file), process)
            stop(process, number)
        assert appeared(state, file)  # of an unfinished training
        assert not (tmp_path / "made" / "manifest.json").exists()

    def epochs() -> dict[str, int]:
        """Finished epochs of each unfinished training. A training that ends just now deletes its state."""
        reached = {}
        for file in appeared(state, "trials/*.state"):
            with suppress(FileNotFoundError):
                reached[file.name] = torch.load(file, weights_only=True)["epoch"]
        return reached

    stopped = epochs()
    with running(command, cwd=ROOT) as process:
        wait_for(lambda: any(stopped.get(name, 0) < epoch < 12 for name, epoch in epochs().items()), process)
        kill_tree(process)
    assert any(epoch > 0 for epoch in epochs().values())
    made = finetune(make_recipe(recipe), tmp_path / "made")
    whole = finetune(make_recipe(recipe), tmp_path / "whole")
    assert made == whole
    assert len(whole) == 3
    for entry in whole:
        assert same(tmp_path / "made" / entry["file"], tmp_path / "whole" / entry["file"])
