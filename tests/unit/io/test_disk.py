from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ray_soup.io.disk import reading_threads, write_at, write_text


def test_an_array_is_written_at_its_offset(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T  # not contiguous
    with open(tmp_path / "x", "wb") as file:
        write_at(file, values, 8)
    assert (tmp_path / "x").read_bytes() == bytes(8) + np.ascontiguousarray(values).tobytes()


def test_a_text_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "old")
    with monkeypatch.context() as failing:
        failing.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("interrupted")))
        with pytest.raises(OSError, match="interrupted"):
            write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_threads_hold_at_most_1_gb_together() -> None:
    cores = reading_threads()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert reading_threads(1 << 29) == min(cores, 2)
    assert reading_threads(1 << 30) == reading_threads(1 << 40) == 1
