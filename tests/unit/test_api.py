"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ray_soup
from tests.conftest import ROOT


def test_the_import_is_light_and_every_public_name_is_a_function_or_class() -> None:
    """Nothing heavy comes with it, and no submodule hides a function of the same name."""
    heavy = "{'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)"
    code = f"import sys, ray_soup; assert not {heavy}; import ray_soup.tune.search, ray_soup.soups.compare; "
    code += "from ray_soup import *; print(all(callable(getattr(ray_soup, name)) for name in ray_soup.__all__), "
    code += "ray_soup.learn.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "ray_soup.api"]
    assert set(ray_soup.__all__) <= set(dir(ray_soup))


def test_a_misspelled_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lern'"):
        ray_soup.lern  # noqa: B018
