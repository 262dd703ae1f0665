"""Soups of LoRA adapters through the commands: real adapters of a tiny Llama, made by PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.io import storage
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.plan import plan
from ray_soup.soups.records import finished_record
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.run import run
from ray_soup.task.data import Split
from tests.adapters import ATTENTION, EVERYTHING, loaded, values, write_adapters, write_texts
from tests.conftest import InProcess, put
from tests.ray.test_language_models import by_library, docstrings, train, words_of
from tests.ray.test_language_models import write_texts as write_documents
from tests.system.command import call, write_recipe
from tests.unit.task.language_models import byte_tokenizer, llama, saved

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
LEARN = {"epochs": 2, "batch_size": 8, "lr": 0.1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder)
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def learned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soup that `ray-soup learn` wrote."""
    out = tmp_path_factory.mktemp("soups") / "learned"
    result = call("learn", write_recipe(made, values(made, learn=LEARN, method="mehl+")), out)
    assert result.exit_code == 0, result.output
    assert "adapter_model.safetensors" in result.output
    return out


def figure(made: Path, soup: Path, name: str = "test") -> float:
    """NLL per token of a soup as PEFT and transformers compute it."""
    total = np.sum([*by_library(loaded(made, soup), made, name).values()], axis=0)
    return float(total[0] / total[1])


