"""Adapters on actors of this process, compared with PEFT and with autograd through the changed weights."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ray_soup.errors import IngredientError
from ray_soup.io.lifting import group_of
from ray_soup.mixing import directions
from ray_soup.mixing.adapter_store import AdapterStore
from ray_soup.mixing.blocks import partition
from ray_soup.mixing.hyperplane import Hyperplane
from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split
from tests.adapters import CONFIGS, loaded, values, write_adapters, write_texts
from tests.conftest import InProcess
from tests.unit.task.language_models import sum_and_count

pytest.importorskip("peft")
K = len(CONFIGS)
C = np.array([0.4, -0.3, 0.7, 0.2, -0.2, 0.2])
FIT = Split("fit", np.arange(8, dtype=np.int32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder)
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def pool(made: Path) -> InProcess:
    return InProcess(make_recipe(values(made)))


@pytest.fixture(scope="module")
def weights(made: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of the base merged with each adapter by PEFT, float64."""
    return [
        {n: t.double() for n, t in loaded(made, made / "runs" / str(k), merge=True).state_dict().items()} for k in range(K)
    ]


def sequences(pool: InProcess, split: Split) -> list[torch.Tensor]:
    examples = pool.shards[0].replica.examples[split.source]
    return [torch.from_numpy(examples.images[row, 0, : examples.lengths[row]].astype(np.int64)) for row in split.rows]


def test_figures_of_each_adapter_are_those_of_peft_and_transformers(made: Path, pool: InProcess) -> None:
    split = Split("test", np.arange(pool.setup_info.sizes["test"], dtype=np.int32))
    for k in range(K):
        model = loaded(made, made / "runs" / str(k))
        total = np.sum([sum_and_count(model, ids.tolist()) for ids in sequences(pool, split)], axis=0)
        (outcome,) = pool.evaluate_file(str(made / "runs" / str(k)), [split])
        assert outcome.nll == pytest.approx(total[0] / total[1], rel=1e-5)
        assert outcome.weight.sum() == total[1]


@pytest.mark.parametrize("blocks", ["model", "layer", "tensor"])
def test_the_gradient_equals_autograd_through_the_changed_weights(
    made: Path, pool: InProcess, weights: list[dict[str, torch.Tensor]], blocks: str
) -> None:
    """With respect to the coefficients of each block, of the library's own loss, in float64."""
    info = pool.open_all(blocks)
    parts = partition(pool.layout, blocks)
    names, count = [parts.names[b] for b in range(parts.count)], info.partition.count
    c = torch.from_numpy(np.repeat(C[:, None], count, axis=1) + 0.1 * _zero_sum(count)).requires_grad_()
    model = loaded(made, made / "runs" / "0", merge=True).double()
    block_of = _blocks_of_weights(pool, info.partition)
    assert set(info.partition.names) <= set(names)
    mixed = {}
    for name in weights[0]:
        factors = c[:, block_of[name]] if name in block_of else torch.full((K,), 1 / K, dtype=torch.float64)
        mixed[name] = sum(factors[k] * weights[k][name] for k in range(K))
    total = torch.zeros((), dtype=torch.float64)
    for ids in sequences(pool, FIT):
        if len(ids) > 1:
            out = torch.func.functional_call(model, mixed, (), {"input_ids": ids[None], "labels": ids[None]})
            total = total + out.loss * (len(ids) - 1)
    total.backward()
    assert c.grad is not None
    expected = c.grad.numpy() - c.grad.numpy().mean(axis=0)
    pool.begin(np.arange(K), np.zeros((K, count)), "float32")
    x = (c.detach().numpy() - 1 / K).astype(np.float32)
    (part,) = pool.step(x, 1.0, FIT)
    assert part.loss == pytest.approx(total.item(), rel=1e-5)
    assert np.abs(part.gradient - expected).max() <= 1e-5 * np.abs(expected).max()


def _zero_sum(blocks: int) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(K, blocks))
    return noise - noise.mean(axis=0)


