"""Files that workers keep at a path or URI."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.errors import RecipeError
from ray_soup.io import kept, storage


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, or a URI in a bucket."""
    return f"{request.getfixturevalue('s3')}/folder" if request.param == "remote" else str(tmp_path)


def test_a_file_is_whole_or_as_it_was(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    target = f"{place}/file"
    for data in (b"first", b"", b"last" * 1000):
        with kept.replacing(target) as stream:
            stream.write(data)
        with kept.local(target) as file:
            assert file.read_bytes() == data

    def fail() -> None:
        with kept.replacing(target) as stream:
            stream.write(b"half")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        fail()
    assert storage.read_bytes(target) == b"last" * 1000
    assert list(storage.walk(place)) == ["file"]
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.name != "scratch"]


def test_errors_name_the_file_where_it_is_kept(place: str) -> None:
    with pytest.raises(FileNotFoundError), kept.local(f"{place}/missing") as file:
        file.read_bytes()
    storage.write_bytes(b"x", f"{place}/file")
    with pytest.raises(RecipeError, match=f"^{place}/file is damaged$"), kept.local(f"{place}/file") as file:
        raise RecipeError(f"{file} is damaged")
