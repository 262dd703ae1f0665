from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.check import (
    check_finite,
    check_fits,
    check_floats,
    check_together,
    common_dtype,
    common_shapes,
    left_out_notes,
)
from ray_soup.io.find import open_ingredients


def test_every_difference_between_ingredients_is_listed(tmp_path: Path) -> None:
    good = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}
    for k, changed in enumerate(
        [
            good,
            good,
            {"w": good["w"]},
            {**good, "extra": torch.zeros(1)},
            {**good, "w": torch.zeros(3, 2)},
            {**good, "w": torch.zeros(2, 3, dtype=torch.int32)},
        ]
    ):
        save_file(changed, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    assert common_shapes(ingredients) == ({"n": (), "w": (2, 3)}, str(tmp_path / "0.safetensors"))
    with pytest.raises(IngredientError) as error:
        check_together(ingredients)
    said = str(error.value)
    assert said.startswith("4 of 6 ingredients do not fit together")
    for line in (
        "2.safetensors does not fit:\n    missing: n []",
        "extra float32 [1]",
        "shape: w is [3, 2], in",
        "dtype: w is int32 [2, 3], the other ingredients have floats",
    ):
        assert line in said


def test_bound_ingredients_are_returned_and_those_given_stay_as_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "0.safetensors")
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "1.pt")
    ingredients = open_ingredients(str(tmp_path))
    bound = check_together(ingredients, {"a": (2,)}, {})
    assert [list(i.tensors) for i in ingredients] == [["a"], ["module.a"]]
    assert [list(i.tensors) for i in bound] == [["a"], ["a"]]
    assert [i.read("a").tolist() for i in bound] == [[0.0, 0.0], [1.0, 1.0]]
    assert [i.identity for i in bound] == [i.identity for i in ingredients]


def test_one_ingredient_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="two or more ingredients"):
        check_together(open_ingredients(str(tmp_path)))


