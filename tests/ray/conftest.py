"""Fixtures of the tests that run on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import values


@pytest.fixture(scope="session")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """Learn a mehl+ soup of the zoo; the value is its folder, which tests only read."""
    out = tmp_path_factory.mktemp("soup") / "out"
    run(make_recipe(values(zoo, learn__lr=0.05)), out)
    return out
