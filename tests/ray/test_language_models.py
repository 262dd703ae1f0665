"""Causal language models of transformers, from an ordinary fine-tuning loop to a soup that the library loads."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.learn import learn
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.run import run
from ray_soup.task import logits
from ray_soup.task.data import Split, cut_splits
from tests.conftest import InProcess
from tests.unit.task.language_models import TEXTS, byte_tokenizer, can_pack, gpt2, llama, nudge, saved, sum_and_count

C = np.array([0.4, -0.3, 0.7, 0.2])
WAYS = {
    "one": (1, 1, "", 0),
    "all": (64, 1, "", 0),
    "three actors": (3, 3, "", 0),
    "packed": (64, 1, "&pack=true", 0),
    "packed, three actors, chunks": (5, 3, "&pack=true", 320 * 7),
    "chunks": (64, 1, "", 320 * 7),
    "chunks of one token, checkpoints": (4, 1, "&attn_implementation=eager", 1),
}
"""Examples in a micro-batch, actors, options of the model, and how many logits exist at a time (0: all of them)."""
FIT = Split("fit", np.arange(16, dtype=np.int32))
MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2}


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "ingredients": str(folder / "zoo"),
        "model": f"transformers:{folder}/init?length=64",
        "data": {"fit": str(folder / "fit.jsonl"), "select": 0.4, "test": str(folder / "test.jsonl")},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "directions": {"dtype": "float32"},
        "precision": "float32",
        **changes,
    }


def ways_of(model: nn.Module) -> list[str]:
    return [way for way in WAYS if can_pack(type(model).__name__[:4].lower()) or "packed" not in way]


def pool_of(folder: Path, patch: pytest.MonkeyPatch, way: str, batch_size: int, **changes: Any) -> InProcess:
    """Actors that compute in one of WAYS."""
    micro_batch, size, options, chunk = WAYS[way]
    learn = {"batch_size": batch_size, "micro_batch": micro_batch, "gradient_checkpointing": "checkpoints" in way}
    recipe = values(folder, learn=learn, **changes)
    patch.setattr(logits, "CHUNK", chunk)
    patch.setattr(logits, "MOST_OUTPUTS", 0 if chunk else 1 << 26)
    pool = InProcess(make_recipe({**recipe, "model": recipe["model"] + options}), size)
    replica = pool.shards[0].replica
    with torch.inference_mode():
        outputs = replica.model(replica.examples["fit"].batch(np.arange(2), replica.device)[0])
    assert isinstance(outputs, logits.Logits) == bool(chunk)
    return pool


def write_texts(file: Path, texts: list[str]) -> None:
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")


@pytest.fixture(scope="module", params=MODELS)
def near(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[nn.Module]]:
    """Four random models near each other, and documents of one and of several windows."""
    folder, words, models = tmp_path_factory.mktemp("near"), byte_tokenizer(), []
    saved(MODELS[request.param](), words, folder / "init")
    for k in range(4):
        model = MODELS[request.param]()
        nudge(model, k)
        saved(model, None, folder / "zoo" / str(k))
        models.append(model)
    write_texts(folder / "fit.jsonl", [*TEXTS, *(text[::-1] for text in TEXTS[3:])])
    write_texts(folder / "test.jsonl", [text.upper() for text in TEXTS])
    return folder, models


def by_library(model: nn.Module, folder: Path, name: str, length: int = 64, words: Any = None) -> dict[int, np.ndarray]:
    """Loss and number of tokens of each document: `model(labels=...)` for each window, which begins with a known token."""
    words, found = words or byte_tokenizer(), {}
    for number, line in enumerate((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
        ids = words(json.loads(line)["text"])["input_ids"]
        starts = range(0, max(1, len(ids) - 1), length - 1)
        total = np.sum([sum_and_count(model, ids[first : first + length]) for first in starts], axis=0)
        if total[1]:
            found[number] = total
    return found


def test_figures_are_those_of_the_library_for_any_batch_and_number_of_actors(
    near: tuple[Path, list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, models = near
    expected = by_library(models[2], folder, "test")
    mean = sum(loss for loss, _ in expected.values()) / sum(count for _, count in expected.values())
    found = []
    for way in ways_of(models[0]):
        pool = pool_of(folder, monkeypatch, way, 8)
        split = Split("test", np.arange(pool.setup_info.sizes["test"], dtype=np.int32))
        (outcome,) = pool.evaluate_file(str(folder / "zoo" / "2"), [split])
        for number, (loss, count) in expected.items():
            assert outcome.loss[outcome.group == number].sum() == pytest.approx(loss, rel=1e-5)
            assert outcome.weight[outcome.group == number].sum() == count
        assert outcome.nll == pytest.approx(mean, rel=1e-5)
        paths = tuple(str(folder / "zoo" / str(k)) for k in range(4))
        for k in range(4):
            pool.evaluate_member(paths[: k + 1], [split])
        (ensemble,) = pool.evaluate_ensemble(paths, [split])
        found.append((outcome.nll, outcome.accuracy, outcome.bits_per_byte, ensemble.nll))
    for figures in found:
        assert figures == pytest.approx(found[0], rel=1e-6)
    nbytes = sum(len(TEXTS[number].upper().encode()) for number in expected)
    assert found[0][2] == pytest.approx(sum(loss for loss, _ in expected.values()) / np.log(2) / nbytes, rel=1e-5)


def test_the_gradient_with_respect_to_c_equals_autograd_through_the_soup(
    near: tuple[Path, list[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the library's own loss, in float64, through sum_k c_k theta_k."""
    folder, models = near
    c = torch.from_numpy(C).requires_grad_()
    soup = models[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for way in ways_of(models[0]):
        pool = pool_of(folder, monkeypatch, way, 16, blocks="model")
        if not total.requires_grad:
            examples = pool.shards[0].replica.examples["fit"]
            thetas = [load_file(folder / "zoo" / str(k) / "model.safetensors") for k in range(4)]
            mixed = {n: sum(c[k] * thetas[k][n].double() for k in range(4)) for n in pool.layout.names}
            for row in FIT.rows:
                ids = torch.from_numpy(examples.images[row, 0, : examples.lengths[row]].astype(np.int64))[None]
                out = torch.func.functional_call(soup, mixed, (), {"input_ids": ids, "labels": ids})
                total = total + out.loss * (ids.shape[1] - 1)
            total.backward()
        pool.open_all("model")
        pool.begin(np.arange(4), np.zeros((4, 1)), "float32")
        parts = pool.step((C - 0.25)[:, None].astype(np.float32), 1.0, FIT)
        gradient = c.grad.numpy() - c.grad.numpy().mean()
        assert sum(part.loss for part in parts) == pytest.approx(total.item(), rel=1e-5)
        found = sum(part.gradient[:, 0] for part in parts)
        assert np.abs(found - gradient).max() <= 1e-5 * np.abs(gradient).max()
    soup.float()


def test_a_document_is_in_fit_or_in_select_as_a_whole(near: tuple[Path, list[nn.Module]]) -> None:
    folder, _ = near
    pool = InProcess(make_recipe(values(folder)))
    groups = pool.shards[0].replica.examples["fit"].groups
    for seed in range(5):
        data = pool.shards[0].recipe.data
        splits = cut_splits(data, pool.setup_info.sizes, pool.setup_info.fit_digests, seed)
        assert not {*groups[splits["fit"].rows]} & {*groups[splits["select"].rows]}


def test_one_actor_and_three_learn_the_same_coefficients(
    near: tuple[Path, list[nn.Module]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, models = near
    found = []
    for way in ("one", "three actors", "packed, three actors, chunks"):
        if way not in ways_of(models[0]):
            continue
        pool = pool_of(folder, monkeypatch, way, 16, blocks="tensor")
        store, recipe = pool.open_all("tensor"), pool.shards[0].recipe
        splits = cut_splits(recipe.data, pool.setup_info.sizes, pool.setup_info.fit_digests, 0)
        state = learn(recipe, pool, store.norms, splits, 4, tmp_path / f"{way}.pt")
        found.append(parametrization(False, store.norms).coefficients(state.y.numpy()))
    assert np.abs(found[0] - 1 / 4).max() > 0.01
    for coefficients in found[1:]:
        assert np.linalg.norm(coefficients - found[0]) <= 1e-4 * np.linalg.norm(found[0])


# A whole run


def docstrings() -> list[str]:
    """The longer docstrings of Python's standard library, in a random order."""
    found = set()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                found |= {text} if len(text) > 150 else set()
    texts = sorted(found)
    return [texts[k] for k in np.random.default_rng(0).permutation(len(texts))]


def train(model: nn.Module, words: Any, texts: list[str], seed: int, lr: float, epochs: int) -> None:
    """Fine-tune as scripts do: documents one after another in blocks of equal length, with the library's loss."""
    stream = [token for text in texts for token in [*words(text)["input_ids"], 1]]
    blocks = torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(blocks), generator=generator).split(32)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches) + 1, pct_start=0.1)
    model.train()
    for rows in batches:
        optimizer.zero_grad()
        model(input_ids=blocks[rows], labels=blocks[rows]).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, one_thread_here: None) -> Path:
    """Six fine-tunes of one tiny Llama on different parts of the text."""
    folder, texts, words = tmp_path_factory.mktemp("tuned"), docstrings(), byte_tokenizer(docstrings()[:200], 512)
    write_texts(folder / "fit.jsonl", texts[:300])
    write_texts(folder / "test.jsonl", texts[300:500])
    training = texts[500:1100]
    model = llama(512, std=0.02)
    train(model, words, training, 0, 1e-2, 5)
    saved(model, words, folder / "init")
    for k in range(6):
        torch.manual_seed(k)
        own = llama(512)
        own.load_state_dict(model.state_dict())
        train(own, words, training[k * 100 : k * 100 + 100], k + 1, 5e-3, 4)
        saved(own, words, folder / "zoo" / f"run_{k}")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_learned_soup_of_fine_tuned_models_beats_the_best_of_them_and_their_mean(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NLL per token, paired by document; the library loads the soup with the same figure.

    So does each way to compute it: one document after another, packed, and with three actors.
    """
    from transformers import AutoModelForCausalLM

    found, paths = {}, dict[str, Path | str]()
    for method in ("uniform", "mehl+"):
        recipe = make_recipe(values(tuned, learn={"epochs": 3, "batch_size": 64}, method=method))
        paths[method] = run(recipe, tmp_path / method).out
    verify(paths["mehl+"])
    pool = InProcess(recipe)
    split = Split("test", np.arange(pool.setup_info.sizes["test"], dtype=np.int32))
    singles = {pool.evaluate_file(str(path), [split])[0].nll: path for path in sorted((tuned / "zoo").iterdir())}
    paths["best single"] = singles[min(singles)]  # the best on test, whichever select would choose
    for name, path in paths.items():
        (outcome,) = pool.evaluate_file(str(path), [split])
        found[name] = outcome
        expected = by_library(AutoModelForCausalLM.from_pretrained(path), tuned, "test", words=words_of(tuned))
        total = np.sum([*expected.values()], axis=0)
        assert outcome.nll == pytest.approx(total[0] / total[1], rel=1e-5)
        print(name, outcome.nll, np.exp(outcome.nll), outcome.accuracy, outcome.bits_per_byte)
    for way in ("one", "packed", "three actors"):
        other = pool_of(tuned, monkeypatch, way, 64)
        (outcome,) = other.evaluate_file(str(paths["mehl+"]), [split])
        assert (outcome.nll, outcome.accuracy) == pytest.approx((found["mehl+"].nll, found["mehl+"].accuracy), rel=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "mehl+" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["test_nll"] == pytest.approx(found["mehl+"].nll, rel=1e-5)
    for name in ("best single", "uniform"):
        test = paired_test(found["mehl+"], found[name])
        print(name, test)
        assert test["nll_high"] < 0
        assert test["nll_p"] < 0.05


def words_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "init")