def test_the_widest_dtype_is_written(tmp_path: Path) -> None:
    for k, dtype in enumerate((torch.float16, torch.bfloat16, torch.float16)):
        save_file({"a": torch.zeros(1, dtype=dtype)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    assert common_dtype(ingredients, "a") == "float32"
    assert common_dtype(ingredients[::2], "a") == "float16"


def test_integer_parameters_and_infinite_elements_are_named(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"a": torch.zeros(3), "n": torch.zeros(3, dtype=torch.int8)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    check_floats(ingredients, ["a"])
    with pytest.raises(IngredientError, match=r"0\.safetensors: the parameter n is int8 \[3\]; expected floats"):
        check_floats(ingredients, ["a", "n"])
    parts = [np.zeros(3), np.array([0.0, np.inf, np.nan])]
    check_finite(ingredients[:1], "a", 0, parts[:1])
    with pytest.raises(IngredientError, match=r"1\.safetensors: the tensor a contains inf at element 17; expected finite"):
        check_finite(ingredients, "a", 16, parts)


def zoo(folder: Path) -> dict[str, torch.Tensor]:
    """Write one model in the ways of several training scripts, and return it."""
    model = {"a": torch.arange(2.0), "b": torch.ones(3)}
    for name, state in {
        "ddp": {f"module.{n}": t for n, t in model.items()},
        "average": {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in model.items()}},
        "lightning": {"state_dict": {"criterion.weight": torch.ones(5), **{f"model.{n}": t for n, t in model.items()}}},
        "ema": {"model": model, "model_ema": {n: t + 1 for n, t in model.items()}},
        "mixed": {"module.a": model["a"], "b": model["b"]},
        "plain": model,
    }.items():
        torch.save(state, folder / f"{name}.pt")
    return model


@pytest.mark.parametrize("with_model", [True, False])
def test_files_of_several_training_scripts_fit_together(tmp_path: Path, with_model: bool) -> None:
    model = zoo(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
    bound = check_together(open_ingredients(str(tmp_path)), shapes if with_model else None)
    for ingredient in bound:
        assert {name: ingredient.read(name).tolist() for name in ingredient.tensors} == {
            name: tensor.tolist() for name, tensor in model.items()
        }
    assert left_out_notes(bound) == [
        f"{tmp_path}/average.pt: 1 tensor (n_averaged) outside `module.` was left out: the model has none.",
        f"{tmp_path}/ema.pt: it contains the whole model under `model` and `model_ema`. The first was used; append "
        "?key=model_ema to the path to use another.",
        f"{tmp_path}/lightning.pt: 1 tensor (criterion.*) outside `model.` was left out: the model has none.",
    ]


def test_two_keys_of_one_file_may_not_be_the_same_tensors(tmp_path: Path) -> None:
    file = str(tmp_path / "a.pt")
    torch.save({"model": {"a": torch.ones(2)}, "model_ema": {"a": torch.zeros(2)}}, file)
    bound = check_together(open_ingredients([file, f"{file}?key=model_ema"]), {"a": (2,)})
    assert [i.read("a").tolist() for i in bound] == [[1.0, 1.0], [0.0, 0.0]]
    with pytest.raises(IngredientError, match=r"a\.pt\?key=model and .*a\.pt are the same tensors"):
        check_together(open_ingredients([file, f"{file}?key=model"]), {"a": (2,)})


def test_the_same_note_about_many_files_is_given_once(tmp_path: Path) -> None:
    for k in range(3):
        torch.save({"n_averaged": torch.tensor(k), "module.a": torch.ones(2)}, tmp_path / f"{k}.pt")
    (note,) = left_out_notes(check_together(open_ingredients(str(tmp_path)), {"a": (2,)}))
    assert note.startswith(f"{tmp_path}/0.pt and 2 more: 1 tensor (n_averaged)")


def test_a_tensor_that_no_model_has_is_refused_unless_it_is_ignored(tmp_path: Path) -> None:
    for k in range(2):
        torch.save({"a": torch.full((2,), float(k)), "extra.w": torch.ones(1), "a_": torch.ones(1)}, tmp_path / f"{k}.pt")
    ingredients = open_ingredients(str(tmp_path))
    for ignore in ([], ["extra.*"], ["extra"], ["*.w"], ["A_"]):
        with pytest.raises(IngredientError, match=r"not in the model: (extra\.w|a_) float32 \[1\].*\n.*under `ignore:`"):
            check_together(ingredients, {"a": (2,)}, ignore=ignore)
        with pytest.raises(IngredientError, match=r"1\.pt does not fit the model:\n    not in the model: "):
            check_fits(ingredients[1], {"a": (2,)}, {}, ignore)
    bound = check_together(ingredients, {"a": (2,)}, ignore=["extra.*", "a?"])
    assert [i.read("a").tolist() for i in bound] == [[0.0, 0.0], [1.0, 1.0]]
    assert [list(i.tensors) for i in check_together(ingredients, {"a": (2,)}, strict=False)] == [["a"], ["a"]]
    with pytest.raises(IngredientError, match=r"missing: b \[1\]"):
        check_together(ingredients, {"a": (2,), "b": (1,)}, ignore=["*"], strict=False)


def test_a_mixture_of_student_and_teacher_is_refused_until_one_is_ignored(tmp_path: Path) -> None:
    for k in range(2):
        torch.save({"student.a": torch.full((2,), float(k)), "teacher.a": torch.full((2,), -1.0)}, tmp_path / f"{k}.pt")
    ingredients = open_ingredients(str(tmp_path))
    with pytest.raises(
        IngredientError, match=r"0\.pt does not fit:\n    the whole model occurs under `student\.` and `teacher"
    ):
        check_together(ingredients, {"a": (2,)})
    bound = check_together(ingredients, {"a": (2,)}, ignore=["teacher.*"])
    assert [i.read("a").tolist() for i in bound] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_message_shows_the_closest_names_of_the_same_shape(tmp_path: Path) -> None:
    model = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "layers.1.weight": (4, 4), "head.bias": (2,)}
    found = {"layer.0.weight": (4, 3), "layer.0.bias": (4,), "layer.1.weight": (4, 4), "zzz": (2,)}
    for k in range(2):
        torch.save({name: torch.zeros(shape) for name, shape in found.items()}, tmp_path / f"{k}.pt")
    ingredients = open_ingredients(str(tmp_path))
    with pytest.raises(IngredientError) as error:
        check_together(ingredients, model, advise=lambda ingredient: f"Ask about {ingredient.name}.")
    assert str(error.value).endswith(
        f"""
The closest names in {tmp_path}/0.pt:
    expected layers.0.weight [4, 3], found layer.0.weight [4, 3]
    expected layers.0.bias [4], found layer.0.bias [4]
    expected layers.1.weight [4, 4], found layer.1.weight [4, 4]
Ask about 0."""
    )
    with pytest.raises(IngredientError, match=r"found layer\.1\.weight \[4, 4\]\nAsk about 1\.$"):
        check_fits(ingredients[1], model, {}, advise=lambda ingredient: f"Ask about {ingredient.name}.")


def test_the_search_for_close_names_is_bounded(tmp_path: Path) -> None:
    for k in range(2):
        state = {f"encoder.block.{n}.attention.self.{k}.weight": torch.zeros(2) for n in range(3000)}
        save_file(state, tmp_path / f"{k}.safetensors")
    shapes = {f"x{n}": (2,) for n in range(3000)}
    begun = time.process_time()
    with pytest.raises(IngredientError, match="2 of 2 ingredients"):
        check_together(open_ingredients(str(tmp_path)), shapes)
    assert time.process_time() - begun < 20


def test_what_must_be_ignored_is_written_as_a_line_of_the_recipe(tmp_path: Path) -> None:
    """A scale beside the network may multiply its outputs, so it is not left out without the user's word."""
    for k in range(2):
        state = {"net._orig_mod.a": torch.full((2,), float(k)), "scale": torch.tensor(2.0), "aux.w": torch.ones(2, 2)}
        torch.save({"state_dict": {**state, "criterion.weight": torch.ones(4)}}, tmp_path / f"{k}.ckpt")
    ingredients = open_ingredients(str(tmp_path))
    with pytest.raises(IngredientError, match=r'without them, write in the recipe\n    ignore: \["scale", "aux\.\*"\]$'):
        check_together(ingredients, {"a": (2,)})
    bound = check_together(ingredients, {"a": (2,)}, ignore=["scale", "aux.*"])
    assert [i.read("a").tolist() for i in bound] == [[0.0, 0.0], [1.0, 1.0]]
    assert left_out_notes(bound) == [
        f"{tmp_path}/0.ckpt and 1 more: 2 tensors (scale, aux.*) left out because of `ignore:`.",
        f"{tmp_path}/0.ckpt and 1 more: 1 tensor (criterion.*) outside `net._orig_mod.` was left out: the model has none.",
    ]


def test_a_soup_of_older_rules_can_still_be_bound_to_its_ingredients(tmp_path: Path) -> None:
    """What no list explains was once left out beside `model.`; a finished soup is not refused for it."""
    for k in range(2):
        torch.save({"model.a": torch.full((2,), float(k)), "scale": torch.tensor(2.0)}, tmp_path / f"{k}.pt")
    bound = check_together(open_ingredients(str(tmp_path)), {"a": (2,)}, strict=False)
    assert [list(i.tensors) for i in bound] == [["a"], ["a"]]