def test_peft_loads_the_soup_with_the_figure_that_was_reported(made: Path, learned: Path) -> None:
    row = json.loads((learned / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert figure(made, learned) == pytest.approx(row["test_nll"], rel=1e-5)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(learned)("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    assert "peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM" in (learned / "README.md").read_text("utf-8")


def test_verify_bake_and_evaluate(made: Path, learned: Path, tmp_path: Path) -> None:
    lines = call("verify", learned)
    assert lines.exit_code == 0, lines.output
    assert "29 tensors are bit-identical" in lines.output
    assert f"the base {made}/base has the digest in run.json" in lines.output
    assert call("bake", learned, tmp_path / "again").exit_code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (learned / name).read_bytes()
    assert call("verify", tmp_path / "again").exit_code == 0
    row = json.loads((learned / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    found = call("evaluate", made / "r.yaml", learned, "--json")
    assert json.loads(found.stdout)["test_nll"] == pytest.approx(row["test_nll"], rel=1e-6)


@pytest.mark.parametrize("method", ["greedy", "best-single", "uniform"])
def test_methods_that_learn_nothing(made: Path, tmp_path: Path, method: str) -> None:
    result = call(method, write_recipe(made, values(made)), tmp_path / "soup")
    assert result.exit_code == 0, result.output
    assert call("verify", tmp_path / "soup").exit_code == 0
    row = json.loads((tmp_path / "soup" / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert figure(made, tmp_path / "soup") == pytest.approx(row["test_nll"], rel=1e-5)


def test_compare_and_plan(made: Path, tmp_path: Path) -> None:
    recipe = write_recipe(made, values(made, learn=LEARN))
    result = call("compare", recipe, tmp_path / "all", "--drop-top", "0,1")
    assert result.exit_code == 0, result.output
    assert call("verify", tmp_path / "all").exit_code == 0
    record = finished_record(tmp_path / "all")
    row = next(row for row in record["table"] if row["model_name"] == record["chosen"])
    assert figure(made, tmp_path / "all") == pytest.approx(row["test_nll"], rel=1e-5)
    found = plan(make_recipe(values(made, method="mehl+")))
    assert found["ingredients"] == 6
    assert found["store_bytes_per_node"] == 8 * found["parameters"]  # of all adapters once, and their mean


def test_an_interrupted_run_ends_with_equal_bits_also_on_two_actors(made: Path, learned: Path, tmp_path: Path) -> None:
    recipe = make_recipe(values(made, learn=LEARN, method="mehl+"))

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "soup", stop)
    run(recipe, tmp_path / "soup")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "soup" / name).read_bytes() == (learned / name).read_bytes()
    two = make_recipe({**values(made, learn=LEARN, method="mehl+"), "actors": {"replicas": 2, "shards": 1, "cpus": 1}})
    run(two, tmp_path / "two")
    one, other = (load_coefficients(out / "coefficients.safetensors").values for out in (learned, tmp_path / "two"))
    assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_two_shards_learn_what_one_does(made: Path, learned: Path, tmp_path: Path) -> None:
    recipe = {**values(made, learn=LEARN, method="mehl+"), "actors": {"replicas": 1, "shards": 2, "cpus": 1}}
    run(make_recipe(recipe), tmp_path / "soup")
    one, other = (load_coefficients(out / "coefficients.safetensors").values for out in (learned, tmp_path / "soup"))
    assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


def test_adapters_and_soup_in_a_bucket(made: Path, s3: str, tmp_path: Path) -> None:
    put(made / "runs", f"{s3}/runs")
    recipe = write_recipe(tmp_path, {**values(made, method="uniform"), "ingredients": f"{s3}/runs/*"})
    done = call("uniform", recipe, f"{s3}/soup")
    assert done.exit_code == 0, done.stderr
    lines = verify(f"{s3}/soup")
    assert any("29 tensors are bit-identical" in line for line in lines)
    run(make_recipe(values(made, method="uniform")), tmp_path / "local")
    local = (tmp_path / "local" / "adapter_model.safetensors").read_bytes()
    assert storage.read_bytes(f"{s3}/soup/adapter_model.safetensors") == local


# Adapters that were trained


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, one_thread_here: None) -> Path:
    """Six adapters of one tiny Llama, as of a sweep over learning rates; mixed ranks and modules, one with rsLoRA."""
    folder, texts, words = tmp_path_factory.mktemp("tuned"), docstrings(), byte_tokenizer(docstrings()[:200], 512)
    write_documents(folder / "fit.jsonl", texts[:200])
    write_documents(folder / "test.jsonl", texts[200:400])
    model = llama(512, std=0.02)
    train(model, words, texts[500:800], 0, 1e-2, 4)
    saved(model, words, folder / "base")
    saved(model, words, folder / "init")
    kinds = [(4, EVERYTHING, 3e-3), (8, EVERYTHING, 1e-2), (2, ATTENTION, 3e-2), (8, ATTENTION, 1e-2),
             (4, EVERYTHING, 5e-3), (8, EVERYTHING, 4e-2)]  # fmt: skip
    for k, (rank, modules, lr) in enumerate(kinds):
        torch.manual_seed(k)
        own = llama(512)
        own.load_state_dict(model.state_dict())
        own.name_or_path = str(folder / "base")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=modules, use_rslora=k == 4
        )
        adapted = peft.get_peft_model(own, config)
        train(adapted, words, texts[800 + k * 60 : 860 + k * 60], k + 1, lr, 4)
        adapted.save_pretrained(folder / "runs" / f"run_{k}")
    return folder


def test_a_learned_soup_of_trained_adapters_beats_the_best_of_them_and_the_merges_of_peft(
    tuned: Path, tmp_path: Path
) -> None:
    """In NLL per token on test, paired by document."""
    found, paths = {}, dict[str, Path]()
    learn = {"epochs": 4, "batch_size": 32, "lr": 0.03}
    for method in ("uniform", "mehl", "mehl+"):
        recipe = make_recipe(values(tuned, learn=learn, method=method, baseline="none"))
        paths[method] = Path(str(run(recipe, tmp_path / method).out))
    verify(paths["mehl+"])
    pool = InProcess(recipe)
    split = Split("test", np.arange(pool.setup_info.sizes["test"], dtype=np.int32))
    singles = {pool.evaluate_file(str(path), [split])[0].nll: path for path in sorted((tuned / "runs").iterdir())}
    paths["best single"] = singles[min(singles)]
    for name, path in paths.items():
        (found[name],) = pool.evaluate_file(str(path), [split])
        total = np.sum([*by_library(loaded(tuned, path), tuned, "test", words=words_of(tuned)).values()], axis=0)
        assert found[name].nll == pytest.approx(total[0] / total[1], rel=1e-5)
        print(name, round(found[name].nll, 4))
    for kind, more in (("linear", {}), ("svd", {}), ("ties_svd", {"density": 0.5})):
        nll = _merged_by_peft(tuned, kind, more)
        print("PEFT", kind, round(nll, 4))
        assert found["mehl+"].nll < nll
    for name in ("best single", "uniform"):
        test = paired_test(found["mehl+"], found[name])
        print("mehl+ minus", name, {key: round(value, 4) for key, value in test.items()})
        assert test["nll_high"] < 0


def _merged_by_peft(folder: Path, kind: str, more: dict[str, Any]) -> float:
    """NLL of PEFT's own merge of all adapters with equal weights; those of equal ranks for the kind linear."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        names = [f"run_{k}" for k in ((1, 5) if kind == "linear" else range(6))]
        model = peft.PeftModel.from_pretrained(base, folder / "runs" / names[0], names[0])
        for name in names[1:]:
            model.load_adapter(folder / "runs" / name, name)
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", kind, svd_rank=8, **more)
        model.set_adapter("merged")
    total = np.sum([*by_library(model.eval(), folder, "test", words=words_of(folder)).values()], axis=0)
    return float(total[0] / total[1])
