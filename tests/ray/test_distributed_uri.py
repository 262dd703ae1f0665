"""A soup in the format dcp at a URI, where every version of its model has the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import values


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_is_evaluated_is_the_model_with_its_own_running_statistics(conv_zoo: Path, s3: str, tmp_path: Path) -> None:
    """They are estimated on the model as it was written first, under the names that the last one has."""
    recipe = make_recipe(values(conv_zoo, model="tests.tiny:build_conv", method="uniform", out_format="dcp"))
    there, here = (run(recipe, out) for out in (f"{s3}/out", tmp_path / "out"))
    figures = [name for name in here.rows[0] if name.startswith(("select_", "test_"))]
    assert [there.rows[0][name] for name in figures] == [here.rows[0][name] for name in figures]
    assert any("were re-estimated" in note for note in there.record["notes"])
