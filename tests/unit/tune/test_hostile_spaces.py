"""Distributions of `search` and `finetune` that nobody should have written are refused when the recipe is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe, make_recipe, with_changes
from ray_soup.tune import finetune
from ray_soup.tune.search import _optuna, make_configs
from ray_soup.tune.trials import distribution, draw, random_state

NAN, INF = float("nan"), float("inf")


def recipe_of(**values: Any) -> Recipe:
    return make_recipe({"model": "a:b", "data": {"fit": "/f.npz", "select": "/s.npz"}, **values})


RANGES: list[tuple[Any, str]] = [
    ({"loguniform": [-1, 1]}, "Expected loguniform: [low, high] with low above 0."),
    ({"loguniform": [0, 1]}, "with low above 0."),
    ({"loguniform": [1, 0.1]}, "Expected loguniform: [low, high] with low < high."),
    ({"loguniform": [0.1, 0.1]}, "with low < high."),
    ({"loguniform": ["small", "large"]}, "Expected loguniform: [low, high] with two numbers."),
    ({"loguniform": ["1e-6", "1e-4"]}, "with two numbers."),
    ({"loguniform": [NAN, 1]}, "with two numbers."),
    ({"loguniform": [0.1, INF]}, "with two numbers."),
    ({"loguniform": [True, 2]}, "with two numbers."),
    ({"loguniform": [0.1]}, "with two numbers."),
    ({"loguniform": [0.1, 0.2, 0.3]}, "with two numbers."),
    ({"loguniform": []}, "with two numbers."),
    ({"loguniform": 0.1}, "with two numbers."),
    ({"loguniform": None}, "with two numbers."),
    ({"loguniform": {"low": 0.1, "high": 1}}, "with two numbers."),
    ({"uniform": [1, 0]}, "Expected uniform: [low, high] with low < high."),
    ({"uniform": [-1, 1]}, "uniform: values up to -1 do not fit this key. Expected a number above 0"),
    ({"randint": [5, 1]}, "Expected randint: [low, high] with low < high (high is excluded)."),
    ({"randint": [1, 1]}, "with low < high (high is excluded)."),
    ({"randint": [1.5, 3]}, "Expected randint: [low, high] with two integers."),
    ({"randint": [0, 3]}, "randint: values up to 0 do not fit this key."),
    ({"choice": []}, "Expected choice: [value, ...] with 1 to 10,000 values."),
    ({"choice": 0.1}, "Expected choice: [value, ...]"),
    ({"choice": [0.1, -1]}, "choice: -1 cannot be a value of this key. Expected a number above 0"),
    ({"choice": [0.1, "big"]}, "choice: 'big' cannot be a value"),
    ({"choice": [0.1, NAN]}, "choice: nan cannot be a value"),
    ({"choice": [True]}, "choice: true cannot be a value"),
    ({"choice": [[0.1]]}, "choice: [0.1] cannot be a value"),
    ({"choice": [0.1] * 10_001}, "with 1 to 10,000 values."),
    ({"uniform": [0, 1], "loguniform": [0.1, 1]}, "Expected "),
    ({"normal": [0, 1]}, "Expected "),
    ({"lognormal": 1}, "Expected a value or one distribution: loguniform: [low, high], uniform"),
    (-1, "found -1. Expected a number above 0"),
    (0, "found 0. Expected a number above 0"),
    (NAN, "found nan. Expected a number above 0"),
    (True, "found true. Expected a number above 0"),
    ("fast", "found 'fast'. Expected a number above 0"),
    ([0.1, 0.2], "found [0.1, 0.2]. Expected a number above 0"),
    (None, "found null. Expected a number above 0"),
]


@pytest.mark.parametrize(("value", "said"), RANGES, ids=[str(value)[:40] for value, _ in RANGES])
def test_a_wrong_distribution_of_a_rate_is_refused_in_both_sections(value: Any, said: str) -> None:
    for section, key in (("finetune", "finetune.lr"), ("search", "search.learn.lr")):
        keys = {"lr": value} if section == "finetune" else {"learn.lr": value}
        with pytest.raises(RecipeError) as error:
            recipe_of(**{section: keys})
        assert said in str(error.value)
        assert key in str(error.value)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("epochs", {"uniform": [1, 5]}, "Expected an integer from 1 to 100,000. For integers use randint."),
        ("epochs", {"loguniform": [1, 5]}, "For integers use randint."),
        ("epochs", {"randint": [0, 5]}, "randint: values up to 0 do not fit this key."),
        ("epochs", {"randint": [1, 10**30]}, "Expected an integer from 1 to 100,000."),
        ("epochs", {"choice": [3, 0]}, "choice: 0 cannot be a value of this key."),
        ("epochs", {"grid": [1, 2]}, "Expected a value or one distribution: loguniform: [low, high]"),
        ("epochs", 2.5, "found 2.5. Expected an integer"),
        ("epochs", "4", "found '4'. Expected an integer"),
        ("wd", -1, "Expected a number from 0 to 1,000,000"),
        ("wd", {"uniform": [-0.1, 0.1]}, "uniform: values up to -0.1 do not fit this key."),
        ("label_smoothing", 1, "Expected a number from 0 and below 1"),
        ("label_smoothing", {"uniform": [0, 1.5]}, "uniform: values up to 1.5 do not fit this key."),
        ("mixup", {"choice": ["beta"]}, "choice: 'beta' cannot be a value"),
        ("shift", -1, "Expected an integer from 0 to 1,000"),
        ("shift", 10**9, "Expected an integer from 0 to 1,000"),
        (
            "randaugment",
            {"randint": [0, 40]},
            "randint: values up to 40 do not fit this key. Expected an integer from 0 to 30.",
        ),
        ("trials", 10**9, "Expected an integer from 1 to 10,000."),
        ("trials", 0, "Expected an integer from 1 to 10,000."),
        ("seed", -1, "Expected an integer from 0 to"),
    ],
)
def test_a_hyperparameter_that_training_would_refuse_is_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"\n  finetune\.{key}: found") as error:
        recipe_of(finetune={key: value})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"trials": 10**9}, "search.trials: found 1000000000. Expected an integer from 1 to 10,000."),
        ({"trials": True}, "search.trials: found true."),
        ({"metric": "test_nll"}, "search.metric: found 'test_nll'. Expected auto or select_nll or select_accuracy or"),
        ({"algorithm": "bayes"}, "Expected random or optuna."),
        ({"scheduler": "pbt"}, "Expected asha or none."),
        (
            {"loggers": ["wandb", "wandb"]},
            "search.loggers: found ['wandb', 'wandb']. Expected each of them once.",
        ),
        ({"loggers": "wandb"}, "search.loggers: found 'wandb'. Expected a list of wandb or mlflow."),
        ({"time_budget_s": 0}, "search.time_budget_s: found 0. Expected a number above 0 to 31,536,000, or null."),
        ({"time_budget_s": INF}, "search.time_budget_s: found inf."),
        ({"space": [1]}, "search.space: found [1]. Expected names"),
        ({"space": 0}, "search.space: found 0. Expected names"),
        ({"learn.lr": {"grid": []}}, "Expected grid: [value, ...] with 1 to 10,000 values."),
        ({"learn.lr": {"grid": [0.1, -0.1]}}, "grid: -0.1 cannot be a value of this key."),
        (
            {key: {"grid": [0.001 * n for n in range(1, 1001)]} for key in ("learn.lr", "learn.wd", "learn.warmup")},
            "warmup: found",
        ),
        (
            {key: {"grid": [0.001 * n for n in range(1, 1000)]} for key in ("learn.lr", "learn.wd", "learn.warmup")},
            "search: the grid has 997,002,999 points, one trial for each. Expected at most 10,000.",
        ),
        (
            {"learn.lr": {"grid": [0.1]}, "algorithm": "optuna"},
            "search.algorithm: found optuna together with a grid of learn.lr.",
        ),
        ({"learn.lr": 0.1, "algorithm": "optuna"}, "search.algorithm: found optuna together with the constant learn.lr."),
        ({"learn.lrr": {"uniform": [0.1, 1]}}, "the recipe has no key 'learn.lrr'. Unknown key; did you mean 'learn.lr'?"),
        ({"lr": {"uniform": [0.1, 1]}}, "search.lr: the recipe has no key 'lr'."),
        ({"lr": 0.1}, "search.lr: unknown key"),
        ({"blocks": "layer"}, "search.blocks: unknown key"),
        ({"learn": {"lr": {"normal": [0, 1]}}}, "search.learn.lr: found {'normal': [0, 1]}. Expected a value or one"),
        ({"learn": {"uniform": [0.1, 1]}}, "search.learn: a search cannot vary this key."),
        ({"learn.lr.x": {"choice": [1]}}, "search.learn.lr.x: the recipe has no key"),
        ({"info": {"choice": [1]}}, "search.info: the recipe has no key 'info'."),
        ({"model_dump": {"choice": [1]}}, "the recipe has no key 'model_dump'."),
        ({"learn.model_dump": {"choice": [1]}}, "the recipe has no key 'learn.model_dump'."),
        ({"." * 50: {"choice": [1]}}, "a search cannot vary this key."),
        ({"": {"choice": [1]}}, "the recipe has no key ''."),
        (
            {"ingredients": {"choice": ["a", "b"]}},
            "search.ingredients: a search cannot vary this key. Expected a key of method,",
        ),
        ({"model": {"choice": ["a:b"]}}, "search.model: a search cannot vary this key."),
        ({"data.select": {"choice": [0.1, 0.2]}}, "search.data.select: a search cannot vary this key."),
        ({"search.trials": {"choice": [1, 2]}}, "search.search.trials: a search cannot vary this key."),
        ({"finetune.trials": {"choice": [1, 2]}}, "search.finetune.trials: a search cannot vary this key."),
        (
            {"method": {"choice": ["mehl", "uniform"]}},
            "choice: 'uniform' cannot be a value of this key. Expected one of learned,",
        ),
        ({"learn.model_batch": {"choice": [0, 4]}}, "choice: 0 cannot be a value of this key. Expected an integer from 1"),
        ({"learn.model_batch": {"choice": [2.5]}}, "choice: 2.5 cannot be a value"),
        ({"learn.model_batch": {"uniform": [1, 4]}}, "For integers use randint."),
        (
            {"learn.optimizer": {"choice": ["adamw", "lion"]}},
            "choice: 'lion' cannot be a value of this key. Expected adamw or sgd.",
        ),
        ({"learn.optimizer": "lion"}, "search.learn.optimizer: found 'lion'. Expected adamw or sgd, or a distribution"),
        ({"loss": {"choice": ["cross_entropy"]}}, "choice: 'cross_entropy' cannot be a value of this key."),
        ({f"k{n}": {"choice": [1]} for n in range(200)}, "search: found 200 keys. Expected at most 100."),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_search_that_cannot_be_run_is_refused(search: Any, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe_of(search=search)
    assert said in str(error.value)
    assert len(str(error.value)) < 3000


def test_a_seed_is_searched_only_if_it_does_not_cut_select() -> None:
    search = {"learn.seed": {"randint": [0, 9]}}
    assert recipe_of(search=search).search.space == search
    with pytest.raises(RecipeError, match=r"search\.learn\.seed: each seed cuts its own select data from fit"):
        make_recipe({"model": "a:b", "data": {"fit": "/f.npz"}, "search": search})


GOOD: list[tuple[str, Any]] = [
    ("learn.lr", {"loguniform": [1e-6, 1e-4]}), ("learn.lr", {"uniform": [0, 1]}), ("learn.lr", 0.5), ("learn.lr", 1),
    ("learn.label_smoothing", {"uniform": [0, 1]}), ("learn.model_batch", {"randint": [1, 9]}),
    ("learn.model_batch", {"choice": [6, 18, "auto"]}), ("learn.clip", {"choice": [None, 1.0]}),
    ("learn.optimizer", {"choice": ["sgd", "adamw"]}), ("blocks", {"choice": ["layer", 1000]}),
    ("method", {"choice": ["mehl", "learned+"]}), ("learn.cosine_lr", {"choice": [True, False]}),
    ("learn.lr", {"grid": [0.1, 1e300]}), ("learn.epochs", {"randint": [3, 4]}), ("actors.cpus", {"choice": [1, "auto"]}),
    ("blocks", {"choice": ["tensor", {"tensor": 2}, {"tensor": 4}]}), ("blocks", {"grid": [{"tensor": 2}, 9]}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), GOOD, ids=[f"{key}={value}" for key, value in GOOD])
def test_every_value_of_a_space_that_was_accepted_makes_a_recipe(key: str, value: Any) -> None:
    recipe = recipe_of(search={key: value, "trials": 30})
    configs = make_configs(recipe, 8)
    assert all(with_changes(recipe, config).info.learns for config in configs)
    assert len(configs) == (3 if isinstance(value, dict) and "grid" in value else 30)
    choices = value.get("choice") if isinstance(value, dict) else None
    assert choices is None or all(config[key] in choices for config in configs[1:])


numbers = st.one_of(st.integers(-3, 40), st.floats(allow_nan=True, width=32), st.booleans(), st.text(max_size=2), st.none())
anything = st.one_of(
    numbers,
    st.dictionaries(
        st.sampled_from(["loguniform", "uniform", "randint", "choice", "grid", "normal"]),
        st.one_of(st.lists(numbers, max_size=3), numbers),
        max_size=2,
    ),
)


@given(st.sampled_from(finetune.DRAWN), anything)
@settings(max_examples=300, deadline=None, database=None)
def test_what_the_recipe_accepts_can_be_drawn_and_trained_with(key: str, value: Any) -> None:
    """Any value is refused when the recipe is loaded, or each of its draws is a constant that the key accepts."""
    try:
        recipe = recipe_of(finetune={key: value, "trials": 5})
    except RecipeError:
        return
    for config in finetune.make_configs(recipe):
        drawn = dict(config)[key]
        assert isinstance(drawn, (int, float))
        assert np.isfinite(drawn)
        assert recipe_of(finetune={"trunk": {key: drawn}}).finetune.trunk.model_dump()[key] == drawn


def test_draws_of_seeds_that_numpy_takes_are_as_before_and_larger_seeds_differ() -> None:
    space = {"lr": distribution("lr", {"loguniform": [1e-6, 1e-4]})}
    draws = [draw(space, random_state(seed))["lr"] for seed in (1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1)]
    assert draws[0] == draw(space, np.random.RandomState(1))["lr"]
    assert draws[1] == draw(space, np.random.RandomState(2**32 - 1))["lr"]
    assert len(set(draws)) == 5
    recipe = recipe_of(learn={"seed": 2**63 - 1}, finetune={"seed": 2**63 - 1})
    assert len(make_configs(recipe, 4)) == 16
    assert len(finetune.make_configs(recipe)) == 12


@pytest.mark.parametrize("value", [{"uniform": [1]}, {"grid": [1]}, [1], {"choice": []}, {"loguniform": [-1, 1]}])
def test_a_wrong_distribution_is_refused_where_it_is_drawn(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"key: found .*Expected"):
        distribution("key", value)


@pytest.mark.parametrize("value", [0.5, 3, True, "layer", None])
def test_a_constant_is_drawn_unchanged(value: Any) -> None:
    assert draw({"a": distribution("a", value)}, random_state(1))["a"] is value


@pytest.mark.parametrize(
    ("learn", "space", "first"),
    [
        ({"model_batch": 5}, {"learn.model_batch": {"choice": [2, 4]}}, {"learn.model_batch": 5}),
        ({"lr": 5}, {"learn.lr": {"uniform": [0.1, 1]}}, {"learn.lr": 5.0}),
        ({}, {"learn.optimizer": {"choice": ["sgd"]}}, {"learn.optimizer": "adamw"}),
        ({"seed": 2**40, "lr": 0.01}, {}, {"learn.lr": 0.01, "learn.model_batch": 8}),
        ({"model_batch": 3, "lr": 0.01}, {}, {"learn.lr": 0.01, "learn.model_batch": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:Fixed parameter")
def test_optuna_tries_the_recipe_itself_first_even_outside_of_the_space(learn: Any, space: Any, first: Any) -> None:
    recipe = recipe_of(learn=learn, search={**space, "algorithm": "optuna", "trials": 4})
    found, algorithm = _optuna(recipe, make_configs(recipe, 8))
    algorithm.set_search_properties("select_nll", "min", found)
    assert algorithm.suggest("0") == first
    for trial in "123":
        assert with_changes(recipe, algorithm.suggest(trial)).info.learns


@pytest.mark.parametrize(
    ("values", "out", "said"),
    [
        ({"actors": {"cpus": 0}}, "out", r"actors\.cpus: found 0; finetune needs CPUs"),
        ({"data": {"fit": "/f.npz"}}, "out", r"no data\.train"),
        ({"finetune": {"class_names": "/c.txt"}}, "out", r"finetune\.class_names needs a CLIP in finetune\.pretrained"),
    ],
)
def test_what_finetune_cannot_run_is_refused_before_ray_starts(values: Any, out: str, said: str) -> None:
    recipe = recipe_of(**{"data": {"train": "/t.npz"}, **values})
    with pytest.raises(RecipeError, match=said):
        finetune.finetune(recipe, out)
