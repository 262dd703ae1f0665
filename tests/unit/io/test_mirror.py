from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.io import mirror, storage
from ray_soup.io.mirror import Mirror


@pytest.fixture
def fetched(s3: str) -> Mirror:
    """A mirror of a folder with a result, a state and the lease of this run."""
    for name in ("run.json", "state/learn.pt", "state/lease", "model.safetensors"):
        storage.write_bytes(name.encode(), f"{s3}/out/{name}")
    found = Mirror(f"{s3}/out")
    found.fetch()
    return found


def there(found: Mirror) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{found.uri}/{name}") for name in storage.walk(found.uri)}


def local(found: Mirror) -> set[str]:
    return {str(f.relative_to(found.folder)) for f in found.folder.rglob("*") if f.is_file()}


def test_everything_but_the_lease_is_fetched_and_what_was_here_before_is_removed(fetched: Mirror) -> None:
    assert local(fetched) == {"run.json", "state/learn.pt", "model.safetensors"}
    assert (fetched.folder / "state" / "learn.pt").read_bytes() == b"state/learn.pt"
    (fetched.folder / "old").touch()
    fetched.fetch()
    assert "old" not in local(fetched)


def test_a_large_model_is_an_empty_file_and_is_not_uploaded(fetched: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SMALL", 10)
    fetched.fetch()
    assert (fetched.folder / "model.safetensors").read_bytes() == b""
    fetched.push()
    assert there(fetched)["model.safetensors"] == b"model.safetensors"


def test_only_changes_are_uploaded_run_json_last(fetched: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []
    upload = storage.upload

    def record(source: Path, target: str) -> None:
        uploaded.append(target.removeprefix(f"{fetched.uri}/"))
        upload(source, target)

    monkeypatch.setattr(storage, "upload", record)
    fetched.push()
    assert uploaded == []
    for name in ("run.json", "zebra", "state/learn.pt", "state/lock", "state/out/half", "results.jsonl.tmp"):
        target = fetched.folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(f"new {name}")
    seen: list[tuple[str, int, int]] = []
    fetched.push("state/")
    assert uploaded == ["state/learn.pt"]
    fetched.push(progress=lambda *news: seen.append(news))
    assert sorted(uploaded[1:]) == ["run.json", "zebra"]
    assert uploaded[-1] == "run.json"
    assert seen == [("uploading", 0, 21), ("uploading", 9, 21)]
    assert there(fetched) == {
        "model.safetensors": b"model.safetensors",
        "run.json": b"new run.json",
        "state/learn.pt": b"new state/learn.pt",
        "state/lease": b"state/lease",
        "zebra": b"new zebra",
    }


def test_files_removed_here_are_removed_there(fetched: Mirror) -> None:
    (fetched.folder / "state" / "learn.pt").unlink()
    (fetched.folder / "run.json").unlink()
    fetched.push("state/")
    assert set(there(fetched)) == {"run.json", "state/lease", "model.safetensors"}
    fetched.push()
    assert set(there(fetched)) == {"state/lease", "model.safetensors"}


def test_tidy_removes_state_that_another_process_uploaded(fetched: Mirror) -> None:
    storage.write_bytes(b"a model to evaluate", f"{fetched.uri}/state/evaluated/model.safetensors")
    fetched.tidy()
    assert set(there(fetched)) == {"run.json", "state/learn.pt", "state/lease", "model.safetensors"}
