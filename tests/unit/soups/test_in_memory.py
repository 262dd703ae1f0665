"""Soups of state dicts in memory: what they need, what they refuse, and the example in the documentation."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import ray_soup
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.soups import in_memory
from tests import tiny
from tests.conftest import ROOT
from tests.unit.task.language_models import bert_for, llama, nudge


def loader(folder: Path, name: str) -> DataLoader:
    arrays = np.load(folder / f"{name}.npz")
    return DataLoader(TensorDataset(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])), 100)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(file) for file in sorted((folder / "zoo").glob("*.safetensors"))]


class Tied(tiny.Tiny):
    """Two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.key.weight = self.query.weight


def test_tied_tensors_half_precision_and_select_as_batches_are_accepted(zoo: Path) -> None:
    halves = []
    for state in states(zoo)[:3]:
        model = Tied()
        model.load_state_dict(state)
        halves.append({name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    fit = list(loader(zoo, "heldout"))
    soup = ray_soup.mix_state_dicts(Tied(), halves, fit[:4], "uniform", select=fit[4:])
    assert soup.state_dict().keys() == Tied().state_dict().keys()
    assert soup.state_dict()["head.weight"].dtype == torch.float16
    mean = sum(state["key.weight"].double() for state in halves) / 3
    torch.testing.assert_close(soup.state_dict()["key.weight"], mean.half(), rtol=1e-3, atol=1e-4)
    Tied().load_state_dict(soup.state_dict())


def test_a_message_says_what_is_wrong_with_the_arguments(zoo: Path) -> None:
    good, data, model = states(zoo)[:2], list(loader(zoo, "heldout")), tiny.Tiny()
    with pytest.raises(RecipeError, match="fit: a batch holds Tensor; expected"):
        ray_soup.mix_state_dicts(model, good, data[0])
    with pytest.raises(RecipeError, match="fit: a batch holds 3 items; expected"):
        ray_soup.mix_state_dicts(model, good, [(*data[0], data[0][1])])
    with pytest.raises(RecipeError, match="fit: there are no batches"):
        ray_soup.mix_state_dicts(model, good, iter([]))
    with pytest.raises(RecipeError, match="does not take the recipe key 'actors'"):
        ray_soup.mix_state_dicts(model, good, data, actors={"gpus": 1})
    with pytest.raises(RecipeError, match="does not take the recipe key 'data'"):
        ray_soup.mix_state_dicts(model, good, data, **{"data.test": "a.npz"})
    with pytest.raises(RecipeError, match=r"unknown key; did you mean 'learn\.epochs'"):
        ray_soup.mix_state_dicts(model, good, data, learn={"epoch": 1})
    with pytest.raises(IngredientError, match=r"missing: head\.bias"):
        ray_soup.mix_state_dicts(model, [good[0], {k: v for k, v in good[1].items() if k != "head.bias"}], data)
    with pytest.raises(IngredientError, match="State dict 0: extra is a str"):
        ray_soup.mix_state_dicts(model, [{**good[0], "extra": "x"}, good[1]], data)
    with pytest.raises(RecipeError, match="two or more ingredients"):
        ray_soup.mix_state_dicts(model, good[:1], data)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"select": 0}, "data.select: found 0. Expected a share between 0 and 1"),
        (
            {"select": None},
            "select is of type NoneType; expected batches of (images, labels), or a dataset, or the share of",
        ),
        ({"select": "a.npz"}, "select is of type str; expected batches"),
        ({"test": 3}, "test is of type int; expected batches of (images, labels), or a dataset. Pass a DataLoader."),
        ({"fit": None}, "fit is of type NoneType; expected batches"),
        ({"fit": torch.zeros(3, 8)}, "fit: an example holds Tensor; expected (images, labels)"),
        ({"fit": [({"ids": "x"}, [0, 1])]}, "fit: ids are of type str; expected tensors or arrays"),
        ({"fit": [{"ids": torch.zeros(2, 8)}]}, "fit: a batch holds ids; expected (images, labels), or a dictionary of inp"),
        ({"fit": [{"ids": torch.zeros(2, 8), "labels": [0, 1]}]}, "fit: the only input is called ids, and the model's firs"),
        ({"fit": [{"images": 0, "ids": 0, "label": 0}]}, "fit: an input of a batch is called images, a name with a meaning"),
        (
            {"fit": [{"ids": torch.zeros(2, 8), "labels": [0, 1]}, (torch.zeros(2, 8), [0, 1])]},
            "fit: found batches of ids, labels and images, labels; expected the same entries in all. Yield them alike.",
        ),
        ({"fit": [(torch.zeros(2, 8), ["a", "b"])]}, "fit: labels are of type list; expected tensors or arrays of numbers"),
        (
            {"fit": [(torch.zeros(2, n), [0, 1]) for n in (8, 7)]},
            "fit: found images of the shapes [7] and [8]; expected one",
        ),
        ({"fit": [(torch.zeros(9, 8), [0, 1])]}, "fit: 9 inputs and 2 labels; expected one label per input"),
        ({"model": torch.nn.Linear}, "model is the class Linear; expected a torch.nn.Module. Pass the model itself."),
        ({"state_dicts": torch.nn.Linear(8, 4).state_dict()}, "state_dicts is of type OrderedDict; expected a list"),
        (
            {"state_dicts": [torch.nn.Linear(8, 4)]},
            "State dict 0 is of type Linear; expected names and tensors. Pass model.s",
        ),
        ({"state_dicts": ["a.pt"]}, "State dict 0 is of type str; expected names and tensors. Pass what torch.load"),
        ({"state_dicts": [{"weight": torch.zeros(2).to_sparse()}]}, "State dict 0: weight is a meta, sparse or quantized"),
        (
            {"state_dicts": [{"weight": torch.zeros(2, dtype=torch.complex64)}] * 2},
            "State dict 0: the tensor weight has dtype complex64; expected one of",
        ),
        ({"progress": 3}, "progress is of type int; expected a function of (what, done, total)"),
    ],
)
def test_wrong_arguments_are_refused_in_words(changes: dict[str, Any], text: str) -> None:
    linear = torch.nn.Linear(8, 4)
    data = [(torch.randn(40, 8), torch.arange(40) % 4)]
    arguments: dict[str, Any] = {"model": linear, "state_dicts": [linear.state_dict()] * 2, "fit": data, "method": "uniform"}
    with pytest.raises(SoupError) as refused:
        ray_soup.mix_state_dicts(**{**arguments, **changes})
    assert text in str(refused.value)
    assert tempfile.gettempdir() not in str(refused.value)


