"""The cache of compiled loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import pytest

from ray_soup.mixing import compiled
from ray_soup.mixing.compiled import CompiledFiles


def test_processes_that_compile_at_once_never_get_wrong_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read an empty index; the second saves index and code before the first has saved its code."""
    first, second, third = (CompiledFiles(str(tmp_path), "loop", "the source") for _ in range(3))
    save = first._save_data

    def late(name: str, data: Any) -> None:
        monkeypatch.setattr(second, "_load_index", dict)
        second.save("int8", "code for int8")
        save(name, data)

    monkeypatch.setattr(first, "_save_data", late)
    first.save("float32", "code for float32")
    assert third._load_index() == {"int8": "loop.1.nbc"}
    assert third.load("int8") is None
    third.save("int8", "code for int8")
    third.save("float32", "code for float32")
    assert [third.load(key) for key in ("int8", "float32", "int4")] == ["code for int8", "code for float32", None]
    assert CompiledFiles(str(tmp_path), "loop", "other source").load("int8") is None
    monkeypatch.setattr(compiled, "SOURCES", "of other loops that this one calls")
    assert third.load("int8") is None


def test_compiled_loops_are_kept_in_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def loop(x: int) -> int:
        return x + 1

    made: Any = compiled.jit(loop)
    assert made(1) == 2
    files = made._cache._cache_file
    assert isinstance(files, CompiledFiles)
    assert files._load_index()
    assert all(files.load(key) is not None for key in files._load_index())