def _blocks_of_weights(pool: InProcess, parts: Any) -> dict[str, int]:
    """The block of each weight of the base that adapters change."""
    group = group_of(pool.inputs.ingredients)
    block_of = dict(zip(pool.layout.names, parts.block.tolist(), strict=True))
    found = {f"{module}.weight": block_of[one.b] for module, one in group.modules.items()}
    return found | {tensor.base: block_of[name] for name, tensor in group.whole.items()}


def test_uniform_coefficients_give_the_mean_of_the_merged_models(
    made: Path, pool: InProcess, weights: list[dict[str, torch.Tensor]]
) -> None:
    pool.open_all("model")
    pool.begin(np.arange(K), np.zeros((K, 1)), "float32")
    score = pool.evaluate(np.zeros((K, 1), np.float32), 1.0, FIT)
    model = loaded(made, made / "runs" / "0", merge=True)
    model.load_state_dict({name: sum(w[name] for w in weights).float() / K for name in weights[0]})
    total = np.sum([sum_and_count(model, ids.tolist()) for ids in sequences(pool, FIT)], axis=0)
    assert score.loss == pytest.approx(total[0], rel=1e-5)


def test_the_sparse_store_combines_and_projects_as_a_dense_one(pool: InProcess) -> None:
    """Of all lifted tensors as K whole directions, for a slice that begins and ends inside rows of factors."""
    shard = pool.shards[0]
    pool.open_all("tensor")
    store = shard.store
    assert isinstance(store, AdapterStore)
    dense = yield_last_value(directions.open_store(pool.inputs.ingredients, pool.layout, "float32"))
    low, high = 333, pool.layout.numel - 4321
    random = np.random.default_rng(0)
    for chosen in (np.arange(K), np.array([1, 4])):
        parts, _ = store.blocks(partition(pool.layout, "tensor"))
        sparse_plane = pool_plane(store, parts, low, high)
        dense_plane = Hyperplane(dense, parts, low, high, torch.device("cpu"))
        assert np.allclose(store.center, dense.center, rtol=1e-6, atol=1e-7)
        x = random.normal(size=(len(chosen), parts.count)).astype(np.float32)
        base, gradient = (torch.from_numpy(random.normal(size=high - low).astype(np.float32)) for _ in range(2))
        outs, projected = [], []
        for plane in (sparse_plane, dense_plane):
            plane.choose(chosen)
            out = torch.empty(high - low)
            plane.combine(out, base, x)
            outs.append(out)
            projected.append(plane.project(gradient))
        assert torch.allclose(outs[0], outs[1], rtol=1e-5, atol=1e-5)
        assert np.abs(projected[0] - projected[1]).max() <= 1e-5 * np.abs(projected[1]).max()


def pool_plane(store: AdapterStore, parts: Any, low: int, high: int) -> Any:
    from ray_soup.mixing.stores import plane_on

    return plane_on(store, parts, low, high, torch.device("cpu"), 1)


def yield_last_value(work: Any) -> Any:
    try:
        while True:
            next(work)
    except StopIteration as stop:
        return stop.value


