"""The greedy search against the plain sequential loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.data import Split
from ray_soup.greedy import greedy, mean_of, ranking
from ray_soup.outcomes import Outcome, join
from ray_soup.recipe import make_recipe
from ray_soup.shard import outcome_of
from tests import tiny
from tests.conftest import InProcess, values, yield_last


def write_random_zoo(source: Path, folder: Path, seed: int) -> None:
    """Seven ingredients: trained ones, moved about at random; with a duplicate in every second zoo and a bad one in every
    third."""
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


def of_model(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Outcome:
    with torch.inference_mode():
        return outcome_of(model(images), labels)


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
        return int(of_model(model, images, labels).correct.sum())

    order = sorted(range(len(states)), key=lambda k: (-int(held_out[k].correct.sum()), held_out[k].nll, k))
    kept = [order[0]]
    best = correct(kept)
    for k in order[1:]:
        found = correct([*kept, k])
        if found > best or (found == best and not strict):
            kept, best = [*kept, k], found
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_plain_loop(zoo: Path, tmp_path: Path, seed: int) -> None:
    (tmp_path / "zoo").mkdir()
    write_random_zoo(zoo / "zoo", tmp_path / "zoo", seed)
    keep = (">=", ">")[seed // 2 % 2]
    recipe = make_recipe(
        {**values(zoo, method="greedy", greedy={"keep": keep}), "ingredients": str(tmp_path / "zoo" / "*.safetensors")}
    )
    actors = InProcess(recipe, size=1 + seed % 3)
    states = [load_file(f) for f in sorted((tmp_path / "zoo").glob("*.safetensors"))]
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())
    held_out = []
    for state in states:
        model = tiny.Tiny().eval()
        model.load_state_dict(state)
        held_out.append(of_model(model, images, labels))
    split = Split("fit", np.arange(597, dtype=np.int32))
    search = greedy(actors, dict(enumerate(held_out)), [split], keep)
    assert search.kept == plain_greedy(states, held_out, strict=keep == ">")
    assert search.candidates == 6
    assert 0 < search.looked <= 6 * 597
    assert all(line["looked"] == 597 for line in search.trail if line["kept"])
    if seed % 2:  # a duplicate has the same outcome: it comes right behind its twin
        order = ranking(dict(enumerate(held_out)))
        assert order.index(6) == order.index(2) + 1


def test_a_candidate_is_the_same_whoever_is_asked(zoo: Path) -> None:
    """An actor that has mixed nothing yet, one that has gone through the search, and one that went another way."""
    recipe = make_recipe(values(zoo, method="greedy"))
    split = [Split("fit", np.arange(200, dtype=np.int32))]
    old, new = InProcess(recipe), InProcess(recipe)
    old.try_candidate((4,), 1, split)
    old.try_candidate((4,), 2, split)
    old.try_candidate((4, 2), 0, split)
    old.try_candidate((4, 2, 0), 7, split)
    new.try_candidate((3,), 5, split)
    assert old.try_candidate((4, 2, 0), 7, split) == new.try_candidate((4, 2, 0), 7, split)
    assert torch.equal(old.shards[0].theta, new.shards[0].theta)
    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in (4, 2, 0, 7)]
    for name, start, stop in old.layout.spans():
        mean = torch.stack([s[name].double().view(-1) for s in states]).mean(0).float()
        torch.testing.assert_close(old.shards[0].theta[start:stop], mean, rtol=1e-6, atol=1e-9)


def test_the_mean_of_some() -> None:
    np.testing.assert_array_equal(mean_of([2, 0], 4)[:, 0], [0.5, 0, 0.5, 0])


def test_the_ensemble_is_the_mean_of_the_logits_whoever_is_asked(zoo: Path) -> None:
    """Two actors that went through all members, and two that took their places at the end."""
    recipe = make_recipe(values(zoo, method="greedy"))
    paths = tuple(str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(4))
    splits = [Split("fit", np.arange(100, 331, dtype=np.int32)), Split("test", np.arange(600, dtype=np.int32))]
    actors, others = InProcess(recipe, 2).shards, InProcess(recipe, 2).shards
    parts = [[split.parts(2)[rank] for split in splits] for rank in range(2)]
    members = [[yield_last(s.evaluate_member(paths[: k + 1], parts[s.rank])) for s in actors] for k in range(4)]
    found = [yield_last(s.evaluate_ensemble(paths, parts[s.rank])) for s in actors]
    again = [yield_last(s.evaluate_ensemble(paths, parts[s.rank])) for s in others]
    images = {"fit": tiny.digits()[0][600:1197], "test": tiny.digits()[0][1197:]}
    labels = {"fit": tiny.digits()[1][600:1197], "test": tiny.digits()[1][1197:]}
    for n, split in enumerate(splits):
        logits = []
        for k, path in enumerate(paths):
            model = tiny.Tiny()
            model.load_state_dict(load_file(path))
            with torch.inference_mode():
                logits.append(model(torch.from_numpy(images[split.source][split.rows])))
            alone = outcome_of(logits[-1], torch.from_numpy(labels[split.source][split.rows]))
            one = join([members[k][rank][n] for rank in range(2)])
            np.testing.assert_allclose(one.loss, alone.loss, rtol=1e-4, atol=1e-6)
        expected = outcome_of(torch.stack(logits).mean(0), torch.from_numpy(labels[split.source][split.rows]))
        for outcomes in (found, again):
            together = join([outcomes[rank][n] for rank in range(2)])
            np.testing.assert_allclose(together.loss, expected.loss, rtol=1e-4, atol=1e-6)
            assert together.factored is not None
