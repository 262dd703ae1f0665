"""Models with weights in bfloat16, compared with the library's own loops over its own model in bfloat16."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ray_soup.actors.messages import TrainingJob
from ray_soup.actors.placement import actor_bytes
from ray_soup.actors.precision import IN_WEIGHTS
from ray_soup.errors import RecipeError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.difference import trained
from ray_soup.recipe import make_recipe
from ray_soup.task import logits
from ray_soup.task.attention import FastAttention
from ray_soup.task.data import Split, batch_positions
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import build, describe
from ray_soup.task.transformers_models import built, dtype_name, load_config
from ray_soup.tune.finetune import finetune
from tests import adapters
from tests.conftest import InProcess
from tests.faults import Killed, killing
from tests.gpu_on_cpu import gpu
from tests.ray.test_language_models import by_library, values, write_texts
from tests.unit.task.language_models import TEXTS, byte_tokenizer, llama, nudge, saved, sum_and_count

LOW = "&dtype=bfloat16"
C = np.array([0.4, -0.3, 0.7, 0.2])
FIT = Split("fit", np.arange(10, dtype=np.int32))
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "by layer": {"actors__by_layer": True},
    "layers run again": {"learn__gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four random models near each other in float32, and documents of one and of several windows."""
    folder = tmp_path_factory.mktemp("near")
    saved(llama(), byte_tokenizer(), folder / "init")
    for k in range(4):
        model = llama()
        nudge(model, k)
        saved(model, None, folder / "zoo" / str(k))
    write_texts(folder / "fit.jsonl", [*TEXTS, *(text[::-1] for text in TEXTS[3:])])
    write_texts(folder / "test.jsonl", [text.upper() for text in TEXTS])
    return folder


def pool_of(folder: Path, options: str = LOW, **changes: Any) -> InProcess:
    """One actor that computes one document at a time, unless the changes say otherwise."""
    recipe = values(folder, learn={"micro_batch": 1, "batch_size": 16}, blocks="model")
    recipe |= {"precision": "auto", "model": recipe["model"] + options}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section] = {**recipe[section], name: value} if name else value
    return InProcess(make_recipe(recipe))


def of_library(path: Path | str, task: str = "ForCausalLM") -> nn.Module:
    import transformers

    dtype = {dtype_name(transformers): torch.bfloat16}
    return getattr(transformers, f"AutoModel{task}").from_pretrained(path, **dtype).eval()


def backward(model: nn.Module, ids: torch.Tensor) -> float:
    """Compute the gradient of the summed loss of a sequence by the library's model, and return the loss."""
    model.zero_grad()
    with FastAttention():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        loss = F.cross_entropy(logits, F.pad(ids[0, 1:], (0, 1), value=-100), reduction="sum")
        loss.backward()
    return loss.item()


def everything(pool: InProcess, name: str) -> Split:
    return Split(name, np.arange(pool.setup_info.sizes[name], dtype=np.int32))


def sequences(pool: InProcess, split: Split) -> list[torch.Tensor]:
    examples = pool.shards[0].replica.examples[split.source]
    return [torch.from_numpy(examples.images[row, 0, : examples.lengths[row]].astype(np.int64))[None] for row in split.rows]