def test_norms_and_cosines_are_those_of_the_changes_of_weights(
    pool: InProcess, weights: list[dict[str, torch.Tensor]]
) -> None:
    info = pool.open_all("tensor")
    names = list(_blocks_of_weights(pool, info.partition))
    vectors = {name: np.stack([w[name].numpy().ravel() for w in weights]) for name in names}
    centered = {name: found - found.mean(axis=0) for name, found in vectors.items()}
    for name, block in _blocks_of_weights(pool, info.partition).items():
        assert np.allclose(info.norms[:, block], np.linalg.norm(centered[name], axis=1), rtol=1e-5)
    gram = sum(found @ found.T for found in centered.values())
    assert np.allclose(pool.gram(), gram, rtol=1e-5, atol=1e-5 * np.abs(gram).max())
    of_blocks = pool.gram_of_blocks()
    for name, block in _blocks_of_weights(pool, info.partition).items():
        expected = centered[name] @ centered[name].T
        assert np.allclose(of_blocks[block], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_memory_is_that_of_the_base_and_of_all_adapters_once(made: Path, pool: InProcess) -> None:
    pool.open_all("tensor")  # what is imported and compiled comes first
    pool = InProcess(make_recipe(values(made)))
    tracemalloc.start()  # of arrays, not of tensors
    pool.open_all("tensor")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    shard = pool.shards[0]
    store, replica = shard.store, shard.replica
    own = sum(i.numel for a in group_of(pool.inputs.ingredients).adapters for i in a.tensors.values())
    assert pool.layout.numel == own
    assert store.rows.nbytes == store.center.nbytes == 4 * own
    whole = dict(replica.model.base.named_parameters())
    trained = {id(p) for p in replica.model.parameters()}
    assert all(not p.requires_grad and p.grad is None for p in whole.values() if id(p) not in trained)
    assert len(replica.theta) == len(replica.gradient) == own
    moving = [name for name, p in replica.model.named_parameters() if p.requires_grad]
    assert all("lora_A" not in name for name in moving)
    assert peak < K * sum(p.numel() for p in whole.values())  # bytes: no difference of a whole model for each ingredient


def test_two_actors_agree_with_one(made: Path, pool: InProcess) -> None:
    two = InProcess(make_recipe(values(made)), 2)
    x = (0.1 * _zero_sum(15)).astype(np.float32)
    found = []
    for one in (pool, two):
        one.open_all("tensor")
        one.begin(np.array([0, 2, 5]), x, "float32")
        parts = one.step(x[[0, 2, 5]], 1.0, FIT)
        found.append((sum(p.loss for p in parts), sum(p.gradient for p in parts)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert np.allclose(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_a_subset_of_the_adapters_has_the_mean_of_its_own(
    made: Path, pool: InProcess, weights: list[dict[str, torch.Tensor]]
) -> None:
    from ray_soup.io.progress import no_progress

    some = (1, 3, 5)
    pool.open_store(some, "model", no_progress)
    pool.begin(np.arange(3), np.zeros((3, 1)), "float32")
    score = pool.evaluate(np.array([[0.5], [-0.2], [-0.3]], np.float32), 1.0, FIT)
    model: nn.Module = loaded(made, made / "runs" / "0", merge=True)
    c = np.array([0.5, -0.2, -0.3]) + 1 / 3
    model.load_state_dict({n: sum(f * weights[k][n] for f, k in zip(c, some, strict=True)).float() for n in weights[0]})
    total = np.sum([sum_and_count(model, ids.tolist()) for ids in sequences(pool, FIT)], axis=0)
    assert score.loss == pytest.approx(total[0], rel=1e-5)
    mixed = np.zeros(len(weights))
    mixed[list(some)] = c
    assert pool.try_mixture(mixed, [FIT]).loss == pytest.approx(total[0], rel=1e-5)
    greedy = pool.try_candidate((1, 3), 5, [FIT])
    model.load_state_dict({n: sum(weights[k][n] for k in some).float() / 3 for n in weights[0]})
    total = np.sum([sum_and_count(model, ids.tolist()) for ids in sequences(pool, FIT)], axis=0)
    assert greedy.loss == pytest.approx(total[0], rel=1e-5)


def test_another_base_is_another_model_for_caches_and_for_resuming(made: Path, pool: InProcess, tmp_path: Path) -> None:
    """Also with the adapters that name no base on this machine."""
    folder = tmp_path / "own"
    shutil.copytree(made, folder)
    for file in folder.glob("runs/*/adapter_config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(config | {"base_model_name_or_path": "someone/base"}), encoding="utf-8")
    found = []
    for _ in range(2):
        one = InProcess(make_recipe(values(folder)))
        found.append(
            (one.setup_info.fingerprint, one.inputs.ingredients[0].identity, one.inputs.ingredients[0].identity_here())
        )
        file = folder / "base" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert all(first != second for first, second in zip(*found, strict=True))
    with pytest.raises(IngredientError, match=r"base/model.safetensors changed while it was in use"):
        one.inputs.ingredients[0].check_unchanged()
