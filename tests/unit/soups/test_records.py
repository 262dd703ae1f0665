"""The records that a run writes about itself: read unchanged, and refused by name if something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_soup.errors import RecipeError
from ray_soup.soups import records

RUN: records.RunRecord = {
    "method": "mehl+", "seed": 1, "exit": 0, "mesh": {"replicas": 2, "shards": 1, "cpus": 0.5}, "model_batch": None,
    "examples": {"fit": 3, "test": 4}, "parameters": 10, "blocks": 2, "peak_memory_bytes": 1e9, "wall_s": 1.25,
    "seconds": {"start": 0.5}, "versions": {"torch": "2.8"}, "notes": ["ä note"], "files": {"a": "00"},
    "ingredients": [{"name": "a", "path": "/a", "sha256": "0", "hyperparameters": {"lr": 1}, "metrics": {"acc": 0.5}}],
    "chosen": "mehl", "improvement": {"select_nll": -0.1}, "seeds": [1, 2], "table": [{"model_name": "mehl", "steps": 3}],
    "tests": [{"split": "test"}], "eliminations": [], "counts": [{"count": 3}], "search": {"trials": 3},
}  # fmt: skip
BEGUN: records.BegunRecord = {
    "recipe": "model: a\n", "ingredients": [[["/a", 3, 4]], [["/b", 5, 6], "ema"]], "compare": [1, [0], []], "kind": "x",
}  # fmt: skip
RESOLVED: records.ResolvedRecord = {
    "mesh": [2, 1], "cpus": 0.5, "model_batch": 4, "actors": {"replicas": "auto", "cpus": 1},
}  # fmt: skip
ENTRY: records.EntryRecord = {"figures": {"steps": 3, "curve": [{"turn": 0}]}, "notes": ["ä note"]}

Write = Callable[[Any, Path], None]
Read = Callable[[Path], Any]


def read_run(file: Path) -> Any:
    return records.read_run_record(file.parent)


RECORDS: dict[str, tuple[Any, Write, Read, int]] = {
    "run.json": (RUN, records.write_run_record, read_run, records.RUN_VERSION),
    "begun.json": (BEGUN, records.write_begun, records.read_begun, records.BEGUN_VERSION),
    "resolved.json": (RESOLVED, records.write_resolved, records.read_resolved, records.RESOLVED_VERSION),
    "entry.json": (ENTRY, records.write_entry, records.read_entry, records.ENTRY_VERSION),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_written_record_is_read_unchanged(tmp_path: Path, name: str) -> None:
    record, write, read, version = RECORDS[name]
    file = tmp_path / name
    write({**record}, file)
    found = read(file)
    assert found.pop("version") == version
    assert found.pop("results_version", records.RESULTS_VERSION) == records.RESULTS_VERSION
    assert found == record
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_version_1_is_read_and_a_newer_one_is_refused(tmp_path: Path, name: str) -> None:
    """Version 1 has no key `version`."""
    record, _, read, version = RECORDS[name]
    file = tmp_path / name
    file.write_text(json.dumps(record))
    assert read(file) == record
    file.write_text(json.dumps({**record, "version": version + 1}))
    message = rf"{file} has version {version + 1}; this ray_soup reads versions up to {version}\. Upgrade ray_soup"
    with pytest.raises(RecipeError, match=message):
        read(file)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("run.json", {"exit": "0"}, "exit: Input should be a valid integer"),
    ("run.json", {"mesh": {**RUN["mesh"], "replicas": 1.5}}, r"mesh\.replicas: Input should be a valid integer"),
    ("run.json", {"mesh": {"replicas": 1}}, r"mesh\.shards: Field required"),
    ("run.json", {"ingredients": [{"name": "a", "path": "/a"}]}, r"ingredients\.0\.sha256: Field required"),
    ("run.json", {"files": ["a"]}, "files: Input should be a valid dictionary"),
    ("run.json", {"version": "2"}, "version: Input should be a valid integer"),
    ("begun.json", {"compare": 1}, "compare: Input should be a valid list"),
    ("resolved.json", {"mesh": ["2", 1]}, r"mesh\.0: Input should be a valid integer"),
    ("resolved.json", {"cpus": "1"}, "cpus: Input should be a valid number"),
    ("entry.json", {"notes": "a note"}, "notes: Input should be a valid list"),
    ("entry.json", {"figures": []}, "figures: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("name", "changes", "said"), WRONG)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path: Path, name: str, changes: dict[str, Any], said: str) -> None:
    record, _, read, _ = RECORDS[name]
    (tmp_path / name).write_text(json.dumps({**record, **changes}))
    with pytest.raises(RecipeError, match=rf"{tmp_path / name} is damaged \({said}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in RECORDS if name != "run.json" for key in RECORDS[name][0]]
)
def test_a_record_without_a_required_key_is_refused_by_name(tmp_path: Path, name: str, key: str) -> None:
    record, _, read, _ = RECORDS[name]
    (tmp_path / name).write_text(json.dumps({k: v for k, v in record.items() if k != key}))
    if key in ("compare", "kind"):  # options of some commands
        assert key not in read(tmp_path / name)
        return
    with pytest.raises(RecipeError, match=rf"{name} is damaged \(no '{key}'\)"):
        read(tmp_path / name)


def test_a_missing_record_is_none_or_refused(tmp_path: Path) -> None:
    assert records.read_run_record(tmp_path) is None
    assert records.read_resolved(tmp_path / "resolved.json") is None
    with pytest.raises(RecipeError, match=r"is not a finished soup: no run\.json found\. Rerun the command that creates it"):
        records.finished_record(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"seed": 1}', b'{"exit": NaN}'])
def test_a_damaged_run_json_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/run\.json is damaged \(.*remove it and rerun the command"):
        records.read_run_record(tmp_path)
    with pytest.raises(RecipeError, match=r"is not a finished soup: .*run\.json is damaged"):
        records.finished_record(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "..", ""])
def test_a_listed_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "files": {name: "00"}}))
    with pytest.raises(RecipeError, match=r"run\.json is damaged \(files.*expected the name of a file, not a path"):
        records.read_run_record(tmp_path)


def test_records_are_valid_json_in_any_locale_and_without_credentials(tmp_path: Path) -> None:
    record: Any = {"exit": 0, "notes": ["s3://user:pa/ss@bucket/x", "größe"], "curve": [float("nan"), float("inf"), 0.5]}
    records.write_run_record(record, tmp_path / "run.json")
    found = json.loads((tmp_path / "run.json").read_bytes().decode("ascii"), parse_constant=pytest.fail)
    assert found["curve"] == [None, None, 0.5]
    assert "pa/ss" not in found["notes"][0]
    assert found["notes"][1] == "größe"


@pytest.mark.parametrize("name", ["resolved.json", "entry.json"])
def test_a_changed_value_of_the_state_is_noticed(tmp_path: Path, name: str) -> None:
    record, write, read, _ = RECORDS[name]
    write({**record}, tmp_path / name)
    found = json.loads((tmp_path / name).read_text())
    key = "model_batch" if name == "resolved.json" else "figures"
    found[key] = 3 if name == "resolved.json" else {"steps": 4}
    (tmp_path / name).write_text(json.dumps(found))
    with pytest.raises(RecipeError, match=rf"{name} is damaged \(it is not as it was written\)\. (Remove|Choose)"):
        read(tmp_path / name)


def test_an_entry_notices_other_outcomes_and_another_place(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"outcomes")
    records.write_entry({**ENTRY}, tmp_path / "a.json")
    assert records.read_entry(tmp_path / "a.json")["notes"] == ENTRY["notes"]
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    with pytest.raises(RecipeError, match=r"b\.json is damaged \(it belongs to another soup\)"):
        records.read_entry(tmp_path / "b.json")
    (tmp_path / "b.json").rename(tmp_path / "a.json")
    (tmp_path / "a.npz").write_bytes(b"others")
    with pytest.raises(RecipeError, match=r"a\.npz is damaged .*Remove \S+a\.json to compute this soup again"):
        records.read_entry(tmp_path / "a.json")


def test_results_are_read_unchanged_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    rows = [{"model_name": "ä", "test_nll": 0.1, "ingredients_used": 3, "steps": None}, {"model_name": "b"}]
    records.write_results(rows, tmp_path / "results.jsonl")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    assert records.read_results(tmp_path) == rows
    (tmp_path / "results.jsonl").write_text('{"model_name": "a"}\n{"test_nll": 1}\n')
    with pytest.raises(RecipeError, match=r"results\.jsonl is damaged \(line 2 has no 'model_name'\)"):
        records.read_results(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"model_name"')
    with pytest.raises(RecipeError, match=r"results\.jsonl cannot be read \(.*Rerun the command that creates it"):
        records.read_results(tmp_path)
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"results\.jsonl cannot be read \(.*No such file"):
        records.read_results(tmp_path)