@pytest.mark.parametrize("way", [*WAYS, "logits in parts"])
def test_figures_are_those_of_the_library_in_bfloat16(near: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way not in WAYS:
        monkeypatch.setattr(logits, "CHUNK", 320 * 7)
        monkeypatch.setattr(logits, "MOST_OUTPUTS", 0)
    pool, path = pool_of(near, **WAYS.get(way, {})), near / "zoo" / "2"
    (outcome,) = pool.evaluate_file(str(path), [everything(pool, "test")])
    expected = by_library(of_library(path), near, "test")
    for number, (loss, count) in expected.items():
        assert outcome.loss[outcome.group == number].sum() == pytest.approx(loss, rel=1e-5)
        assert outcome.weight[outcome.group == number].sum() == count
    (exact,) = pool_of(near, "").evaluate_file(str(path), [everything(pool, "test")])
    assert 1e-4 < np.abs(outcome.loss / exact.loss - 1).max() < 1e-2


@pytest.mark.parametrize("pack", ["", "&pack=true"])
def test_a_padded_or_packed_batch_has_the_figures_of_the_librarys_padded_batch(near: Path, pack: str) -> None:
    """Packed attention has another kernel, so that rounding in bfloat16 differs."""
    pool, path = pool_of(near, LOW + pack, learn__micro_batch=64), near / "zoo" / "1"
    split, rows = everything(pool, "test"), sequences(pool, everything(pool, "test"))
    (outcome,) = pool.evaluate_file(str(path), [split])
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (0, width - row.shape[1])) for row in rows])
    seen = torch.stack([(torch.arange(width) < row.shape[1]).long() for row in rows])
    with torch.inference_mode():
        logits = of_library(path)(input_ids=ids, attention_mask=seen).logits.float()
    wanted = torch.where(seen == 1, ids, -100)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="none").sum(1)
    np.testing.assert_allclose(outcome.loss, losses.numpy(), rtol=2e-3 if pack else 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_librarys_weights_summed_in_float32(near: Path, way: str) -> None:
    """Of the soup rounded once. The last bits of the loss decide how the first gradient in bfloat16 is rounded."""
    pool = pool_of(near, **WAYS[way])
    pool.open_all("model")
    pool.begin(np.arange(4), np.zeros((4, 1), np.float32), IN_WEIGHTS)
    x = (C - 0.25)[:, None].astype(np.float32)
    for _ in range(2):  # the second step begins with no gradient of the first
        (part,) = pool.step(x, 1.0, FIT)
    exact = pool_of(near, "")
    exact.open_all("model")
    exact.begin(np.arange(4), np.zeros((4, 1), np.float32), "float32")
    (precise,) = exact.step(x, 1.0, FIT)
    theta = dict(exact.shards[0].replica.model.named_parameters())
    model, total, sums = of_library(near / "init"), 0.0, dict[str, torch.Tensor]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theta[name])
            sums[name] = torch.zeros(parameter.shape)
    for ids in sequences(pool, FIT):
        total += backward(model, ids)
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
    thetas = [load_file(near / "zoo" / str(k) / "model.safetensors") for k in range(4)]
    inner = np.array([sum((t[n].double() * g.double()).sum().item() for n, g in sums.items()) for t in thetas])
    expected = inner - inner.mean()
    assert part.loss == pytest.approx(total, rel=1e-5)
    assert np.abs(part.gradient[:, 0] - expected).max() <= 1e-3 * np.abs(expected).max()
    assert np.abs(part.gradient - precise.gradient).max() <= 0.03 * np.abs(expected).max()


def test_the_model_has_the_float32_combination_rounded_once(near: Path) -> None:
    x, found = (C - 0.25)[:, None].astype(np.float32), []
    for options, precision in ((LOW, IN_WEIGHTS), ("", "float32")):
        pool = pool_of(near, options)
        pool.open_all("model")
        pool.begin(np.array([0, 2]), x, precision)
        pool.evaluate(x[[0, 2]], 1.0, FIT)
        found.append({n: p.detach().clone() for n, p in pool.shards[0].replica.model.named_parameters()})
    low, exact = found
    assert {p.dtype for p in low.values()} == {torch.bfloat16}
    assert all(torch.equal(low[name], exact[name].bfloat16()) for name in exact)


def test_every_way_to_hold_a_model_gives_the_same_figures(near: Path) -> None:
    answers = []
    for way in ("whole", "by layer"):
        pool = pool_of(near, **WAYS[way])
        x = np.full((4, pool.open_all("model").partition.count), 0.01, np.float32)
        pool.begin(np.arange(4), x, IN_WEIGHTS)
        file = str(near / "zoo" / "2")
        answers.append(
            [
                pool.evaluate(x, 1.0, FIT),
                pool.evaluate_file(file, [FIT])[0].loss.tolist(),
                pool.evaluate(x, 1.0, FIT),
                pool.try_candidate((0, 3), 1, [FIT]),
                pool.try_mixture(np.array([0.5, 0.0, 0.75, -0.25]), [FIT]),
                pool.evaluate_ensemble((file, str(near / "zoo" / "1")), [FIT])[0].loss.tolist(),
                pool.evaluate(x, 1.0, FIT),
            ]
        )
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][2] == answers[0][6]


# Training all weights


