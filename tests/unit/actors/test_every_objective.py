"""Steps, scores, outcomes and ensembles of every objective: equal to torch and autograd, however examples are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ray_soup.actors.evaluation import score
from ray_soup.errors import RecipeError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.running_statistics import averaged
from ray_soup.recipe import make_recipe
from ray_soup.soups.evaluations import figures_of
from ray_soup.task.data import Split
from ray_soup.task.objective import IGNORED, VOID, Objective
from ray_soup.task.outcomes import Outcome, Score, join_outcomes, load_outcomes, save_outcomes
from tests.conftest import InProcess, yield_last
from tests.kinds import KINDS, ClassAndNumber, Kind, by_class, classes_and_numbers

Zoos = dict[str, Path]
FIT = Split("fit", np.arange(41, dtype=np.int32))
TEST = Split("test", np.arange(30, dtype=np.int32))
C = np.array([0.4, -0.3, 0.7, 0.2])


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Zoos:
    made = {}
    for name, kind in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        kind.write(made[name])
    return made


def examples(folder: Path, split: Split, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """Read inputs and targets of a split, floats with a dtype."""
    with np.load(folder / f"{split.source}.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name][split.rows]) for name in arrays.files}
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    targets = tensors.pop("labels" if "labels" in tensors else "targets")
    if targets.dtype == torch.uint8:
        targets = torch.where(targets == VOID, IGNORED, targets.long())
    return tensors if len(tensors) > 1 else next(iter(tensors.values())), targets


def pool_of(name: str, zoos: Zoos, size: int = 1, **changes: Any) -> InProcess:
    return InProcess(make_recipe(KINDS[name].values(zoos[name], **changes)), size)


def member(kind: Kind, folder: Path, k: int) -> nn.Module:
    model = kind.build()
    model.load_state_dict(load_file(folder / "zoo" / f"model_{k}.safetensors"))
    return model.eval()


class Through(nn.Module):
    """The outputs of a model, whose parameters `functional_call` replaces."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self.model = kind, kind.build()

    def forward(self, inputs: Any) -> torch.Tensor:
        return self.kind.outputs(self.model, inputs)


def by_autograd(kind: Kind, folder: Path, layout: Any, factor: float, smoothing: float) -> tuple[float, np.ndarray, float]:
    """Loss and gradients with respect to c and the factor, in float64, through sum_k c_k theta_k as one graph."""
    inputs, targets = examples(folder, FIT, torch.float64)
    c = torch.from_numpy(C).requires_grad_()
    t = torch.tensor(factor, dtype=torch.float64, requires_grad=True)
    thetas = [load_file(folder / "zoo" / f"model_{k}.safetensors") for k in range(4)]
    mixed = {f"model.{n}": sum(c[k] * thetas[k][n].double() for k in range(4)) for n in layout.names}
    outputs = torch.func.functional_call(Through(kind), mixed, (inputs,))
    scaled = outputs if not kind.is_scaled else outputs * t
    loss = kind.losses(scaled, targets, smoothing).sum() if smoothing else kind.losses(scaled, targets).sum()
    loss.backward()
    return loss.item(), c.grad.numpy(), 0.0 if t.grad is None else t.grad.item()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_with_respect_to_c_equals_autograd_through_the_soup(zoos: Zoos, name: str) -> None:
    """dL/dc_k projected on the hyperplane where the coefficients add up to 1, for micro-batches of 1, 7 and 64."""
    kind = KINDS[name]
    smoothing = 0.1 if kind.smooth else 0.0
    for micro_batch in (1, 7, 64):
        learn = {"batch_size": 41, "micro_batch": micro_batch, "label_smoothing": smoothing}
        pool = pool_of(name, zoos, blocks="model", learn=learn)
        pool.open_all("model")
        pool.begin(np.arange(4), np.zeros((4, 1)), "float32")
        (partial,) = pool.step((C - 0.25)[:, None].astype(np.float32), 1.5, FIT)
        loss, gradient, by_factor = by_autograd(kind, zoos[name], pool.layout, 1.5, smoothing)
        assert partial.loss == pytest.approx(loss, rel=1e-5)
        expected = gradient - gradient.mean()  # a direction is theta_k minus the mean
        assert np.abs(partial.gradient[:, 0] - expected).max() <= 1e-5 * np.abs(expected).max()
        assert partial.by_factor == pytest.approx(by_factor, rel=1e-5, abs=1e-4)
        assert partial.weight == kind.units(examples(zoos[name], FIT)[1]).sum()