class Pairs:
    """A map-style dataset that is no Dataset of torch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.images[row % len(self)], int(self.labels[row % len(self)])


def test_datasets_give_the_soup_that_their_batches_give(zoo: Path) -> None:
    data = loader(zoo, "heldout")
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    forms = [data, data.dataset, Pairs(images, labels), list(zip(images, labels, strict=True))]
    soups = [ray_soup.mix_state_dicts(tiny.Tiny(), states(zoo)[:3], form, "uniform") for form in forms]
    for soup in soups:
        assert soup.figures == soups[0].figures


def test_dictionaries_give_the_soup_of_the_same_pairs(zoo: Path) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*loader(zoo, "heldout"), strict=True))
    pairs = list(zip(images.split(100), labels.split(100), strict=True))
    of_examples = [{"images": image, "label": int(label)} for image, label in zip(images, labels, strict=True)]
    forms = [pairs, [{"images": x, "labels": y} for x, y in pairs], [({"images": x}, y) for x, y in pairs], of_examples]
    soups = [ray_soup.mix_state_dicts(tiny.Tiny(), states(zoo)[:3], form, "uniform") for form in forms]
    for soup in soups:
        assert soup.figures == soups[0].figures


@pytest.mark.parametrize("task", ["CausalLM", "MaskedLM", "TokenClassification"])
def test_collated_batches_of_transformers_are_scored_as_the_library_scores_them(task: str) -> None:
    """Padded batches of input_ids, attention_mask and labels; the figures are the library's own loss per token."""
    from transformers import BatchEncoding

    model = llama() if task == "CausalLM" else bert_for(f"For{task}")
    random, batches, near = torch.Generator().manual_seed(0), [], []
    for _ in range(5):
        ids = torch.randint(2, model.config.vocab_size, (4, 12), generator=random)
        mask = torch.arange(12) < torch.randint(4, 13, (4, 1), generator=random)
        wanted = torch.randint(2, (4, 12), generator=random) if task == "TokenClassification" else ids
        labels = torch.where(mask, wanted, -100)
        batches.append(BatchEncoding({"input_ids": ids, "attention_mask": mask.long(), "labels": labels}))
    for seed in range(3):
        own = copy.deepcopy(model)
        nudge(own, seed)
        near.append(own.state_dict())
    called = (
        torch.compile(model, backend="eager") if task == "CausalLM" else model
    )  # whose own forward moves the labels, too
    objective = {"CausalLM": "causal_lm", "MaskedLM": "masked_lm"}.get(task, "token_classification")
    soup = ray_soup.mix_state_dicts(called, near, batches[:3], "uniform", select=batches[3:], objective=objective)
    called.load_state_dict(soup.state_dict())
    loss, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches[3:]:
            scored = batch["labels"][:, 1:] if task == "CausalLM" else batch["labels"]
            units = int((scored != -100).sum())
            loss, count = loss + model(**batch).loss.item() * units, count + units
    assert soup.figures["select_nll"] == pytest.approx(loss / count, rel=1e-5)
    assert any("moved by one place" in note for note in soup.notes) == (task == "CausalLM")


NOTEBOOK = """
import doctest, torch, ray_soup

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.double = torch.nn.Linear(8, 4), lambda x: 2 * x

    def forward(self, x):
        return self.linear(self.double(x))

class Data(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.pairs = list(zip(images, labels))

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, n):
        return self.pairs[n]

def build():
    return Net()

torch.manual_seed(0)
model, images = Net(), torch.randn(120, 8)
state_dicts = [{name: t + 0.1 * torch.randn_like(t) for name, t in model.state_dict().items()} for _ in range(3)]
soup = ray_soup.mix_state_dicts(model, state_dicts, Data(images, images[:, :4].argmax(dim=1)), "mehl", learn={"epochs": 1})
model.load_state_dict(soup.state_dict())
print(soup)
try:
    ray_soup.load_model("__main__:build", "soup")
except ray_soup.SoupError as error:
    print(error)
"""


def test_classes_of_a_notebook_work_in_memory_and_are_refused_by_name(zoo: Path, tmp_path: Path) -> None:
    """The source of what stands in `__main__` is not known here, as in a notebook."""
    done = subprocess.run([sys.executable, "-"], input=NOTEBOOK, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Soup in memory: mehl, made from 3 state dicts"
    assert lines[1].split() == ["model", "select", "%", "select", "NLL"]
    assert [line.split()[0] for line in lines[2:4]] == ["mehl", "best_single"]
    assert lines[4].startswith(
        "model: __main__:build is defined in a notebook or a script, from which the processes that Ray starts"
    )


def test_the_example_in_the_docstring_runs() -> None:
    found = doctest.testmod(in_memory)
    assert (found.attempted > 8, found.failed) == (True, 0)


def test_a_soup_in_memory_does_not_import_ray() -> None:
    code = (
        "import sys, doctest, ray_soup.soups.in_memory as m; assert not doctest.testmod(m).failed; "
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
