from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from ray_soup.errors import SoupError
from ray_soup.io.disk import json_text, read_json, reading_threads, replacing, write_at, write_bytes, write_json, write_text
from ray_soup.io.redact import HIDDEN, redact_uris


def test_an_array_is_written_at_its_offset(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T  # not contiguous
    with open(tmp_path / "x", "wb") as file:
        write_at(file, values, 8)
    assert (tmp_path / "x").read_bytes() == bytes(8) + np.ascontiguousarray(values).tobytes()


def test_a_text_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "x", "old")
    with monkeypatch.context() as failing:
        failing.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("interrupted")))
        with pytest.raises(SoupError, match=r"/x could not be written \(interrupted\)"):
            write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_link_is_replaced_and_its_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stranger").write_text("theirs")
    (tmp_path / "x").symlink_to(tmp_path / "stranger")
    write_bytes(tmp_path / "x", b"ours")
    assert (tmp_path / "x").read_bytes() == b"ours"
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "stranger").read_text() == "theirs"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["stranger", "x"]


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as first:
        first.write(b"first")
        with replacing(tmp_path / "x") as second:
            second.write(b"second")
            assert all(f.name.endswith(".tmp") for f in tmp_path.iterdir())  # which nobody publishes or uploads
            assert len(list(tmp_path.iterdir())) == 2
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "path",
    ["/zoo/hf_clipvitb32laion2b.pt", "api_key=x/m.pt", "hdfs://nn:8020/u@x/m.pt", "timm:vit?class_token=false&design=2"],
)
def test_paths_and_recipes_are_read_as_they_were_written(tmp_path: Path, path: str) -> None:
    record = {"recipe": f"ingredients: {path}\n", "ingredients": [[[path, 3, 4], ""], {"name": path, "path": path}]}
    write_json(tmp_path / "x", record)
    assert read_json(tmp_path / "x") == record
    assert (
        redact_uris(f"a: {path}\nb: https://me:secret@host/x?token=1")
        == f"a: {path}\nb: https://{HIDDEN}@host/x?token={HIDDEN}"
    )


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(28, "Free some disk space"), (122, "Free some"), (27, "ulimit -f"), (30, "may write to"), (5, "Check that disk")],
)
def test_a_failed_write_names_the_file_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SoupError, match=rf"^{tmp_path}/x could not be written \({os.strerror(number)}\)\. .*{remedy}"):
        write_text(tmp_path / "x", "text")
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan_and_no_numpy_types() -> None:
    values = {"a": [np.float32("nan"), np.float64(0.1), -math.inf], "b": np.arange(2), 3: (True, None), "c": Path("/x")}
    assert json_text(values) == '{"a": [null, 0.1, null], "b": [0, 1], "3": [true, null], "c": "/x"}'


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff", "utf-8"), (b"[" * 10_000, "nested"), (b"", "Expecting value"), (b"9" * 5000, "limit")]
)
def test_text_that_is_not_json_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_json(tmp_path / "x")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (".", "fifo"):
        with pytest.raises(ValueError, match="it is not a file"):
            read_json(tmp_path / name)
    (tmp_path / "numbers").write_text("[NaN, 1e400, -Infinity, 2.5]")
    assert read_json(tmp_path / "numbers") == [None, None, None, 2.5]


def test_threads_hold_at_most_1_gb_together() -> None:
    cores = reading_threads()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert reading_threads(1 << 29) == min(cores, 2)
    assert reading_threads(1 << 30) == reading_threads(1 << 40) == 1