@pytest.mark.parametrize("name", KINDS)
def test_a_step_of_three_actors_adds_up_to_that_of_one(zoos: Zoos, name: str) -> None:
    found = []
    for size in (1, 3):
        pool = pool_of(name, zoos, size)
        x = 0.1 * np.random.default_rng(0).standard_normal((4, pool.open_all("tensor").partition.count))
        pool.begin(np.arange(4), np.zeros_like(x), "float32")
        parts = pool.step(x.astype(np.float32), 1.0, FIT)
        found.append((sum(p.gradient for p in parts), sum(p.loss for p in parts), sum(p.weight for p in parts)))
        total = pool.evaluate(x.astype(np.float32), 1.0, FIT)
        assert total.loss == pytest.approx(found[-1][1], rel=1e-6)
        assert (total.weight, total.count) == (found[-1][2], len(FIT))
    (gradient, loss, weight), (theirs, their_loss, their_weight) = found
    assert np.abs(gradient - theirs).max() <= 1e-5 * np.abs(gradient).max()
    assert loss == pytest.approx(their_loss, rel=1e-6)
    assert weight == their_weight


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))


class OfDoubled(Objective):
    """Calls the model on twice its inputs."""

    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        return model(2 * inputs)

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return outputs.abs().sum(1)


def test_running_statistics_are_those_of_the_model_as_the_objective_calls_it(tmp_path: Path) -> None:
    here = "tests.unit.actors.test_every_objective"
    kind = Kind(f"{here}:OfDoubled", normed, classes_and_numbers, by_class)
    kind.write(tmp_path)
    pool = InProcess(make_recipe(kind.values(tmp_path, model=f"{here}:normed")))
    sums = yield_last(pool.shards[0].sum_statistics_of_file(str(tmp_path / "zoo" / "model_0.safetensors"), [FIT]))
    inputs, _ = examples(tmp_path, FIT)
    np.testing.assert_allclose(averaged([sums])["0.running_mean"], 2 * inputs.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (7, 1), (64, 1), (7, 3)])
def test_scores_of_an_objective_are_kept_for_each_example(zoos: Zoos, tmp_path: Path, micro_batch: int, size: int) -> None:
    kind, folder = KINDS["two_heads"], zoos["two_heads"]
    pool = pool_of("two_heads", zoos, size, learn={"batch_size": 13, "micro_batch": micro_batch})
    paths = tuple(str(folder / "zoo" / f"model_{k}.safetensors") for k in range(4))
    for end in range(1, 5):
        pool.evaluate_member(paths[:end], [TEST])
    outputs, targets = of_all(kind, folder, TEST)
    (alone,), (together,) = pool.evaluate_file(paths[2], [TEST]), pool.evaluate_ensemble(paths, [TEST])
    save_outcomes({"alone": alone, "together": together}, tmp_path / "outcomes.npz")
    kept = load_outcomes(tmp_path / "outcomes.npz")
    for name, expected in (("alone", outputs[2]), ("together", outputs.mean(0))):
        named = kept[name].named
        assert named is not None
        assert named.dtype.names == ("top-2", "distance")
        np.testing.assert_array_equal(named["top-2"], (expected[:, :5].topk(2).indices == targets[:, :1]).any(1))
        np.testing.assert_allclose(named["distance"], (expected[:, 5] - targets[:, 1]).abs(), rtol=1e-5, atol=1e-6)
        assert figures_of({"test": kept[name]})["test_distance"] == named["distance"].mean()


class OverRows(ClassAndNumber):
    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        return super().outputs(model, inputs).softmax(0)


class FirstRow(ClassAndNumber):
    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        return super().outputs(model, inputs)[:1]


@pytest.mark.parametrize(
    ("name", "said"), [("OverRows", "for the first example of .* change by"), ("FirstRow", "have 1 rows")]
)
def test_outputs_that_depend_on_other_examples_are_refused(zoos: Zoos, name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"the outputs of {name} {said}"):
        pool_of("two_heads", zoos, objective=f"tests.unit.actors.test_every_objective:{name}")


def figures(outcome: Outcome) -> tuple[float, float | None]:
    return outcome.nll, outcome.accuracy


