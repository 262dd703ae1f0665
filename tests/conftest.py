from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHORT = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # Ray's sockets need a short path
os.environ["RAY_TMPDIR"] = str(SHORT)
os.environ["RAY_SOUP_CACHE"] = str(SHORT / "cache")
os.environ["NUMBA_CACHE_DIR"] = os.environ.get("NUMBA_CACHE_DIR") or str(SHORT / "numba")
os.environ.pop("RAY_ADDRESS", None)
ROOT = Path(__file__).parent.parent

from tests import tiny  # noqa: E402


def pytest_unconfigure() -> None:
    shutil.rmtree(SHORT, ignore_errors=True)


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # `tests.tiny:build` is found there, by the actors too


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with zoo/model_0 ... model_7.safetensors and train, heldout, test .npz."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 8)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray for all tests that need one in this process."""
    from ray_soup.actors import connect

    with connect():
        yield


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for the zoo in `folder`; `learn__lr=1` changes a key of a section."""
    recipe: dict[str, Any] = {
        "ingredients": str(folder / "zoo" / "*.safetensors"),
        "model": tiny.SPEC,
        "data": {"fit": str(folder / "heldout.npz"), "select": 0.25, "test": str(folder / "test.npz")},
        "learn": {"batch_size": 61, "epochs": 2},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section] = {**recipe.get(section, {}), name: value} if name else value
    return recipe


def ray_soup(*arguments: str) -> list[str]:
    """The command, for a child process."""
    return [sys.executable, "-m", "ray_soup.cli", *arguments]