def test_training_has_master_weights_in_float32_and_can_be_killed(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, lr, size, epochs = pool_of(near), 1e-3, 4, 2

    def job(name: str) -> TrainingJob:
        return TrainingJob(
            "training", str(near / "zoo" / "0" / "model.safetensors"), str(tmp_path / name), "task", lr, 0.0, epochs, size,
            7, IN_WEIGHTS, FIT, everything(pool, "test"),
        )  # fmt: skip

    result = pool.train(job("whole"), no_progress)
    monkeypatch.setattr("ray_soup.actors.training.SAVE_EVERY_S", -1.0)
    monkeypatch.setattr("ray_soup.actors.training.SAVING", math.inf)
    with pytest.raises(Killed):
        pool.train(job("cut"), killing(4))
    pool.handles[0].kill()
    pool.setup(no_progress)
    assert pool.train(job("cut"), no_progress).curve == result.curve
    assert result.epoch == 1

    start = load_file(near / "zoo" / "0" / "model.safetensors")
    master = {name: tensor.clone() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(master.values(), lr=lr, weight_decay=0.0)
    model, rows, steps = of_library(near / "zoo" / "0"), sequences(pool, FIT), epochs * 3
    for step in range(steps):
        positions = batch_positions(len(FIT), size, 7, 5, step // 3)[step % 3]
        optimizer.zero_grad()
        scored = sum(rows[row].shape[1] - 1 for row in positions)
        for row in positions:
            backward(model, rows[row])
            for name, parameter in model.named_parameters():
                before = master[name].grad
                master[name].grad = parameter.grad.float() + (0 if before is None else before)
        for tensor in master.values():
            tensor.grad /= scored
        optimizer.param_groups[0]["lr"] = lr * min(step + 1, 0.5 * (1 + np.cos(np.pi * step / steps)))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(master[name])
    difference = load_file(result.difference)
    for name, theirs in master.items():
        ours = trained(start[name], difference[name], torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


# What goes with it


def test_weights_that_the_library_keeps_in_float32_stay_so(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    if not hasattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict"):
        pytest.skip("older libraries keep nothing in float32 beside bfloat16")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.*.input_layernorm", "lm_head"])
    spec = ModelSpec.parse(f"transformers:{near}/init?dtype=bfloat16")
    model = built(spec, load_config(spec.import_library(), spec), "ForCausalLM")
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found == {name: tensor.dtype for name, tensor in of_library(near / "init").state_dict().items()}
    assert sum(dtype == torch.float32 for dtype in found.values()) == 3


def test_models_are_packed_if_they_could_be_in_float32(near: Path) -> None:
    """The check sees no difference in rounding, and leaves the weights in bfloat16."""
    model = build(f"transformers:{near}/init?length=64&pack=true{LOW}").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_refusals_name_what_to_do(near: Path) -> None:
    for dtype, said in (
        ("float16", "expected float32 or bfloat16 for the option 'dtype'. In float16, small gradients become 0"),
        ("int8", "expected float32 or bfloat16 for the option 'dtype'. Fix it."),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            build(f"transformers:{near}/init?dtype={dtype}")
    recipe = {"model": f"transformers:{near}/init?dtype=bfloat16", "data": {"train": "train.npz"}}
    with pytest.raises(RecipeError, match=r"finetune trains weights in float32\. Remove the option dtype"):
        finetune(make_recipe(recipe), near / "zoo")


def test_a_gpu_gives_the_figures_of_a_cpu(near: Path) -> None:
    """Gradients differ by rounding: attention on a CPU has a backward pass in float32."""
    pytest.importorskip("triton")
    found = []
    for gpus in (0, 1):
        with gpu() if gpus else nullcontext():
            pool = pool_of(near, actors__gpus=gpus)
            x = np.full((4, pool.open_all("model").partition.count), 0.01, np.float32)
            pool.begin(np.arange(4), x, pool.choose_precision())
            (part,) = pool.step(2 * x, 1.0, FIT)
            (outcome,) = pool.evaluate_file(str(near / "zoo" / "2"), [FIT])
            found.append((part.loss, part.gradient.ravel().tolist(), outcome.nll))
    for own, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(own, expected, rtol=0.01 if isinstance(own, list) else 1e-5)


def test_attention_that_needs_a_gpu_is_checked_there(near: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("ray_soup.task.transformers_tokens.FLASH", "eager")
    seen = []
    monkeypatch.setattr(torch, "allclose", lambda one, other, **_: seen.append(one.device.type) or True)
    with gpu():
        build(f"transformers:{near}/init?length=64{LOW}&attn_implementation=eager")
    assert seen == ["cuda"]


def test_a_model_whose_attention_needs_a_gpu_is_described_without_one(near: Path) -> None:
    spec = f"transformers:{near}/init?length=64{LOW}"
    assert describe(f"{spec}&attn_implementation=flash_attention_2") == describe(spec)


def test_precision_is_decided_by_the_weights(near: Path) -> None:
    assert pool_of(near).choose_precision() == IN_WEIGHTS
    for precision in ("float32", "bfloat16"):
        with pytest.raises(RecipeError, match=rf"precision: found {precision} with dtype=bfloat16 in .*\. Remove the key"):
            pool_of(near, precision=precision)
    assert pool_of(near, "&dtype=float32", precision="float32").choose_precision() == "float32"


def test_memory_counts_the_weights_besides_their_float32_vector(near: Path) -> None:
    one, other = (
        make_recipe({**values(near), "precision": "auto", "model": f"transformers:m{o}"}) for o in ("", f"?{LOW[1:]}")
    )
    assert actor_bytes(other, 10**9, 4, 1) == actor_bytes(one, 10**9, 4, 1) + 2 * 10**9


# Other models


def test_an_image_classifier_has_the_librarys_predictions(tmp_path: Path) -> None:
    """Pixels become bfloat16, and so do the running statistics of its BatchNorm layers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    for k in range(2):
        torch.manual_seed(k)
        ResNetForImageClassification(config).save_pretrained(tmp_path / "zoo" / str(k))
    images = np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(12) % 3)
    recipe = {
        "ingredients": str(tmp_path / "zoo"), "model": f"transformers:{tmp_path}/zoo/0?dtype=bfloat16", "blocks": "model",
        "data": {"fit": str(tmp_path / "test.npz")}, "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "buffers": "recalibrate",
    }  # fmt: skip
    pool = InProcess(make_recipe(recipe))
    (outcome,) = pool.evaluate_file(str(tmp_path / "zoo" / "1"), [everything(pool, "fit")])
    model = of_library(tmp_path / "zoo" / "1", "ForImageClassification")
    with torch.inference_mode():
        logits = model(torch.from_numpy(images).bfloat16()).logits.float()
    labels = torch.arange(12) % 3
    np.testing.assert_allclose(outcome.loss, F.cross_entropy(logits, labels, reduction="none").numpy(), rtol=1e-5)
    assert outcome.correct.tolist() == (logits.argmax(1) == labels).tolist()
    exact, at, found = InProcess(make_recipe({**recipe, "model": f"transformers:{tmp_path}/zoo/0"})), np.zeros((2, 1)), []
    for one in (pool, exact):
        one.open_all("model")
        one.begin(np.arange(2), at.astype(np.float32), IN_WEIGHTS if one is pool else "float32")
        found.append(one.recalibrate(at.astype(np.float32), [everything(one, "fit")]))
    means = [name for name in found[1] if name.endswith("running_mean")]
    assert len(means) == 6
    for name in means:
        scale = np.sqrt(found[1][name.replace("mean", "var")])
        assert (np.abs(found[0][name] - found[1][name]) < 0.03 * scale).all()


# Adapters


def test_adapters_in_float32_on_a_base_in_bfloat16_have_the_figures_of_peft(tmp_path: Path) -> None:
    """Which adds up products in float32, side by side here, so that single values in bfloat16 may be rounded otherwise."""
    peft = pytest.importorskip("peft")
    adapters.write_adapters(tmp_path)
    adapters.write_texts(tmp_path)
    found = []
    for options in (LOW, ""):
        recipe = {**adapters.values(tmp_path), "precision": "auto" if options else "float32", "learn": {"micro_batch": 1}}
        pool = InProcess(make_recipe({**recipe, "model": recipe["model"] + options}))
        x = (0.01 * np.arange(6)[:, None] * np.ones(pool.open_all("model").partition.count)).astype(np.float32)
        pool.begin(np.arange(6), x, pool.choose_precision())
        found.append((pool, pool.step(x, 1.0, FIT)[0].gradient))
    (pool, gradient), (other, exact) = found
    assert 2 * pool.inputs.frozen == other.inputs.frozen == 4 * sum(p.numel() for p in llama().parameters())
    assert np.abs(gradient - exact).max() <= 0.05 * np.abs(exact).max()
    split = everything(pool, "test")
    for k in (0, 2, 5):  # the last one has a head of its own
        (outcome,) = pool.evaluate_file(str(tmp_path / "runs" / str(k)), [split])
        model = peft.PeftModel.from_pretrained(of_library(tmp_path / "base"), tmp_path / "runs" / str(k)).eval()
        losses = [sum_and_count(model, ids[0].tolist())[0] for ids in sequences(pool, split)]
        np.testing.assert_allclose(outcome.loss, losses, rtol=3e-4)
        assert outcome.loss.sum() == pytest.approx(sum(losses), rel=3e-5)
