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
    (tmp_path / "run.json").write_text("[]")
    assert records.read_run_record(tmp_path) is None


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
