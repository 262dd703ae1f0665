"""What each command imports: its start takes as long as its imports, and names of modules do not depend on load."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from ray_soup.io import lazy
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.task import kept_models
from ray_soup.task.kept_models import kept
from ray_soup.task.models import describe
from tests import tiny
from tests.conftest import ROOT

SLOW_TO_IMPORT = (
    "torch", "ray", "numpy", "pydantic", "pyarrow", "pandas", "numba", "scipy", "matplotlib", "transformers", "open_clip",
    "timm", "torchvision", "rich",
)  # fmt: skip
LIBRARY_MODEL = "torchvision:squeezenet1_1?classes=7"
CODE = """
import json, sys
from ray_soup.cli import main
main(sys.argv[2:], standalone_mode=False)
json.dump([name for name in sys.argv[1].split() if name in sys.modules], sys.stderr)
"""


def imported_by(*arguments: object, folder: Path = ROOT) -> set[str]:
    """Run a command in a process of its own; return those of the modules that it has imported."""
    run = [sys.executable, "-c", CODE, " ".join(SLOW_TO_IMPORT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def zoo_of(folder: Path, state: dict[str, torch.Tensor], count: int = 3) -> None:
    for k in range(count):
        save_file({n: t + k if t.dim() else t for n, t in state.items()}, folder / f"model_{k}.safetensors")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe without data, for three ingredients in the same folder."""
    zoo_of(tmp_path, tiny.build().state_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"ingredients": str(tmp_path / "*.safetensors"), "model": tiny.SPEC}))
    return recipe


def test_the_help_of_every_command_imports_nothing_that_is_slow() -> None:
    assert imported_by("--help") == set()
    assert imported_by("learn", "--help") == set()


def test_inspect_reads_headers_without_torch(recipe: Path) -> None:
    assert imported_by("inspect", recipe.parent) <= {"numpy", "rich"}


def test_the_keys_of_a_recipe_need_no_torch() -> None:
    assert imported_by("keys", "learn.lr") == {"pydantic"}


@pytest.mark.slow
def test_a_soup_without_data_is_made_checked_and_rebuilt_without_ray_and_without_a_library(recipe: Path) -> None:
    allowed = {"torch", "numpy", "pydantic", "pyarrow", "numba", "scipy", "rich"}
    out = recipe.parent / "out"
    assert imported_by("uniform", recipe, out) <= allowed
    assert imported_by("verify", out) <= allowed
    assert imported_by("bake", out, recipe.parent / "again") <= allowed
    assert (out / "model.safetensors").read_bytes() == (recipe.parent / "again/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_model_of_a_library_is_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "zoo").mkdir()
    zoo_of(tmp_path / "zoo", torchvision.models.squeezenet1_1(num_classes=7).state_dict())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"ingredients": "zoo/*.safetensors", "model": LIBRARY_MODEL}))
    first = imported_by("uniform", recipe, tmp_path / "first")
    for file in (tmp_path / "zoo").iterdir():
        file.touch()  # another version of the file, whose digest is not known yet
    second = imported_by("uniform", recipe, tmp_path / "second")
    assert "torchvision" in first
    again = imported_by("bake", tmp_path / "second", tmp_path / "again")
    assert second | again <= {"numpy", "pydantic", "pyarrow", "numba", "scipy", "rich"}
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()
    one, other = (json.loads((tmp_path / out / "run.json").read_text()) for out in ("first", "second"))
    for key in ("notes", "parameters", "preprocessing", "load"):
        assert one[key] == other[key]
    for file in ("model.safetensors", "coefficients.parquet"):
        assert one["files"][file] == other["files"][file]


def test_a_function_that_uses_the_stand_in_for_torch_may_be_sent_to_other_processes() -> None:
    assert pickle.loads(pickle.dumps(lazy.torch)) is torch
    assert lazy.torch.Tensor is torch.Tensor


# The description that is kept


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep descriptions in a cache of this test, as if no other code had imported a library."""
    monkeypatch.setattr(kept_models, "_are_absent", lambda: True)
    monkeypatch.setattr(kept_models, "_code", lambda: "code")
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path))


def layouts() -> list[Layout]:
    """Layouts with BatchNorm layers, spectral normalization, tied tensors, and names that occur in files only."""
    normed, tied = tiny.build(), tiny.build_conv()
    torch.nn.utils.spectral_norm(normed.head)
    tied.hidden.weight = tied.head.weight
    tied.names_in_files, tied.old_names, tied.constants_in_files = {"a": "b"}, {"norm.gamma": "norm.weight"}, (r"\.index$",)
    tied.register_buffer("positions", torch.arange(3), persistent=False)
    return [layout_of(model) for model in (normed, tied)]


@pytest.mark.parametrize("layout", layouts())
def test_a_layout_is_the_same_once_it_was_kept(cache: None, layout: Layout) -> None:
    def never() -> Layout:
        raise AssertionError

    assert kept("layout", "timm:a?classes=3", Layout, lambda: layout) == layout
    again = kept("layout", "timm:a?classes=3", Layout, never)
    assert again == layout
    assert again.names == layout.names  # their order too
    assert np.array_equal(again.offsets, layout.offsets)
    assert [*again.state_shapes] == [*layout.state_shapes]


@pytest.mark.parametrize(
    "model",
    ["tests.tiny:build", "open_clip:hf-hub:org/name?classes=3", "open_clip:a?zeroshot=file.json", "transformers:folder"],
)
def test_a_model_that_more_than_its_name_decides_is_never_kept(cache: None, model: str) -> None:
    made = [kept("layout", model, int, lambda number=number: number) for number in (1, 2)]
    assert made == [1, 2]


def test_a_description_is_kept_for_one_model_and_one_version_of_the_code(
    cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def described(number: int, model: str = "timm:a?classes=3") -> int:
        return kept("layout", model, int, lambda: number)

    assert [described(1), described(2), described(3, "timm:a?classes=4")] == [1, 1, 3]
    monkeypatch.setattr(kept_models, "_code", lambda: "changed")
    assert described(4) == 4


def test_nothing_is_kept_once_other_code_has_imported_a_library(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_models, "_are_absent", lambda: False)
    assert [kept("layout", "timm:a?classes=3", int, lambda number=number: number) for number in (1, 2)] == [1, 2]


def test_a_damaged_or_unwritable_cache_is_no_error(cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept("layout", "timm:a?classes=3", int, lambda: 1) == 1
    for file in tmp_path.rglob("value.json"):
        file.write_text("{")
    assert kept("layout", "timm:a?classes=3", int, lambda: 2) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "file"))
    assert kept("layout", "timm:a?classes=3", int, lambda: 3) == 3


def test_the_files_of_the_package_identify_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_models, "PACKAGE", str(tmp_path))
    (tmp_path / "a.py").write_text("1")
    before = kept_models._code.__wrapped__()
    assert before == kept_models._code.__wrapped__()
    (tmp_path / "b.py").write_text("1")
    assert before != kept_models._code.__wrapped__()


def test_a_description_is_that_of_the_model() -> None:
    assert describe(tiny.SPEC) == layout_of(tiny.build())
