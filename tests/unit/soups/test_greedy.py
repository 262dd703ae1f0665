"""The greedy search compared with the plain sequential loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ray_soup.actors.evaluation import outcome_of
from ray_soup.recipe import make_recipe
from ray_soup.soups.methods.greedy import greedy
from ray_soup.soups.mixture import mean_of
from ray_soup.task.choices import ranking
from ray_soup.task.data import Split, calibration_batches
from ray_soup.task.objective import Classification
from ray_soup.task.outcomes import Outcome, Score
from tests import tiny
from tests.conftest import InProcess, values
from tests.unit.mixing.test_running_statistics import statistics_by_torch


def write_random_zoo(source: Path, folder: Path, seed: int) -> None:
    """Write seven ingredients: trained ones plus noise, a duplicate in every second zoo, and a bad one in every third."""
    random = np.random.default_rng(seed)
    torch.manual_seed(seed)
    trained = [load_file(f) for f in sorted(source.glob("*.safetensors"))]
    for k in range(7):
        state = dict(trained[random.integers(len(trained))])
        noise = random.choice([0.0, 0.01, 0.05, 0.1])
        for name, tensor in state.items():
            if tensor.is_floating_point() and name not in ("mean", "unused"):
                state[name] = tensor + noise * torch.randn_like(tensor)
        if k == 6 and seed % 2:
            state = load_file(folder / "m2.safetensors")
        if k == 5 and seed % 3 == 0:
            state["head.weight"] = state["head.weight"][torch.randperm(10)]
        save_file(state, folder / f"m{k}.safetensors")


def outcome_on(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Outcome:
    with torch.inference_mode():
        return outcome_of(Classification(), model(images), labels)


def plain_greedy(states: list[dict[str, torch.Tensor]], held_out: list[Outcome], strict: bool) -> list[int]:
    """Wortsman et al. 2022, recipe 1: every candidate on all images."""
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())
    model = tiny.Tiny().eval()

    def correct(chosen: list[int]) -> int:
        mean = {
            n: torch.stack([states[k][n].double() for k in chosen]).mean(0).to(t.dtype) if t.is_floating_point() else t
            for n, t in states[0].items()
        }
        model.load_state_dict(mean)
        with torch.inference_mode():
            first, second = model(images).topk(2).values.T
        if (first - second).min() < 1e-5:
            pytest.skip("the largest outputs of an image are almost equal on this machine: rounding decides")
        return int(outcome_on(model, images, labels).correct.sum())

    order = sorted(range(len(states)), key=lambda k: (-int(held_out[k].correct.sum()), held_out[k].nll, k))
    kept = [order[0]]
    best = correct(kept)
    for k in order[1:]:
        found = correct([*kept, k])
        if found > best or (found == best and not strict):
            kept, best = [*kept, k], found
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_the_search_equals_the_plain_loop(zoo: Path, tmp_path: Path, seed: int) -> None:
    (tmp_path / "zoo").mkdir()
    write_random_zoo(zoo / "zoo", tmp_path / "zoo", seed)
    keep = (">=", ">")[seed // 2 % 2]
    recipe = make_recipe(
        {**values(zoo, method="greedy", greedy={"keep": keep}), "ingredients": str(tmp_path / "zoo" / "*.safetensors")}
    )
    pool = InProcess(recipe, size=1 + seed % 3)
    states = [load_file(f) for f in sorted((tmp_path / "zoo").glob("*.safetensors"))]
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())
    held_out = []
    for state in states:
        model = tiny.Tiny().eval()
        model.load_state_dict(state)
        held_out.append(outcome_on(model, images, labels))
    split = Split("fit", np.arange(597, dtype=np.int32))
    search = greedy(pool, dict(enumerate(held_out)), [split], keep)
    assert search.kept == plain_greedy(states, held_out, strict=keep == ">")
    assert search.candidates == 6
    assert 0 < search.looked <= 6 * 597
    assert all(line["looked"] == 597 for line in search.trail if line["kept"])
    if seed % 2:  # a duplicate has the same outcome: it comes right behind its twin
        order = ranking(dict(enumerate(held_out)))
        assert order.index(6) == order.index(2) + 1


def probability(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A metric: the probability of the label."""
    return outputs.softmax(1).gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("select_by", ["metric", "nll"])
