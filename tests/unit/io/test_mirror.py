from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_soup.errors import SoupError
from ray_soup.io import conditional, mirror, storage
from ray_soup.io.conditional import Conflict
from ray_soup.io.lease import _ACTIVE, Lease
from ray_soup.io.mirror import Mirror


@pytest.fixture
def lease(s3: str) -> Iterator[Lease]:
    """The lease of this run on a folder with a result and a state, which an earlier ray_soup wrote."""
    for name in ("run.json", "state/learn.pt", "model.safetensors"):
        storage.write_bytes(name.encode(), f"{s3}/out/{name}")
    with Lease(f"{s3}/out") as held:
        yield held


@pytest.fixture
def fetched(lease: Lease, s3: str) -> Mirror:
    found = Mirror(f"{s3}/out")
    found.fetch(lease)
    return found


def there(found: Mirror, lease: Lease) -> dict[str, bytes]:
    """Return the objects of OUT, and of this run's own folder as if that were state/."""
    own = f"state/{lease.folder.rpartition('/')[2]}/"
    names = [name for name in storage.walk(found.uri) if not name.startswith("state/") or name.startswith(own)]
    return {name.replace(own, "state/"): storage.read_bytes(f"{found.uri}/{name}") for name in names}


def local(found: Mirror) -> set[str]:
    return {str(f.relative_to(found.folder)) for f in found.folder.rglob("*") if f.is_file()}


def test_everything_but_the_lease_is_fetched_and_what_was_here_before_is_removed(fetched: Mirror, lease: Lease) -> None:
    assert local(fetched) == {"run.json", "state/learn.pt", "model.safetensors"}
    assert (fetched.folder / "state" / "learn.pt").read_bytes() == b"state/learn.pt"
    (fetched.folder / "old").touch()
    fetched.fetch(lease)
    assert "old" not in local(fetched)


def test_only_its_own_copy_is_removed(fetched: Mirror) -> None:
    later = Mirror(fetched.uri)
    later.folder.mkdir()
    fetched.remove()
    assert not fetched.folder.exists()
    assert later.folder.exists()


def test_a_large_model_is_an_empty_file_and_is_not_uploaded(
    fetched: Mirror, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SMALL", 10)
    fetched.fetch(lease)
    assert (fetched.folder / "model.safetensors").read_bytes() == b""
    fetched.push()
    assert there(fetched, lease)["model.safetensors"] == b"model.safetensors"


def test_only_changes_are_uploaded_records_last(fetched: Mirror, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []
    upload, copy = storage.upload, conditional.copy

    def record_upload(source: Path, target: str) -> None:
        uploaded.append(target.removeprefix(f"{lease.folder}/"))
        upload(source, target)

    def record_copy(source: str, target: str, expected: Any) -> None:
        uploaded.append(target.removeprefix(f"{fetched.uri}/"))
        copy(source, target, expected)

    monkeypatch.setattr(storage, "upload", record_upload)
    monkeypatch.setattr(conditional, "copy", record_copy)
    fetched.push()
    assert uploaded == []
    for name in (
        "run.json", "zebra", "state/learn.pt", "state/out/half", "state/.claim-a", "results.jsonl.tmp", "state/soups/a.json",
        "state/soups/a.npz",
    ):  # fmt: skip
        target = fetched.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"new {name}")
    seen: list[tuple[str, int, int]] = []
    fetched.push("state/")
    assert uploaded == ["learn.pt", "soups/a.npz", "soups/a.json"]
    fetched.push(progress=lambda *news: seen.append(news))
    assert uploaded[3:] == ["out/zebra", "out/run.json", "zebra", "run.json"]
    assert seen == [("uploading", 0, 21), ("uploading", 9, 21)]
    assert there(fetched, lease) == {
        "model.safetensors": b"model.safetensors",
        "run.json": b"new run.json",
        **{f"state/{name}": f"new state/{name}".encode() for name in ("learn.pt", "soups/a.json", "soups/a.npz")},
        "zebra": b"new zebra",
    }


def test_files_removed_here_are_removed_there(fetched: Mirror, lease: Lease) -> None:
    (fetched.folder / "state" / "learn.pt").unlink()
    (fetched.folder / "run.json").unlink()
    fetched.push("state/")
    assert set(there(fetched, lease)) == {"run.json", "model.safetensors"}
    fetched.push()
    assert set(there(fetched, lease)) == {"model.safetensors"}


def test_tidy_removes_state_that_another_process_uploaded_and_that_of_earlier_runs(fetched: Mirror, lease: Lease) -> None:
    storage.write_bytes(b"a model to evaluate", f"{lease.folder}/evaluated/model.safetensors")
    storage.write_bytes(b"of a killed run", f"{fetched.uri}/state/run-1/learn.pt")
    fetched.tidy()
    own = lease.folder.removeprefix(f"{fetched.uri}/")
    assert set(storage.walk(fetched.uri)) == {"run.json", f"{own}/learn.pt", "state/lease", "model.safetensors"}


def test_tidy_leaves_the_state_of_a_successor_alone(fetched: Mirror, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is suspended before it lists the state, or between that and its first deletion."""
    theirs = f"{fetched.uri}/state/run-theirs/learn.pt"
    walk, check = storage.walk, lease.check

    def take_over() -> None:
        storage.write_bytes(b"of the successor", theirs)
        storage.write_bytes(b'{"host": "h", "pid": 1, "run": "theirs", "beat": 1}', f"{fetched.uri}/state/lease")

    def late_walk(folder: str) -> Any:
        take_over()
        return walk(folder)

    def late_deletion() -> None:
        check()
        take_over()

    with monkeypatch.context() as patch:
        patch.setattr(lease, "check", late_deletion)
        fetched.tidy()
    assert storage.read_bytes(theirs) == b"of the successor"
    monkeypatch.setattr(storage, "walk", late_walk)
    with pytest.raises(SoupError, match="process 1 on h took over"):
        fetched.tidy()
    assert storage.read_bytes(theirs) == b"of the successor"


def test_a_publication_that_was_cut_short_is_finished_by_the_next_run(
    fetched: Mirror, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is suspended after the first of its moves, and makes the others later."""
    held_back: list[tuple[str, str, Any]] = []
    copy = conditional.copy

    def suspended(source: str, target: str, expected: Any) -> None:
        held_back.append((source, target, expected))
        if len(held_back) > 1:
            raise KeyboardInterrupt
        copy(source, target, expected)

    for name in ("a", "b", "run.json"):
        (fetched.folder / name).write_text(f"new {name}")
    with monkeypatch.context() as patch:
        patch.setattr(conditional, "copy", suspended)
        with pytest.raises(KeyboardInterrupt):
            fetched.push()
    lease._stop.set()
    lease._thread.join()
    _ACTIVE.clear()
    with Lease(fetched.uri) as second:
        found = there(fetched, second)
        assert [found[name] for name in ("a", "b", "run.json")] == [b"new a", b"new b", b"new run.json"]
        storage.write_bytes(b"newer", f"{fetched.uri}/b")
        for move in held_back:
            with pytest.raises((Conflict, FileNotFoundError)):
                copy(*move)
        assert storage.read_bytes(f"{fetched.uri}/b") == b"newer"
