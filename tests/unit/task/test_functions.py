from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ray_soup.errors import RecipeError
from ray_soup.task.functions import MOVED, import_function
from ray_soup.task.models import build, fingerprint
from tests import tiny


def test_functions_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text("def answer():\n    return 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert import_function("here_only:answer")() == 42


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:f", r"no_such_module:f: the module no_such_module cannot be imported"),
        ("tests.tiny:nothing", r"tests\.tiny:nothing: the module tests\.tiny has no 'nothing'"),
    ],
)
def test_a_missing_function_is_named(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        import_function(spec)


def test_a_moved_function_is_found_under_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOVED, "ray_soup.gone:build", "tests.tiny:build")
    assert import_function("ray_soup.gone:build") is tiny.build
    built = build("ray_soup.gone:build")
    assert fingerprint("ray_soup.gone:build", built) == fingerprint("tests.tiny:build", built)


def test_functions_of_this_package_that_moved_have_a_new_place() -> None:
    assert MOVED["ray_soup.demo:digits_vit"] == "ray_soup.tune.demo:digits_vit"
