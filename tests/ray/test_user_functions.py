"""Functions of the user's that fail in an actor: the same sentence as in this process, and no retry."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import evaluate
from tests.conftest import values

pytestmark = pytest.mark.slow
FUNCTIONS = """
import sys

def loss(logits, labels): sys.exit(0)
def metric(logits, labels): return metric(logits, labels)
def dataset(): return [({}, 0)] * 10
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"loss": "failing_functions:loss"},
            r"loss: failing_functions:loss tried to exit the program: sys\.exit\(0\)\n.*line 4",
        ),
        ({"metric": "failing_functions:metric"}, r"metric: failing_functions:metric raised RecursionError.*\n.*line 5"),
        (
            {"data": {"test": "failing_functions:dataset"}},
            "data.test.*failing_functions:dataset.*expected an array of numbers",
        ),
    ],
)
def test_an_error_in_an_actor_is_a_sentence(
    zoo: Path, tmp_path: Path, changes: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    (tmp_path / "failing_functions.py").write_text(FUNCTIONS)
    (tmp_path / "jinja2.py").write_text("raise RuntimeError('this is not the library')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=said) as caught:
        evaluate(make_recipe({**values(zoo), **changes}), str(zoo / "zoo" / "model_0.safetensors"), "test")
    assert "ray_soup/" not in str(caught.value)