@pytest.mark.parametrize("name", KINDS)
def test_figures_of_a_checkpoint_are_those_of_torch(zoos: Zoos, name: str) -> None:
    """Losses [n] to 1e-5, whatever the micro-batch and the number of actors."""
    kind, path = KINDS[name], str(zoos[name] / "zoo" / "model_2.safetensors")
    inputs, targets = examples(zoos[name], TEST)
    with torch.inference_mode():
        outputs = kind.outputs(member(kind, zoos[name], 2), inputs)
        losses, weights = kind.losses(outputs, targets), kind.units(targets)
    mean = losses.double().sum() / weights.sum()
    found = []
    for micro_batch, size in ((1, 1), (64, 1), (4, 3), (64, 3)):
        pool = pool_of(name, zoos, size, learn={"batch_size": 13, "micro_batch": micro_batch})
        (outcome,) = pool.evaluate_file(path, [TEST])
        np.testing.assert_allclose(outcome.loss, losses, rtol=1e-5, atol=1e-6)
        assert outcome.nll == pytest.approx(mean.item(), rel=1e-5)
        if outcome.weight is not None:
            np.testing.assert_array_equal(outcome.weight, weights)
        found.append(figures(outcome))
    assert len({accuracy for _, accuracy in found}) == 1
    assert np.ptp([nll for nll, _ in found]) <= 1e-6 * abs(found[0][0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [1, 7])
def test_a_score_is_the_sum_of_the_outcomes(zoos: Zoos, name: str, parts: int) -> None:
    (shard,) = pool_of(name, zoos, select_by="metric", metric="tests.unit.actors.test_every_objective:largest").shards
    (outcome,) = yield_last(shard.evaluate_file(str(zoos[name] / "zoo" / "model_1.safetensors"), [TEST], False))
    found = sum((score(shard.replica, part) for part in TEST.parts(parts)), Score())
    assert found.nll == pytest.approx(outcome.nll, rel=1e-6)
    assert found.accuracy == outcome.accuracy
    assert found.mean_metric == pytest.approx(outcome.metric, rel=1e-6)
    assert (outcome.accuracy is None) == (name in ("regression", "own"))


def largest(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A metric of any outputs."""
    return outputs.flatten(1).amax(1)


def dictionaries() -> list[dict[str, Any]]:
    """A dataset whose items are inputs by name and `labels`."""
    inputs = KINDS["causal_lm"].arrays(30, np.random.default_rng(5))
    return [{name: torch.from_numpy(array[row]) for name, array in inputs.items()} for row in range(30)]


def test_a_function_may_return_dictionaries(zoos: Zoos, tmp_path: Path) -> None:
    """The same figures as of the same arrays in a file."""
    np.savez(tmp_path / "test.npz", **KINDS["causal_lm"].arrays(30, np.random.default_rng(5)))
    path, fit = str(zoos["causal_lm"] / "zoo" / "model_1.safetensors"), str(zoos["causal_lm"] / "fit.npz")
    found = []
    for test in (str(tmp_path / "test.npz"), "tests.unit.actors.test_every_objective:dictionaries"):
        (outcome,) = pool_of("causal_lm", zoos, data={"fit": fit, "select": 0.3, "test": test}).evaluate_file(path, [TEST])
        found.append(outcome)
    np.testing.assert_array_equal(found[0].loss, found[1].loss)
    np.testing.assert_array_equal(found[0].weight, found[1].weight)


# Ensembles


def of_all(kind: Kind, folder: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of all members [4, n, ...], and the targets."""
    inputs, targets = examples(folder, split)
    with torch.inference_mode():
        return torch.stack([kind.outputs(member(kind, folder, k), inputs).double() for k in range(4)]), targets


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_an_ensemble_is_the_mean_of_probabilities_logits_or_outputs(zoos: Zoos, name: str, size: int) -> None:
    kind, folder = KINDS[name], zoos[name]
    pool = pool_of(name, zoos, size, learn={"batch_size": 13, "micro_batch": 4})
    paths = tuple(str(folder / "zoo" / f"model_{k}.safetensors") for k in range(4))
    for end in range(1, 5):
        pool.evaluate_member(paths[:end], [FIT, TEST])
    found = pool.evaluate_ensemble(paths, [FIT, TEST])
    for split, outcome in zip((FIT, TEST), found, strict=True):
        outputs, targets = of_all(kind, folder, split)
        if kind.objective in ("token_classification", "masked_lm", "causal_lm", "segmentation"):
            at = 2 if kind.objective == "segmentation" else -1
            together = outputs.softmax(at).mean(0).log()  # of the mean probabilities: cross-entropy adds nothing to them
            assert outcome.correct is None
        else:
            together = outputs.mean(0)
        np.testing.assert_allclose(outcome.loss, kind.losses(together, targets), rtol=1e-5, atol=1e-6)
        weight = np.ones(len(split)) if outcome.weight is None else outcome.weight
        np.testing.assert_array_equal(weight, kind.units(targets))


def test_an_ensemble_that_is_sure_of_the_wrong_class_has_a_finite_loss(zoos: Zoos) -> None:
    """Probabilities below the smallest of float32."""
    objective = pool_of("token_classification", zoos).shards[0].replica.objective
    outputs, targets = torch.tensor([[[0.0, 300.0]]]), torch.tensor([[0]])
    losses, _ = objective.of_members(objective.member(outputs, targets), targets)
    torch.testing.assert_close(losses, torch.tensor([300.0]).to(losses), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["segmentation", "regression"])
def test_parts_without_examples_change_nothing(zoos: Zoos, name: str) -> None:
    """Three actors, two examples."""
    few = Split("test", np.arange(2, dtype=np.int32))
    path = str(zoos[name] / "zoo" / "model_0.safetensors")
    (one,), (three,) = (pool_of(name, zoos, size).evaluate_file(path, [few]) for size in (1, 3))
    for ours, theirs in zip(one.arrays(), three.arrays(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert join_outcomes([one, three]).nll == pytest.approx(one.nll, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_lm", "regression"])
def test_a_step_of_any_objective_can_be_timed(zoos: Zoos, name: str) -> None:
    found = pool_of(name, zoos).time_step(2, 13, no_progress)
    assert (found.images, found.step_s > 0) == (13, True)
