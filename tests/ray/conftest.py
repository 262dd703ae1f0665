"""Fixtures of the tests that run on Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests import tiny
from tests.conftest import values


@pytest.fixture(scope="session")
def conv_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder like `zoo`, with four ingredients of a model that has BatchNorm layers."""
    folder = tmp_path_factory.mktemp("conv")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 4, tiny.build_conv)
    return folder


@pytest.fixture(scope="session")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """Learn a mehl+ soup of the zoo; the value is its folder, which tests only read."""
    out = tmp_path_factory.mktemp("soup") / "out"
    run(make_recipe(values(zoo, learn__lr=0.05)), out)
    return out
