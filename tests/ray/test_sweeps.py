"""A sweep is a zoo: an experiment that a plain Ray Tune script wrote, which knows nothing of ray_soup."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import find_sweeps, open_ingredients
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import put, values
from tests.tiny import Tiny


def sweep(config: dict[str, Any]) -> None:
    """Train for three epochs with a checkpoint each; seed 2 fails, and the accuracy of seed 3 falls."""
    import tempfile

    from ray import tune

    from tests import tiny

    images, labels = (torch.from_numpy(a[:600]) for a in tiny.digits())
    torch.manual_seed(0)
    model = Tiny()
    for epoch in range(3):
        if config["seed"] == 2 and epoch == 1:
            raise RuntimeError("bad luck")
        tiny.train(model, config["seed"] * 10 + epoch, config["lr"], 1, images, labels)
        accuracy = 0.5 - epoch / 10 if config["seed"] == 3 else 0.5 + epoch / 10
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"model": model.state_dict(), "epoch": epoch}, f"{folder}/model.pt")
            torch.save({"step": 1}, f"{folder}/optimizer.pt")
            loss = float("nan") if epoch == 0 else 1.0 - accuracy
            report = {"accuracy": accuracy, "epoch": epoch, "val": {"loss": loss, "text": str(accuracy)}}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    from ray import tune

    folder = tmp_path_factory.mktemp("sweep")
    tune.Tuner(
        sweep,
        param_space={"lr": 3e-3, "seed": tune.grid_search([0, 1, 2, 3])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(folder), name="experiment", verbose=0),
    ).fit()
    return folder / "experiment"


def test_the_last_or_the_best_checkpoint_of_each_finished_trial_is_found(experiment: Path) -> None:
    last = open_ingredients(str(experiment))
    assert [i.trial.config["seed"] for i in last] == [0, 1, 3]
    assert [i.trial.metrics["epoch"] for i in last] == [2, 2, 2]
    assert len({i.name for i in last}) == 3
    assert all(i.path.endswith("checkpoint_000002/model.pt") for i in last)
    best = open_ingredients(f"{experiment}?metric=accuracy")
    assert [i.trial.metrics["epoch"] for i in best] == [2, 2, 0]
    worst = open_ingredients(f"{experiment}?metric=accuracy&mode=min")
    assert [i.trial.metrics["accuracy"] for i in worst] == [0.5, 0.5, pytest.approx(0.3)]
    assert [i.path for i in open_ingredients([f"{experiment}?metric=accuracy"])] == [i.path for i in best]
    (sweep_found,) = find_sweeps(str(experiment))
    assert sweep_found.note() == f"{experiment}: 3 trials used, left out: 1 failed."
    with pytest.raises(
        RecipeError, match="reported no 'loss'; it reported accuracy, epoch, time_total_s, training_iteration, val/loss"
    ):
        open_ingredients(f"{experiment}?metric=loss")


def test_nested_metrics_text_and_nan_are_read_as_tune_reported_them(experiment: Path) -> None:
    lowest = open_ingredients(f"{experiment}?metric=val/loss&mode=min")
    assert [i.trial.metrics["epoch"] for i in lowest] == [2, 2, 1]  # the loss of epoch 0 is NaN in every trial
    (found,) = find_sweeps(f"{experiment}?metric=val/loss&mode=min")
    assert found.skipped == {"without a finite 'val/loss'": 3}
    best = open_ingredients(f"{experiment}?metric=val/text")
    assert [i.trial.metrics["epoch"] for i in best] == [2, 2, 0]
    assert [i.trial.metrics["val/loss"] for i in best] == [pytest.approx(0.3), pytest.approx(0.3), None]


@pytest.mark.slow
def test_the_class_api_of_tune_does_not_name_its_checkpoints(cluster: None, tmp_path: Path) -> None:
    from ray import tune

    class Trainable(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {"eval": {"acc": 1.0 / self.iteration if self.iteration else 0.0}, "object": object}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            torch.save({"a": torch.full((1,), float(self.iteration))}, f"{checkpoint_dir}/model.pt")

    tune.Tuner(
        Trainable,
        param_space={"seed": tune.grid_search([0, 1]), "clip": float("inf")},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), name="experiment", verbose=0, stop={"training_iteration": 4},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=2),
        ),
    ).fit()  # fmt: skip
    last = open_ingredients(str(tmp_path / "experiment"))
    assert [i.read("a").item() for i in last] == [4.0, 4.0]
    assert [i.trial.config for i in last] == [{"seed": 0, "clip": "inf"}, {"seed": 1, "clip": "inf"}]
    with pytest.raises(RecipeError, match="cannot tell which checkpoint is best by 'eval/acc': found 2 checkpoints"):
        open_ingredients(f"{tmp_path}/experiment?metric=eval/acc")


def test_a_damaged_experiment_is_named(experiment: Path, zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(experiment, tmp_path / "copy")
    (first,) = list((tmp_path / "copy").glob("*_00000_*"))
    (first / "checkpoint_000002" / "model.pt").rename(first / "checkpoint_000002" / "weights.pt")
    with pytest.raises(IngredientError, match=r"cannot tell which file is the model\. Found optimizer\.pt, weights\.pt"):
        open_ingredients(str(tmp_path / "copy"))
    shutil.rmtree(first)
    (left,) = find_sweeps(str(tmp_path / "copy"))
    assert left.left_out == {"failed": 1, "without a checkpoint": 1}
    (state,) = (tmp_path / "copy").glob("experiment_state-*.json")
    state.write_text('{"trial_data": [')
    with pytest.raises(IngredientError, match="looks like an experiment of Ray Tune or Train, but cannot be read"):
        open_ingredients(str(tmp_path / "copy"))
    with pytest.raises(RecipeError, match="no experiment of Ray Tune or Train"):
        open_ingredients(f"{zoo / 'zoo'}?metric=accuracy")


@pytest.mark.slow
def test_a_sweep_in_a_bucket_makes_the_same_soup(experiment: Path, zoo: Path, s3: str, tmp_path: Path) -> None:
    put(experiment, f"{s3}/sweeps/experiment")
    ours, theirs = (open_ingredients(f"{base}?metric=accuracy") for base in (experiment, f"{s3}/sweeps/experiment"))
    assert [(i.name, i.trial.config, i.trial.metrics) for i in ours] == [
        (i.name, i.trial.config, i.trial.metrics) for i in theirs
    ]
    assert [s.note() for s in find_sweeps(f"{s3}/sweeps")] == [f"{s3}/sweeps/experiment: 3 trials used, left out: 1 failed."]
    for name, folder in (("ours", experiment), ("theirs", f"{s3}/sweeps/experiment")):
        recipe = values(zoo, ingredients=f"{folder}?metric=accuracy", learn={"epochs": 1, "batch_size": 150})
        run(make_recipe(recipe), tmp_path / name)
    one, other = (load_coefficients(tmp_path / name / "coefficients.safetensors").values for name in ("ours", "theirs"))
    np.testing.assert_array_equal(one, other)
