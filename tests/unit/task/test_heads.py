"""Adapters of classifiers and taggers on the base of a language model: the head is theirs, and nothing is random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.adapters import open_adapter
from ray_soup.io.lifting import group_of
from ray_soup.mixing.adapter_bake import bake_adapter
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.adapters import bound_to
from ray_soup.task.companions import adapter_lines
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.models import build, objective_in
from ray_soup.task.peft_models import check_with_peft, with_adapters
from tests.adapters import make_adapter
from tests.unit.mixing.test_adapter_bake import IDS, Kind, expected_logits, random_coefficients, stacked
from tests.unit.mixing.test_adapter_merge import close, logits, merged
from tests.unit.task.language_models import bert_for, byte_tokenizer, llama, saved

peft = pytest.importorskip("peft")


def with_head(base: Path, kind: str, classes: int, seed: int = 0) -> nn.Module:
    """A model with a new head on a base, as a script of fine-tuning makes it."""
    import transformers

    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model: Any = auto.from_pretrained(base, num_labels=classes)
    model.config.pad_token_id = 1
    return model.eval()


def write(
    folder: Path, kind: str, task_type: str, base: nn.Module | None = None, classes: tuple[int, ...] = (3, 3, 3), **more: Any
) -> None:
    words = byte_tokenizer()
    words.pad_token = "</s>"
    saved(llama() if base is None else base, words, folder / "base")
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "task_type": task_type, **more}
    for k, count in enumerate(classes):
        model: Any = with_head(folder / "base", kind, count, k)
        make_adapter(model, folder / "runs" / str(k), k + 1, **config)


def recipe(folder: Path, task: str, **more: Any) -> Any:
    return make_recipe({
        "model": f"transformers:{folder}/base?task={task}&length=16", "ingredients": str(folder / "runs" / "*/"),
        "method": "uniform", "data": {}, **more,
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "task_type"),
    [("classification", "SequenceClassification", "SEQ_CLS"), ("token_classification", "TokenClassification", "TOKEN_CLS")],
)
def test_the_head_is_that_of_the_adapters(task: str, kind: str, task_type: str, tmp_path: Path) -> None:
    write(tmp_path, kind, task_type)
    found = resolved_recipe(recipe(tmp_path, task))
    assert found.model.endswith(f"base?task={task}&length=16&classes=3")
    assert objective_in(found.model) == task
    opened = [open_adapter(str(tmp_path / "runs" / str(k))) for k in range(3)]
    assert "base_model.model.score.weight" in bound_to(opened, recipe(tmp_path, task).model)[1]
    inputs = open_inputs(found)
    ingredients, group = [*inputs.ingredients], group_of(inputs.ingredients)
    assert {tensor.base for tensor in group.whole.values()} >= {"score.weight"}
    coefficients = random_coefficients(inputs.layout, inputs.names)
    (tmp_path / "soup").mkdir()
    bake_adapter(coefficients, ingredients, group, tmp_path / "soup")
    check_with_peft(found.model, [open_adapter(str(tmp_path / "soup"))])

    text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    of_head = Kind(lambda: with_head(tmp_path / "base", kind, 3, 7), [{}] * 3, text)
    runs = tmp_path / "runs"
    expected = expected_logits(of_head, runs, group, coefficients)
    assert close(logits(peft.PeftModel.from_pretrained(of_head.build(), tmp_path / "soup"), of_head), expected)
    model = with_adapters(build(found.model), ingredients).model.eval()
    for folder in (tmp_path / "soup", *(runs / str(k) for k in range(3))):
        model.load_adapter_file(str(folder))
        with torch.inference_mode():
            ours = model(stacked(text))
        assert close(ours, logits(peft.PeftModel.from_pretrained(of_head.build(), folder), of_head)), folder

    whole = type(of_head.build()).from_pretrained(merged(found.model, coefficients, ingredients, tmp_path / "whole"))
    assert whole.config.num_labels == 3
    assert whole.config.pad_token_id == (1 if task == "classification" else None)  # or it would take no batches
    assert close(logits(whole, of_head), expected)
    lines = adapter_lines(found.model)
    assert lines.endswith(f"For{kind}.from_pretrained('base', num_labels=3), '.')")
    assert lines.startswith("import peft\nimport transformers\n\n# base: the folder of the base model\nmodel = ")
    assert "from_pretrained('org/base'" in adapter_lines(found.model, "org/base")


def test_a_head_that_no_file_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "none", "SequenceClassification", "FEATURE_EXTRACTION")  # PEFT saves no head for this type
    with pytest.raises(IngredientError, match=r"lacks score\.weight of the model with a new head .* were not saved"):
        open_inputs(resolved_recipe(recipe(tmp_path / "none", "classification&classes=3")))
    write(tmp_path / "bert", "SequenceClassification", "SEQ_CLS", bert_for("ForMaskedLM"), target_modules=["query"])
    with pytest.raises(
        IngredientError, match=r"lacks bert\.pooler\.dense\.bias of the model with a new head \(2 such tensors\)"
    ):
        open_inputs(resolved_recipe(recipe(tmp_path / "bert", "classification")))


def test_a_head_that_is_saved_with_what_is_below_it(tmp_path: Path) -> None:
    """A pooler that the base lacks, as PEFT saves it if modules_to_save names it."""
    write(tmp_path, "SequenceClassification", "SEQ_CLS", bert_for("ForMaskedLM"), target_modules=["query"],
          modules_to_save=["pooler"])  # fmt: skip
    inputs = open_inputs(resolved_recipe(recipe(tmp_path, "classification")))
    saved_whole = {t.base for t in group_of(inputs.ingredients).whole.values()}
    assert saved_whole == {f"{m}.{n}" for m in ("bert.pooler.dense", "classifier") for n in ("weight", "bias")}


def test_what_the_option_refuses(tmp_path: Path) -> None:
    write(tmp_path, "SequenceClassification", "SEQ_CLS", classes=(3, 4))
    with pytest.raises(IngredientError, match=r"has a head for 3 classes and .* one for 4; expected the same classes"):
        resolved_recipe(recipe(tmp_path, "classification"))
    with pytest.raises(RecipeError, match="expected classification or token_classification for the option 'task'"):
        open_inputs(recipe(tmp_path, "causal_lm"))
    with pytest.raises(IngredientError, match=r"contains base_model\.model\.score\.weight \[3, 32\]; expected \[2, 32\]"):
        open_inputs(recipe(tmp_path, "classification&classes=2"))
