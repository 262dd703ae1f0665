"""The configurations of a search, and its Pareto front."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from ray_soup.errors import RecipeError
from ray_soup.io.mirror import Mirror
from ray_soup.recipe import dump_recipe, load_recipe, make_recipe, parse_overrides, with_changes
from ray_soup.soups.output import Output
from ray_soup.tune.search import _loggers, make_configs, pareto
from tests.conftest import values


def test_the_recipe_as_it_is_comes_first_and_the_seed_draws_the_rest(zoo: Path) -> None:
    recipe = make_recipe(
        values(zoo, search={"trials": 9, "learn.lr": {"loguniform": [0.01, 0.1]}, "blocks": {"choice": ["layer"]}})
    )
    configs = make_configs(recipe, 8)
    assert configs[0] == {"learn.lr": 0.01, "blocks": "tensor"}
    assert len(configs) == 9
    assert all(0.01 <= c["learn.lr"] <= 0.1 and c["blocks"] == "layer" for c in configs[1:])
    assert configs == make_configs(recipe, 8)
    assert configs[1:] != make_configs(with_changes(recipe, {"learn.seed": 2}), 8)[1:]


def test_the_default_space_is_learning_rate_and_model_batch(zoo: Path) -> None:
    default = make_configs(make_recipe(values(zoo)), 12)
    assert default[0] == {"learn.lr": 0.01, "learn.model_batch": 12}
    assert {c["learn.model_batch"] for c in default} == {3, 6, 12}


def test_a_grid_is_every_combination_of_its_values(zoo: Path) -> None:
    grid = {"learn.lr": {"grid": [0.1, 0.2]}, "learn.epochs": {"grid": [1, 2]}}
    points = make_configs(make_recipe(values(zoo, search=grid)), 8)[1:]
    assert [(p["learn.lr"], p["learn.epochs"]) for p in points] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


def test_keys_of_the_search_come_from_the_recipe_and_from_overrides(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"model": "a:b", "search": {"learn.lr": {"uniform": [1, 2]}, "trials": 3}})
    )
    recipe = load_recipe(
        tmp_path / "r.yaml", ("search.learn.model_batch={choice: [2, 6]}", "search.learn.wd={uniform: [0, 1]}")
    )
    assert recipe.search.space == {
        "learn.lr": {"uniform": [1, 2]}, "learn.model_batch": {"choice": [2, 6]}, "learn.wd": {"uniform": [0, 1]},
    }  # fmt: skip
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert parse_overrides(["search.trials=2"]) == {"search": {"trials": 2}}


def test_unknown_keys_and_damaged_distributions_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'search\.trials'"):
        make_recipe({"model": "a:b", "search": {"trial": 3}})
    with pytest.raises(RecipeError, match=r"the recipe has no key 'learn\.lrr'"):
        make_configs(make_recipe({"model": "a:b", "search": {"learn.lrr": {"uniform": [1, 2]}}}), 4)
    with pytest.raises(RecipeError, match=r"search\.learn\.lr: found .*\. Expected uniform: \[low, high\]"):
        make_configs(make_recipe({"model": "a:b", "search": {"learn.lr": {"uniform": [1]}}}), 4)


def test_no_trial_beats_one_on_the_pareto_front() -> None:
    def trial(nll: float | None, memory: int, seconds: float) -> dict[str, Any]:
        return {"select_nll": nll, "peak_memory_bytes": memory, "seconds": seconds, "percent": 100}

    best, light, quick = trial(0.1, 900, 9), trial(0.2, 100, 9), trial(0.2, 900, 1)
    stopped, jittered = {**trial(0.1, 900, 4), "percent": 50}, trial(0.11, 890, 8.9)
    others = [trial(0.2, 900, 9), trial(None, 0, 0), stopped, jittered]
    assert pareto([best, light, quick, *others]) == [best, light, quick]


def test_trackers_of_a_search_know_it_by_the_name_of_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a URI, too, where each process has a local copy with a name of its own."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    wandb, mlflow = Mock(), Mock()
    fakes = {"wandb": SimpleNamespace(WandbLoggerCallback=wandb), "mlflow": SimpleNamespace(MLflowLoggerCallback=mlflow)}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, f"ray.air.integrations.{name}", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mlflow", Mock())
    recipe = make_recipe({"model": "a:b", "search": {"loggers": ["wandb", "mlflow"]}})
    mirror = Mirror("s3://bucket/soups/best")
    for place in (Output(tmp_path / "best", Mock()), Output(mirror.folder, Mock(), mirror)):
        place.folder.mkdir(parents=True)
        _loggers(recipe, place)
        assert wandb.call_args.args == ("mine", "best")
        assert wandb.call_args.kwargs["dir"] == str(place.folder / "wandb")
        assert mlflow.call_args.kwargs == {"experiment_name": "best"}
