from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_soup.errors import SoupError
from ray_soup.io import cache
from ray_soup.io.cache import InUse, cache_at, cache_folder, cached, content_key, lookup, scratch
from ray_soup.io.progress import drain
from tests.faults import FaultyDisk, faulty

KEY = content_key("a", 1)
RECORD = {"version": 1, "kind": "things", "key": KEY}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the value is the folder of the kind `things`."""
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


def make(folder: Path) -> Iterator[int]:
    """Fill an entry, and report it."""
    (folder / "content").write_text("new")
    yield 1


def refuse(folder: Path) -> Iterator[int]:
    raise AssertionError("made a second time")
    yield


def built(key: str = KEY, nbytes: int = 0) -> InUse:
    return drain(cached("things", key, nbytes, make))


def outdated(folder: Path, record: str | None = None) -> Path:
    """An entry as another version left it."""
    folder.mkdir(parents=True)
    (folder / "content").write_text("old")
    (folder / "in_use").touch()
    if record is not None:
        (folder / "entry.json").write_text(record)
    return folder


def names(root: Path) -> list[str]:
    return sorted(f.name for f in root.iterdir() if f.is_dir())


def test_an_entry_is_made_once_and_carries_its_record(root: Path) -> None:
    assert lookup("things", KEY) is None
    work = cached("things", KEY, 0, make)
    assert list(work) == [1]
    hold = drain(cached("things", KEY, 0, refuse))
    assert hold.path == root / KEY
    assert (hold.path / "content").read_text() == "new"
    assert json.loads((hold.path / "entry.json").read_text()) == RECORD
    again = lookup("things", KEY)
    assert again is not None
    assert again.path == hold.path


@pytest.mark.parametrize(
    "record",
    [
        None,
        "",
        "[1]",
        "{",
        json.dumps({**RECORD, "version": 0}),
        json.dumps({**RECORD, "more": 1}),
        json.dumps({"version": 1, "kind": "things"}),
        json.dumps({**RECORD, "key": content_key("b")}),
        json.dumps({**RECORD, "kind": "others"}),
    ],
)
def test_an_entry_without_a_record_of_this_version_is_rebuilt(root: Path, record: str | None) -> None:
    outdated(root / KEY, record)
    assert lookup("things", KEY) is None
    hold = built()
    assert hold.path == root / KEY
    assert sorted(f.name for f in hold.path.iterdir()) == ["content", "entry.json", "in_use"]
    assert (hold.path / "content").read_text() == "new"


def test_a_new_version_rebuilds_the_entries_of_the_one_before(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built().close()
    monkeypatch.setattr(cache, "VERSION", 2)
    assert lookup("things", KEY) is None
    assert json.loads((built().path / "entry.json").read_text())["version"] == 2
    assert names(root) == [KEY]


def test_an_outdated_entry_in_use_stays_and_the_new_one_is_stored_beside_it(root: Path) -> None:
    old = outdated(root / KEY)
    user = InUse(old)
    hold = built()
    assert hold.path == root / f"{KEY}.v1"
    assert (old / "content").read_text() == "old"
    assert drain(cached("things", KEY, 0, refuse)).path == hold.path
    found = lookup("things", KEY)
    assert found is not None
    assert found.path == hold.path
    user.close()
    assert drain(cached("things", KEY, 0, refuse)).path == hold.path


def test_an_entry_in_use_in_another_process_is_not_replaced(root: Path) -> None:
    old = outdated(root / KEY)
    script = (
        f"from pathlib import Path; from ray_soup.io.cache import InUse; hold = InUse(Path({str(old)!r})); "
        "print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert built().path == root / f"{KEY}.v1"
        assert (old / "content").read_text() == "old"
        process.communicate("\n")
    assert process.returncode == 0


def test_two_damaged_entries_in_use_are_an_error_that_names_the_remedy(root: Path) -> None:
    users = [InUse(outdated(root / name, "{")) for name in (KEY, f"{KEY}.v1")]
    with pytest.raises(SoupError, match=f"{KEY}: this entry of the cache is damaged.*RAY_SOUP_CACHE"):
        built()
    assert all((user.path / "content").read_text() == "old" for user in users)


def test_a_failed_build_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> Iterator[int]:
        (folder / "content").write_text("half")
        yield 1
        raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        drain(cached("things", KEY, 0, fail))
    stopped = cached("things", KEY, 0, make)
    next(stopped)
    stopped.close()
    assert names(root) == []
    assert lookup("things", KEY) is None


def test_a_full_disk_is_named(root: Path) -> None:
    def fail(folder: Path) -> Iterator[int]:
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(SoupError, match=f"{root} cannot be written: No space left on device.*RAY_SOUP_CACHE"):
        drain(cached("things", KEY, 0, fail))
    with pytest.raises(SoupError, match=r"needs 1000000000\.0 GB .*directions\.dtype=int8"):
        built(nbytes=10**18)


def test_half_made_folders_of_killed_runs_are_removed(root: Path) -> None:
    (root / f"{KEY}.tmp-killed").mkdir(parents=True)
    built()
    assert names(root) == [KEY]


def test_a_scratch_folder_goes_with_its_context_and_those_of_killed_processes_with_the_next(tmp_path: Path) -> None:
    with cache_at(tmp_path):
        (tmp_path / "scratch" / f"{KEY}.tmp-killed").mkdir(parents=True)
        with scratch() as outer, scratch() as inner:
            assert [len(names(folder)) for folder in (outer, inner)] == [0, 0]
            (outer / "file").touch()
            assert {outer.name, inner.name} <= {*names(tmp_path / "scratch")}
        left = {name for name in names(tmp_path / "scratch") if not name.endswith(".lock")}
        assert not left
        assert not list((tmp_path / "scratch").glob("*.lock")) or [*(tmp_path / "scratch").glob("*.lock")] == [
            tmp_path / "scratch" / f"{KEY}.lock"
        ]


def test_an_entry_that_was_discarded_is_removed_once_nobody_uses_it(root: Path) -> None:
    first, second = built(), built()
    first.discard()
    assert (second.path / "content").exists()
    second.discard()
    assert not second.path.exists()


def test_the_least_recently_used_entries_are_evicted_but_none_in_use(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(folder: Path) -> Iterator[int]:
        (folder / "content").write_bytes(os.urandom(100_000))
        yield 1

    holds = [drain(cached("things", content_key(k), 100_000, large)) for k in range(3)]
    for age, hold in zip((30, 20, 10), holds, strict=True):
        os.utime(hold.path / "in_use", (1e9 - age, 1e9 - age))
    for hold in holds[1:]:
        hold.close()
    monkeypatch.setenv("RAY_SOUP_CACHE_GB", str(350_000 / 1e9))
    drain(cached("things", content_key(3), 100_000, large))
    assert set(names(root)) == {content_key(k) for k in (0, 2, 3)}  # 0 is older than 1, and in use


def test_an_entry_whose_eviction_was_interrupted_counts_as_missing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = built()
    hold.close()
    with monkeypatch.context() as killed:
        killed.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        assert cache._evict(hold.path)
    assert (hold.path / "content").exists()
    assert lookup("things", KEY) is None
    assert (built().path / "content").read_text() == "new"


def test_a_cache_folder_can_be_replaced_for_a_while(tmp_path: Path) -> None:
    before = cache_folder()
    with cache_at(tmp_path / "other"):
        assert built().path.is_relative_to(tmp_path / "other")
    assert cache_folder() == before
    assert lookup("things", KEY) is None


def test_keys_depend_on_the_content_and_not_on_the_order_of_its_names() -> None:
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": [2], "a": 1})
    assert content_key("a", "b") != content_key("ab")
    assert content_key("evaluation", 1) == "8654510edff5807e9d0ced3960bbd38b"  # caches outlive a version


@pytest.mark.parametrize("kind", ["a file", "a link", "a folder without a lock", "a deep record"])
def test_anything_in_the_place_of_an_entry_is_replaced(root: Path, tmp_path: Path, kind: str) -> None:
    root.mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    if kind == "a file":
        (root / KEY).write_text("x")
    elif kind == "a link":
        (root / KEY).symlink_to(elsewhere)
    elif kind == "a deep record":
        outdated(root / KEY, "[" * 100_000)
    else:
        (root / KEY).mkdir()
    assert lookup("things", KEY) is None
    assert (built().path / "content").read_text() == "new"
    assert (elsewhere / "mine").exists()


def test_a_cache_that_is_deleted_while_an_entry_is_made_is_named(root: Path) -> None:
    def deleted(folder: Path) -> Iterator[int]:
        shutil.rmtree(root.parent)
        (folder / "content").write_text("new")
        yield 1

    with pytest.raises(SoupError, match=r"cannot be written: it was deleted while it was in use\. .*rerun the same command"):
        drain(cached("things", KEY, 0, deleted))
    assert (built().path / "content").read_text() == "new"


def test_a_cache_that_is_deleted_is_rebuilt_under_a_user_of_its_files(root: Path) -> None:
    hold = built()
    file = (hold.path / "content").open()
    shutil.rmtree(root.parent)
    assert lookup("things", KEY) is None
    assert (built().path / "content").read_text() == "new"
    assert file.read() == "new"
    file.close()
    hold.close()


def test_an_error_of_a_file_outside_of_the_cache_is_not_the_caches(root: Path, tmp_path: Path) -> None:
    def read(folder: Path) -> Iterator[int]:
        (tmp_path / "nothing.pt").read_bytes()
        yield 1

    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        drain(cached("things", KEY, 0, read))


@pytest.mark.parametrize("what", ["file", "read-only"])
def test_a_cache_that_cannot_be_written_is_named(root: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "file":
        root.parent.mkdir()
        root.touch()
    else:

        def read_only(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system", str(root / f"{KEY}.lock"))

        monkeypatch.setattr(cache.FileLock, "acquire", read_only)
    with pytest.raises(SoupError, match=f"The cache folder {root} cannot be written: .*RAY_SOUP_CACHE"):
        built()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("before", ["nothing", "an entry", "a damaged entry"])
def test_every_failed_write_names_the_cache(root: Path, before: str, number: int) -> None:
    """Whether the entry is new, found or replaced: a SoupError that names the cache, or the right entry."""
    fails_at, fault = 0, FaultyDisk([root.parent])
    while fault.count >= fails_at:
        shutil.rmtree(root.parent, ignore_errors=True)
        if before == "a damaged entry":
            outdated(root / KEY, "{")
        elif before == "an entry":
            built().close()
        fault = FaultyDisk([root.parent], number, fails_at)
        try:
            with faulty(fault):
                hold = built()
        except SoupError as error:
            assert str(root) in str(error)  # noqa: PT017 - not every write that fails is needed
            assert os.strerror(number) in str(error)  # noqa: PT017
            hold = built()
        assert (hold.path / "content").read_text() == "new"
        hold.close()
        fails_at += 1
    assert fails_at > 3


def test_a_damaged_entry_that_cannot_be_removed_is_an_error_of_the_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outdated(root / KEY, "{")

    def read_only(folder: Path, **_: object) -> None:
        if folder == root / KEY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(cache.shutil, "rmtree", read_only)
    with pytest.raises(SoupError, match=f"The cache folder {root} cannot be written: Read-only file system"):
        built()


def test_an_entry_from_the_future_is_evicted_in_its_turn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was ahead does not protect an entry from eviction for longer than the latest use of the others."""

    def large(folder: Path) -> Iterator[int]:
        (folder / "content").write_bytes(os.urandom(100_000))
        yield 1

    for key in ("a", "b"):
        hold = drain(cached("things", content_key(key), 100_000, large))
        os.utime(hold.path / "in_use", (4e9, 4e9))
        hold.close()
    monkeypatch.setenv("RAY_SOUP_CACHE_GB", str(150_000 / 1e9))
    drain(cached("things", content_key("c"), 100_000, large)).close()
    assert names(root) == [content_key("c")]


def test_two_processes_make_one_entry_once(root: Path) -> None:
    script = (
        "import time; from ray_soup.io.cache import cached; from ray_soup.io.progress import drain\n"
        "def make(folder):\n"
        "    print('made', flush=True); time.sleep(0.5); (folder / 'content').write_text('new'); yield 1\n"
        f"print((drain(cached('things', {KEY!r}, 0, make)).path / 'content').read_text())"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert sorted(said) == [["made", "new"], ["new"]]