def test_the_search_goes_by_the_figure_of_select_by(zoo: Path, tmp_path: Path, seed: int, select_by: str) -> None:
    """A plain loop that adds whatever raises the mean of the metric, or lowers the mean loss, on all images."""
    (tmp_path / "zoo").mkdir()
    write_random_zoo(zoo / "zoo", tmp_path / "zoo", seed)
    recipe = make_recipe({
        **values(zoo, method="greedy", metric=f"{__name__}:probability", select_by=select_by),
        "ingredients": str(tmp_path / "zoo" / "*.safetensors"),
    })  # fmt: skip
    pool = InProcess(recipe, size=1 + seed)
    states = [load_file(f) for f in sorted((tmp_path / "zoo").glob("*.safetensors"))]
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())

    def figure(chosen: list[int]) -> float:
        model = tiny.Tiny().eval()
        mean = {n: sum(states[k][n].double() for k in chosen) / len(chosen) for n in states[0]}
        model.load_state_dict({n: tensor.to(states[0][n].dtype) for n, tensor in mean.items()})
        with torch.inference_mode():
            outputs = model(images)
            found = probability(outputs, labels).double() if select_by == "metric" else -F.cross_entropy(outputs, labels)
            return found.mean().item()

    kept, *others = sorted(range(7), key=lambda k: (-figure([k]), k))
    chosen = [kept]
    for k in others:
        if figure([*chosen, k]) >= figure(chosen):
            chosen.append(k)
    split = Split("fit", np.arange(597, dtype=np.int32))
    held_out = {}
    for k, ingredient in enumerate(pool.inputs.ingredients):
        (held_out[k],) = pool.evaluate_file(ingredient.path, [split])
    search = greedy(pool, held_out, [split], select_by=select_by)
    assert search.kept == chosen
    assert search.gain / 597 == pytest.approx(figure(chosen), rel=1e-5)


@pytest.mark.parametrize("error", [-2e-7, 2e-7])
@pytest.mark.parametrize(("keep", "kept"), [(">=", [0, 1]), (">", [0])])
def test_a_duplicate_is_kept_as_keep_says_however_a_machine_rounds(
    zoo: Path, tmp_path: Path, keep: str, kept: list[int], error: float
) -> None:
    """Batches of other sizes give other last digits: by how much, and in which direction, depends on the machine."""
    (tmp_path / "zoo").mkdir()
    state = load_file(min((zoo / "zoo").glob("*.safetensors")))
    for name in ("a", "b"):
        save_file(state, tmp_path / "zoo" / f"{name}.safetensors")
    changes = {"method": "greedy", "select_by": "nll", "ingredients": str(tmp_path / "zoo" / "*.safetensors")}
    pool = Rounding(make_recipe(values(zoo, **changes)))
    split = Split("fit", np.arange(597, dtype=np.int32))
    held_out = {k: pool.evaluate_file(ingredient.path, [split])[0] for k, ingredient in enumerate(pool.inputs.ingredients)}
    pool.error = error
    assert greedy(pool, held_out, [split], keep, select_by="nll").kept == kept


class Rounding(InProcess):
    """Actors whose losses of candidates are off by a relative error."""

    error = 0.0

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> Score:
        score = super().try_candidate(kept, candidate, splits, calibration)
        return replace(score, loss=score.loss * (1 + self.error))


@pytest.mark.slow
def test_the_search_equals_the_plain_loop_with_running_statistics_of_each_candidate(conv_zoo: Path) -> None:
    recipe = make_recipe(values(conv_zoo, model="tests.tiny:build_conv"))
    states = [load_file(f) for f in sorted((conv_zoo / "zoo").glob("*.safetensors"))]
    data = np.load(conv_zoo / "heldout.npz")
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    split = Split("fit", np.arange(len(labels), dtype=np.int32))
    calibration = calibration_batches(split, 61, 1, 244)

    def right(kept: list[int]) -> np.ndarray:
        model = tiny.build_conv()
        mean = {name: sum(states[k][name].double() for k in kept) / len(kept) for name in states[0]}
        model.load_state_dict({name: tensor.to(states[0][name].dtype) for name, tensor in mean.items()})
        if len(kept) > 1:
            statistics_by_torch(model, [images[batch.rows] for batch in calibration])
        with torch.inference_mode():
            return (model.eval()(images).argmax(dim=1) == labels).numpy()

    held_out = {}
    for k in range(4):
        correct = right([k])
        held_out[k] = Outcome(1.0 - correct, correct, np.ones(len(labels), np.float32))
    order = ranking(held_out)
    kept, best = order[:1], held_out[order[0]].correct.sum()
    for k in order[1:]:
        if right([*kept, k]).sum() >= best:
            kept, best = [*kept, k], right([*kept, k]).sum()
    for size in (1, 2):
        search = greedy(InProcess(recipe, size), held_out, [split], calibration=calibration)
        assert (search.kept, search.gain) == (kept, best)


def test_the_mean_of_some_ingredients_gives_them_equal_coefficients() -> None:
    np.testing.assert_array_equal(mean_of([2, 0], 4)[:, 0], [0.5, 0, 0.5, 0])
